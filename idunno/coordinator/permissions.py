# idunno/coordinator/permissions.py: who may do what. The table of docs/roles.md, as code.
#
# Rule 1: every command has exactly one rule here; a command without one may be given by nobody.
# Rule 2: the leader checks before it proposes, and apply checks again: what the leader saw may have changed in between.
# Rule 3: users have what is theirs, admins everything, readers nothing that writes. Nodes act for the system; what only the
#         system may do is theirs alone, admins included: an admin's tool that could complete a task could also lose one.
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from idunno.base.errors import Conflict, PermissionDenied
from idunno.base.ids import check_file_name
from idunno.coordinator import commands as c
from idunno.coordinator.names import SYSTEM, input_name, input_of, job_of, model_of
from idunno.wire.calls import Actor, Role

if TYPE_CHECKING:
    from idunno.coordinator.machine import Machine

Owns = Callable[[Any, Actor, "Machine"], None]

_PUTS: Final = (c.BeginPut, c.PutSmall)


def check(command: c.Command, actor: Actor, machine: Machine) -> None:
    """Raises PermissionDenied unless `actor` may give this command now, naming who may or whose it is."""
    least, owns = RULES[type(command)]
    if not actor.may(least):
        raise PermissionDenied(f"{_what(command)} takes the role {least.value}; {_who(actor)} is a {actor.role.value}")
    if owns is not None:
        owns(command, actor, machine)


def check_new_name(command: c.Command, machine: Machine) -> None:
    """Before proposing, so that what apply would refuse enters no log: the name of a file that is not there yet must be clean."""
    if isinstance(command, _PUTS) and machine.namespace.find(command.name) is None:
        check_file_name(command.name, system=True)


def may_read(name: str, actor: Actor, machine: Machine) -> bool:
    """Whether `actor` may look at that file: everybody at all of them, but for users at the files of others' jobs."""
    if actor.role is not Role.USER or job_of(name) is None:
        return True
    current = machine.namespace.find(name)
    return current is None or current.owner == actor.name


def check_read(name: str, actor: Actor, machine: Machine) -> None:
    """Raises PermissionDenied unless `may_read`."""
    if not may_read(name, actor, machine):
        raise PermissionDenied(f"{name[:200]} is of somebody else's job; users see their own: `idunno jobs`")


def _is_above_owners(actor: Actor) -> bool:
    """Whether ownership does not bind this actor."""
    return actor.may(Role.ADMIN)


def _owner(what: str, owner: str, actor: Actor, instead: str) -> None:
    if owner != actor.name and not _is_above_owners(actor):
        raise PermissionDenied(f"{what} belongs to {owner}; {instead}, or ask {owner} or an admin")


def _genesis(command: c.Genesis, actor: Actor, machine: Machine) -> None:
    if machine.roster.cluster:
        raise Conflict(f"this log belongs to cluster {machine.roster.cluster} already")


def _itself(command: c.UpdateNode, actor: Actor, machine: Machine) -> None:
    if actor.name != command.node:
        raise PermissionDenied(
            f"node {machine.roster.name(command.node)} is described by itself only, not by {_who(actor)}"
        )


def _put(command: c.BeginPut | c.PutSmall, actor: Actor, machine: Machine) -> None:
    made = machine.namespace.made(command.put)
    if made is not None and made[0] == command.name:
        return  # a retry: it gets its answer and changes nothing
    _system_name(command.name, actor, machine)
    current = machine.namespace.find(command.name)
    if current is not None:
        _owner(command.name, current.owner, actor, "choose another name")


def _end_put(command: c.CommitPut | c.AbortPut, actor: Actor, machine: Machine) -> None:
    open_put = machine.namespace.open_put(command.put)
    if open_put is None:
        return
    _owner(f"put {command.put}", open_put.owner, actor, "leave it alone")
    current = machine.namespace.find(open_put.name)
    if isinstance(command, c.CommitPut) and current is not None:
        _owner(open_put.name, current.owner, actor, "choose another name")


def _delete(command: c.DeleteFile, actor: Actor, machine: Machine) -> None:
    _system_name(command.name, actor, machine)
    current = machine.namespace.find(command.name)
    if current is not None:
        _owner(command.name, current.owner, actor, "it stays")


def _restore(command: c.RestoreTrash, actor: Actor, machine: Machine) -> None:
    current = machine.namespace.find(command.name)
    if current is not None:
        _owner(command.name, current.owner, actor, "get the old versions under another name")
    for entry in machine.namespace.trash.of(command.name):
        _owner(f"{command.name} in the trash", entry.versions[-1].owner, actor, "it stays there")


def _purge(command: c.Purge, actor: Actor, machine: Machine) -> None:
    for number in command.entries:
        entry = machine.namespace.trash.entries.get(number)
        if entry is not None:
            _owner(f"{entry.name} in the trash", entry.versions[-1].owner, actor, "it stays there")


def _system_name(name: str, actor: Actor, machine: Machine) -> None:
    """Below .idunno/ only nodes write, but for what a client puts before it submits a job or deploys a model."""
    if not (name + "/").startswith(SYSTEM) or actor.role is Role.NODE:
        return
    job, model = input_of(name), model_of(name)
    if job is None and model is None:
        raise PermissionDenied(f"{name[:200]} is the system's own: choose a name outside {SYSTEM}")
    if job is not None and machine.ledger.find(job) is not None:
        raise Conflict(
            f"job {job} is submitted, its input stays as it is; `idunno forget {job}` removes both when it is over"
        )
    record = machine.registry.find(model) if model is not None else None
    if record is not None:
        _owner(f"model {record.model}", record.owner, actor, "choose another name")
        if any(file.name == name for file in record.files):
            raise Conflict(
                f"{name} is part of model {model}, version {record.version}; `idunno undeploy {model}` first"
            )


def _model(command: c.Deploy | c.Undeploy | c.SetBatchSize, actor: Actor, machine: Machine) -> None:
    model = machine.registry.find(command.model)
    if model is not None:
        instead = "choose another name" if isinstance(command, c.Deploy) else "leave it as it is"
        _owner(f"model {command.model}", model.owner, actor, instead)
    for file in command.files if isinstance(command, c.Deploy) else ():
        check_read(file.name, actor, machine)


def _submit(command: c.SubmitJob, actor: Actor, machine: Machine) -> None:
    check_read(command.input_name, actor, machine)
    given = machine.namespace.find(input_name(command.job))
    if given is not None:  # who forgets a job removes its files: they must not be another's, put for a job of that id
        _owner(f"the input of job {command.job}", given.owner, actor, "a new job needs a new id")


def _job(command: c.CancelJob | c.ForgetJob, actor: Actor, machine: Machine) -> None:
    job = machine.ledger.find(command.job)
    if job is not None:
        _owner(f"job {command.job}", job.client, actor, "leave it alone")


RULES: Final[dict[type[Any], tuple[Role, Owns | None]]] = {
    c.Genesis: (Role.NODE, _genesis),
    c.AddNode: (Role.NODE, None),
    c.UpdateNode: (Role.NODE, _itself),
    c.SetPresence: (Role.NODE, None),
    c.RemoveNode: (Role.ADMIN, None),
    c.RenewClusterKey: (Role.NODE, None),
    c.RaiseVersion: (Role.ADMIN, None),
    c.TakeDigest: (Role.NODE, None),
    c.ConfirmDigest: (Role.NODE, None),
    c.AddUser: (Role.NODE, None),
    c.RevokeUser: (Role.ADMIN, None),
    c.AddToken: (Role.ADMIN, None),
    c.RevokeToken: (Role.ADMIN, None),
    c.BeginPut: (Role.USER, _put),
    c.CommitPut: (Role.USER, _end_put),
    c.AbortPut: (Role.USER, _end_put),
    c.PutSmall: (Role.USER, _put),
    c.DeleteFile: (Role.USER, _delete),
    c.Deploy: (Role.USER, _model),
    c.Undeploy: (Role.USER, _model),
    c.Assign: (Role.NODE, None),
    c.Unassign: (Role.NODE, None),
    c.ReportWorker: (Role.NODE, None),
    c.SetBatchSize: (Role.USER, _model),
    c.SubmitJob: (Role.USER, _submit),
    c.PlanJob: (Role.NODE, None),
    c.CompleteTask: (Role.NODE, None),
    c.FailAttempt: (Role.NODE, None),
    c.CancelJob: (Role.USER, _job),
    c.ForgetJob: (Role.USER, _job),
    c.SetRetention: (Role.USER, None),
    c.Expire: (Role.NODE, None),
    c.RestoreTrash: (Role.USER, _restore),
    c.Purge: (Role.USER, _purge),
}
"""The least role for each command, and what else must hold."""


def _what(command: c.Command) -> str:
    return str(type(command).__struct_config__.tag).replace("-", " ")


def _who(actor: Actor) -> str:
    return actor.name or "the asker"

# idunno/coordinator/machine.py: the replicated state machine: what a log entry does to roster, namespace, registry and ledger.
#
# Rule 1: same entries, same machine, byte for byte, on every node: no clock, no chance, no float, no set walked, no hash().
#         Machine time is the largest stamp seen: it never goes back.
# Rule 2: a command that cannot be done is answered with a typed error and changes nothing but machine time. An entry that this
#         version does not know raises: its caller stops applying, for what follows would rest on half a machine.
# Rule 3: a command that touches two parts is put together here, checks of both before the first change; parts know nothing
#         of each other's insides.
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, Final, Protocol, TypeVar

import msgspec
from blake3 import blake3

from idunno.base.errors import Conflict, DecodeError, IdunnoError, Incompatible, InvalidArgument
from idunno.base.ids import Index
from idunno.consensus.voters import decode_voters, names_voters
from idunno.coordinator import commands as c
from idunno.coordinator import effects as e
from idunno.coordinator import permissions
from idunno.coordinator import snapshot as snapshots
from idunno.coordinator.ledger import Ledger
from idunno.coordinator.names import job_directory, job_of, model_directory, output_name
from idunno.coordinator.namespace import Namespace, check_blocks, small_block
from idunno.coordinator.recent import Recent
from idunno.coordinator.records import MACHINE_VERSION, Block, ModelRecord, Output, VersionRecord
from idunno.coordinator.references import References, model_blocks
from idunno.coordinator.registry import Registry
from idunno.coordinator.results import Done, FileGone, Purged, PutDone, Restored
from idunno.coordinator.roster import Roster
from idunno.coordinator.timing import check_timing
from idunno.coordinator.trash import RetentionRule
from idunno.wire.calls import Actor, Role


class Applied(msgspec.Struct, frozen=True):
    """What an entry did: its command's result, or the error that its caller sees, and the effects to follow."""

    result: msgspec.Struct | None = None
    error: IdunnoError | None = None
    effects: tuple[e.Effect, ...] = ()


class _Asked(msgspec.Struct, frozen=True, gc=False):
    """Who asked, under which request id."""

    actor: Actor
    request: str


@lru_cache(maxsize=1_024)
def _actor(name: str, role: str) -> Actor:
    """Raises ValueError for a role that this version lacks."""
    return Actor(name, Role(role))


class _Answer(Protocol):
    @property
    def changed(self) -> bool: ...


D = TypeVar("D", bound=_Answer)


class Machine:
    """`supports`: the newest machine version that it knows: this release's, or, in a test, an older one's."""

    def __init__(self, supports: int = MACHINE_VERSION) -> None:
        self.supports = supports
        self.index = Index(0)
        self.now_ms = 0
        self.roster = Roster()
        self.namespace = Namespace()
        self.registry = Registry()
        self.ledger = Ledger()
        self.references = References()
        self._recent = Recent()
        self._effects: list[e.Effect] = []

    def apply(self, index: Index, payload: bytes | memoryview) -> Applied:
        """Apply the log's entry `index`. A refused command is an Applied with its error.

        Raises DecodeError or Incompatible for an entry that this version does not know: the caller must apply nothing more.
        """
        assert index > self.index, f"entry {index} after {self.index}: the log is applied once and in order"
        if not payload:  # a leader's no-op
            self.index = index
            return Applied()
        if names_voters(payload):
            done = self.roster.set_voters(decode_voters(payload))
            self.index = index
            return Applied(done, None, (e.RosterChanged(),))
        entry = c.decode_entry(payload)
        command = entry.command
        try:
            asked = _Asked(_actor(entry.actor, entry.role), entry.request)
        except ValueError:
            raise DecodeError(
                f"log entry {index} was asked for by role {entry.role[:40]!r}, which this version lacks"
            ) from None
        kind = type(command)
        since = c.SINCE.get(kind, 1)
        if since > 1 or kind is c.Genesis:
            self._check_known(index, command, since)
        self.now_ms = max(self.now_ms, entry.stamp_ms)
        self._effects = []
        try:
            permissions.check(command, asked.actor, self)
            if since > 1:
                self._check_raised(command, since)
            result = _APPLY[kind](self, command, asked)
            if freed := self.references.freed():
                self._tell(e.BlocksFreed(freed))
            applied = Applied(result, None, tuple(self._effects))
        except Incompatible:
            raise
        except IdunnoError as error:
            assert not self._effects, f"{kind.__name__} was refused half done"
            applied = Applied(error=error)
        self.index = index
        return applied

    def _check_known(self, index: Index, command: c.Command, since: int) -> None:
        """Raises Incompatible for what this release does not know: it must apply nothing more."""
        needed = since
        if isinstance(command, c.RaiseVersion | c.Genesis):
            needed = max(needed, command.machine_version if isinstance(command, c.Genesis) else command.version)
        if needed > self.supports:
            raise Incompatible(
                f"log entry {index} needs machine version {needed}, this idunno knows up to {self.supports}: upgrade idunno on "
                f"this node, and start it again"
            )

    def _check_raised(self, command: c.Command, needed: int) -> None:
        """Before the cluster's version is raised everybody refuses what came with the next."""
        present = self.roster.machine_version
        if needed > present and not isinstance(command, c.RaiseVersion):
            raise Conflict(
                f"the cluster's machine version is {present}, this takes {needed}: `idunno upgrade` raises it"
            )

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def capture(self, seen: Callable[[str, Any], None] | None = None) -> Iterator[bytes]:
        """The machine as it is now, as a snapshot in pieces, whatever is applied while they are taken.

        `seen` is told the kind and the record of every row.
        """
        head = snapshots.Head(snapshots.FORMAT, self.roster.machine_version, self.index, self.now_ms)
        parts = (self.roster, self.namespace, self.registry, self.ledger, self._recent)
        rows = [part.capture() for part in parts]
        return snapshots.encode(head, chain.from_iterable(rows), seen)

    def snapshot(self) -> bytes:
        return b"".join(self.capture())

    @classmethod
    def restore(cls, data: bytes | memoryview) -> Machine:
        """The machine of a snapshot. Raises Corrupt, Incompatible, DecodeError."""
        reader = snapshots.Reader()
        reader.feed(data)
        return cls.restored(reader)

    @classmethod
    def restored(cls, reader: snapshots.Reader, supports: int = MACHINE_VERSION) -> Machine:
        """The machine of a snapshot that was read to its end. Raises Corrupt, DecodeError, Incompatible."""
        reader.finish()
        if reader.head.machine_version > supports:
            raise Incompatible(
                f"a snapshot is of machine version {reader.head.machine_version}, this idunno knows up to {supports}: upgrade it"
            )
        machine = cls(supports)
        machine.index, machine.now_ms = Index(reader.head.index), reader.head.now_ms
        machine.roster = Roster(reader.roster())
        machine.namespace = Namespace(reader.namespace(), machine.roster.machine_version)
        machine.registry = Registry(reader.registry())
        machine.ledger = Ledger(reader.ledger())
        machine._recent = Recent(reader.recent())
        machine.references = machine.recount()
        return machine

    def become(self, other: Machine) -> Machine:
        """Whoever holds this machine sees the other from now on. Returns what it was."""
        was = Machine.__new__(Machine)
        vars(was).update(vars(self))
        vars(self).update(vars(other))
        return was

    def free(self) -> None:
        """Nobody looks at it any more: let go of it, in steps."""
        self.namespace.free()
        self.references.free()

    def recount(self) -> References:
        """The references as the parts have them: what `references` holds, counted anew."""
        counted = References()
        for name, record in self.namespace.each():
            counted.add(_blocks(record), _client(name, record.owner))
        for entry in self.namespace.trash.entries.values():
            for record in entry.versions:
                counted.add(_blocks(record))
        for model in self.registry.models():
            counted.add(model_blocks(model))
        for job in self.ledger.jobs():
            counted.add(() if job.input_small else job.input_blocks, job.client)
        return counted

    def digest(self) -> bytes:
        """32 bytes that are equal on all nodes at an equal index. Costs as much as a snapshot."""
        hasher = blake3()
        for piece in self.capture():
            hasher.update(piece)
        return hasher.digest()

    # -- roster -------------------------------------------------------------------------------------------------------

    def _genesis(self, command: c.Genesis, asked: _Asked) -> Done:
        done = self.roster.begin(command, self.now_ms)
        self.namespace.raise_version(self.roster.machine_version)
        return self._told(done, e.RosterChanged())

    def _add_node(self, command: c.AddNode, asked: _Asked) -> msgspec.Struct:
        return self._told(self.roster.add_node(command.node, command.token, self.now_ms), e.RosterChanged())

    def _update_node(self, command: c.UpdateNode, asked: _Asked) -> Done:
        return self._told(self.roster.update_node(command, self.now_ms), e.RosterChanged())

    def _set_presence(self, command: c.SetPresence, asked: _Asked) -> Done:
        done = self.roster.set_presence(command.node, command.presence, command.boot, command.reason, self.now_ms)
        return self._told(done, e.RosterChanged())

    def _remove_node(self, command: c.RemoveNode, asked: _Asked) -> Done:
        def remove() -> Done:
            self.roster.remove_node(command.node)
            self._tell(e.RosterChanged())
            for model in self.registry.remove_node(command.node, self.roster.name):
                self._tell(e.ModelChanged(model))
            return Done()

        return self._once(command, command.node, asked, remove)

    def _renew_cluster_key(self, command: c.RenewClusterKey, asked: _Asked) -> Done:
        return self._told(self.roster.renew_key(command.cluster_key), e.RosterChanged())

    def _raise_version(self, command: c.RaiseVersion, asked: _Asked) -> Done:
        done = self.roster.raise_version(command.version)
        self.namespace.raise_version(self.roster.machine_version)
        return self._told(done, e.RosterChanged())

    def _take_digest(self, command: c.TakeDigest, asked: _Asked) -> Done:
        self._tell(e.DigestDue())
        return Done()

    def _confirm_digest(self, command: c.ConfirmDigest, asked: _Asked) -> Done:
        self._tell(e.DigestTold(Index(command.index), command.digest))
        return Done()

    def _add_user(self, command: c.AddUser, asked: _Asked) -> msgspec.Struct:
        return self._told(self.roster.add_user(command.user, command.token, self.now_ms), e.RosterChanged())

    def _revoke_user(self, command: c.RevokeUser, asked: _Asked) -> Done:
        return self._once(
            command,
            command.name,
            asked,
            lambda: self._told(self.roster.revoke_user(command.name, self.now_ms), e.RosterChanged()),
        )

    def _add_token(self, command: c.AddToken, asked: _Asked) -> Done:
        return self.roster.add_token(command.token, asked.actor.name, self.now_ms)

    def _revoke_token(self, command: c.RevokeToken, asked: _Asked) -> Done:
        return self.roster.revoke_token(command.token)

    # -- namespace ----------------------------------------------------------------------------------------------------

    def _begin_put(self, command: c.BeginPut, asked: _Asked) -> msgspec.Struct:
        return self.namespace.begin(command, asked.actor.name, self.now_ms)

    def _commit_put(self, command: c.CommitPut, asked: _Asked) -> PutDone:
        put = self.namespace.open_put(command.put)
        done = self.namespace.commit(command, asked.actor.name, self.now_ms)
        if put is not None:
            self.references.add(command.blocks, _client(put.name, put.owner))
            self._tell(e.VersionMade(command.name, done.version, command.blocks))
        return done

    def _abort_put(self, command: c.AbortPut, asked: _Asked) -> Done:
        return self.namespace.abort(command.put)

    def _put_small(self, command: c.PutSmall, asked: _Asked) -> PutDone:
        retry = self.namespace.made(command.put) is not None
        done = self.namespace.put_small(command, asked.actor.name, self.now_ms)
        if not retry:
            block = Block(command.block, len(command.content))  # which `put_small` has checked
            made = e.VersionMade(command.name, done.version, (block,))
            self._effects += (e.KeepSmall(block.block, command.content), made)
        return done

    def _delete_file(self, command: c.DeleteFile, asked: _Asked) -> FileGone:
        before = self.namespace.deleted_by(command.name, asked.request)
        if before is not None:
            return before
        kind, version = type(command).__name__, self.roster.machine_version
        if version >= 2 and self._recent.answered(kind, command.name, "", asked.request):
            return FileGone(
                command.name, 0
            )  # the file was put and deleted again since: how many there were is not known
        earlier = self.namespace.last_deletion(command.name)
        done, versions, gone = self.namespace.delete(command.name, asked.request, asked.actor.name, self.now_ms)
        if version >= 2:
            self._recent.keep(kind, command.name, "", earlier)
        self._tell(e.FileDeleted(command.name, versions))
        self._unrefer(gone, command.name)
        return done

    def _set_retention(self, command: c.SetRetention, asked: _Asked) -> Done:
        owner = "" if asked.actor.may(Role.ADMIN) else asked.actor.name
        rule = RetentionRule(command.prefix, owner, command.versions, command.age_ms)
        # Set a second time by a retry, it would undo what somebody else set in between.
        return self._once(
            command,
            command.prefix,
            asked,
            lambda: self._told(self.namespace.retention.set(rule, self.roster.machine_version), e.RetentionChanged()),
            since=2,
        )

    def _expire(self, command: c.Expire, asked: _Asked) -> Done:
        done, gone = self.namespace.expire(command.name, command.versions, asked.actor.name, self.now_ms)
        self._unrefer(gone)
        return done

    def _restore_trash(self, command: c.RestoreTrash, asked: _Asked) -> Restored:
        kind = type(command).__name__
        if self._recent.answered(kind, command.name, asked.actor.name, asked.request):
            return Restored(command.name, 0, changed=False)
        count = self.namespace.restore(command.name)
        self._recent.keep(kind, command.name, asked.actor.name, asked.request)
        return Restored(command.name, count)

    def _purge(self, command: c.Purge, asked: _Asked) -> Purged:
        gone = self.namespace.purge(command.entries)
        self._unrefer(gone)
        return Purged(len(gone), sum(record.size for record in gone), changed=bool(gone))

    # -- registry -----------------------------------------------------------------------------------------------------

    def _deploy(self, command: c.Deploy, asked: _Asked) -> msgspec.Struct:
        for node in command.assign:
            self.roster.node(node)
        old = self.registry.find(command.model)
        done = self.registry.deploy(
            command, asked.actor.name, asked.request, self.roster.name, self.namespace, self.now_ms
        )
        if done.changed:
            self._tell(e.ModelChanged(command.model))
            self.references.add(model_blocks(self.registry.get(command.model)))
            self.references.remove(model_blocks(old))
            kept = [file.name for file in command.files]
            self._remove_model_files(old, kept)
        return done

    def _undeploy(self, command: c.Undeploy, asked: _Asked) -> Done:
        def undeploy() -> Done:
            old = self.registry.get(command.model)
            waiting = [job.job for job in self.ledger.unfinished() if job.model == command.model]
            if waiting:
                raise Conflict(
                    f"model {command.model} has {len(waiting)} unfinished jobs, first {waiting[0]}; wait for them or "
                    f"`idunno cancel {waiting[0]}`"
                )
            done = self._told(self.registry.undeploy(command.model), e.ModelChanged(command.model))
            self.references.remove(model_blocks(old))
            self._remove_model_files(old, [])
            return done

        return self._once(command, command.model, asked, undeploy)

    def _remove_model_files(self, old: ModelRecord | None, kept: list[str]) -> None:
        """Files that a client put only for the deploy that is no more go with it."""
        below = model_directory(old.model) if old is not None else ""
        for file in old.files if old is not None else ():
            if file.name.startswith(below) and file.name not in kept:
                self._remove([file.name])

    def _assign(self, command: c.Assign, asked: _Asked) -> Done:
        self.roster.node(command.node)
        done = self.registry.assign(command.model, command.version, command.node, self.roster.name, self.now_ms)
        return self._told(done, e.ModelChanged(command.model))

    def _unassign(self, command: c.Unassign, asked: _Asked) -> Done:
        done = self.registry.unassign(command.model, command.version, command.node, command.reason, self.roster.name)
        return self._told(done, e.ModelChanged(command.model))

    def _report_worker(self, command: c.ReportWorker, asked: _Asked) -> msgspec.Struct:
        done = self.registry.report(
            command.model, command.version, command.node, command.error, self.roster.name, self.now_ms
        )
        return self._told(done, e.ModelChanged(command.model))

    def _set_batch_size(self, command: c.SetBatchSize, asked: _Asked) -> Done:
        model = command.model
        return self._once(
            command,
            model,
            asked,
            lambda: self._told(self.registry.set_batch_size(model, command.batch_size), e.ModelChanged(model)),
            since=2,
        )

    # -- ledger -------------------------------------------------------------------------------------------------------

    def _submit_job(self, command: c.SubmitJob, asked: _Asked) -> msgspec.Struct:
        before = self.ledger.submitted(command, asked.actor.name)
        if before is not None:
            return before
        model = self.registry.serving(command.model)
        given = self.namespace.version(command.input_name, command.input_version)
        done = self.ledger.submit(command, asked.actor.name, model, given, self.now_ms)
        self.references.add(_blocks(given), asked.actor.name)
        return self._told(done, e.JobChanged(command.job))

    def _plan_job(self, command: c.PlanJob, asked: _Asked) -> msgspec.Struct:
        return self._told(self.ledger.plan(command, self.now_ms), e.JobChanged(command.job))

    def _complete_task(self, command: c.CompleteTask, asked: _Asked) -> msgspec.Struct:
        name = output_name(command.job, command.task)
        put = self.namespace.open_put(command.put)
        late = self.ledger.refused(command.job, command.task)
        if late is not None:
            if put is not None and put.name == name:
                self.namespace.abort(command.put)  # the blocks of a result that nobody wants need not stay pinned
            return late
        self.ledger.check_completion(command)
        check_timing(command.timing)
        if command.put:
            if put is None or put.name != name:
                raise Conflict(f"put {command.put[:128]} of {name} is not open: it was aborted, or never begun")
            check_blocks(command.blocks, command.size)
            blocks, small = command.blocks, False
        else:
            block = small_block(command.content)
            if block.size != command.size:
                raise InvalidArgument(f"output of {command.size} bytes comes with {block.size} bytes of content")
            blocks, small = (block,), True
            self._tell(e.KeepSmall(block.block, command.content))
        job = self.ledger.job(command.job)
        self.namespace.abort(command.put)
        made = self.namespace.add(name, command.size, blocks, job.client, command.put, self.now_ms, small=small)
        self.references.add(() if small else blocks, job.client)
        done = self.ledger.complete(command, Output(name, command.size, blocks, small), self.now_ms)
        queries = command.done + command.errors
        self.registry.count_queries(job.model, queries, command.timing)
        self._tell(e.VersionMade(name, made.version, blocks))
        self._tell(e.TaskCompleted(command.job, command.task, job.model, queries, self.now_ms))
        self._tell(e.JobChanged(command.job))
        return done

    def _fail_attempt(self, command: c.FailAttempt, asked: _Asked) -> msgspec.Struct:
        done = self.ledger.fail_attempt(command, self.now_ms)
        if done.counted:
            self._tell(e.JobChanged(command.job, command.task))
        return done

    def _cancel_job(self, command: c.CancelJob, asked: _Asked) -> msgspec.Struct:
        return self._told(self.ledger.cancel(command.job, asked.actor.name, self.now_ms), e.JobChanged(command.job))

    def _forget_job(self, command: c.ForgetJob, asked: _Asked) -> Done:
        def forget() -> Done:
            job = self.ledger.forget(command.job)
            self.references.remove(() if job.input_small else job.input_blocks, job.client)
            self._tell(e.JobChanged(command.job))
            self._remove(self.namespace.below(job_directory(command.job)))
            self.namespace.abort_below(job_directory(command.job))
            return Done()

        return self._once(command, command.job, asked, forget)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _tell(self, effect: e.Effect) -> None:
        self._effects.append(effect)

    def _told(self, done: D, effect: e.Effect) -> D:
        """`done`, and the effect if it changed something."""
        if done.changed:
            self._tell(effect)
        return done

    def _once(self, command: c.Command, what: str, asked: _Asked, do: Callable[[], Done], *, since: int = 1) -> Done:
        """`do()`, or, when this very request did it before, the same answer. `since`: the machine version that brought this
        for the command; in an older one it is done each time."""
        if self.roster.machine_version < since:
            return do()
        kind = type(command).__name__
        if self._recent.answered(kind, what, asked.actor.name, asked.request):
            return Done(changed=False)
        done = do()
        self._recent.keep(kind, what, asked.actor.name, asked.request)
        return done

    def _remove(self, names: list[str]) -> None:
        for name, versions in self.namespace.remove(names):
            self._tell(e.FileDeleted(name, versions))
            self._unrefer(versions, name)

    def _unrefer(self, versions: Iterable[VersionRecord], name: str = "") -> None:
        """These versions are gone for good. `name`: theirs where it may be that of a job's file, which is in no trash."""
        for record in versions:
            self.references.remove(_blocks(record), _client(name, record.owner))


def _client(name: str, owner: str) -> str | None:
    """Whose eyes the file is for, None: everybody's."""
    return owner if job_of(name) is not None else None


def _blocks(record: VersionRecord) -> tuple[Block, ...]:
    """What a version refers to in block stores: a small content is not there."""
    return () if record.small else record.blocks


_APPLY: Final[dict[type[Any], Callable[[Machine, Any, _Asked], msgspec.Struct]]] = {
    c.Genesis: Machine._genesis,
    c.AddNode: Machine._add_node,
    c.UpdateNode: Machine._update_node,
    c.SetPresence: Machine._set_presence,
    c.RemoveNode: Machine._remove_node,
    c.RenewClusterKey: Machine._renew_cluster_key,
    c.RaiseVersion: Machine._raise_version,
    c.TakeDigest: Machine._take_digest,
    c.ConfirmDigest: Machine._confirm_digest,
    c.AddUser: Machine._add_user,
    c.RevokeUser: Machine._revoke_user,
    c.AddToken: Machine._add_token,
    c.RevokeToken: Machine._revoke_token,
    c.BeginPut: Machine._begin_put,
    c.CommitPut: Machine._commit_put,
    c.AbortPut: Machine._abort_put,
    c.PutSmall: Machine._put_small,
    c.DeleteFile: Machine._delete_file,
    c.Deploy: Machine._deploy,
    c.Undeploy: Machine._undeploy,
    c.Assign: Machine._assign,
    c.Unassign: Machine._unassign,
    c.ReportWorker: Machine._report_worker,
    c.SetBatchSize: Machine._set_batch_size,
    c.SubmitJob: Machine._submit_job,
    c.PlanJob: Machine._plan_job,
    c.CompleteTask: Machine._complete_task,
    c.FailAttempt: Machine._fail_attempt,
    c.CancelJob: Machine._cancel_job,
    c.ForgetJob: Machine._forget_job,
    c.SetRetention: Machine._set_retention,
    c.Expire: Machine._expire,
    c.RestoreTrash: Machine._restore_trash,
    c.Purge: Machine._purge,
}

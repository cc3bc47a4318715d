# idunno/coordinator/succession.py: a machine as a new cluster begins with it: another identity and roster, the same metadata.
#
# Rule 1: only for a machine that nobody else holds: what comes out is written as a snapshot that all first nodes begin with.
# Rule 2: nothing of the old identity is left: cluster id, key, tokens, users, certificates. Names of users stay in what they own.
# Rule 3: what waited for somebody who is gone ends: open puts always, unfinished jobs when the machine is an older one.
from __future__ import annotations

from dataclasses import dataclass

from idunno.base.ids import Index
from idunno.coordinator.ledger import FINISHED
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import NodeRecord, TokenRecord, UserRecord
from idunno.coordinator.roster import Roster, RosterState


@dataclass(frozen=True, slots=True)
class Founding:
    """What a new cluster begins with."""

    cluster: str
    cluster_key: bytes
    nodes: tuple[NodeRecord, ...]
    tokens: tuple[TokenRecord, ...]
    users: tuple[UserRecord, ...] = ()


def found_anew(machine: Machine, founding: Founding, *, jobs_go_on: bool) -> int:
    """Make `machine` the first state of the new cluster, one entry behind what it was. Returns how many jobs were cancelled."""
    old, now_ms = machine.roster, machine.now_ms
    machine.roster = Roster(
        RosterState(
            founding.cluster,
            founding.cluster_key,
            old.machine_version,
            founding.nodes,
            founding.users,
            founding.tokens,
        )
    )
    staying = {node.node for node in founding.nodes}
    workers = {worker.node for model in machine.registry.models() for worker in model.workers}
    for gone in sorted(workers - staying):
        machine.registry.remove_node(gone, old.name)
    for put in machine.namespace.open_puts():
        machine.namespace.abort(put.put)
    cancelled = 0
    if not jobs_go_on:
        for job in list(machine.ledger.jobs()):
            if job.state not in FINISHED:
                machine.ledger.cancel(job.job, "a restore from an older state", now_ms)
                cancelled += 1
    machine.index = Index(machine.index + 1)
    return cancelled


def what_is_there(machine: Machine) -> str:
    """What keeps a machine from being called empty, "" when it is."""
    versions = sum(1 for _ in machine.namespace.each())
    found = [
        (versions, "versions of files"),
        (machine.namespace.trash.versions, "versions in the trash"),
        (len(machine.registry.models()), "models"),
        (sum(1 for _ in machine.ledger.jobs()), "jobs"),
    ]
    return ", ".join(f"{count} {what}" for count, what in found if count)

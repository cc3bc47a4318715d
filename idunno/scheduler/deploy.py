# idunno/scheduler/deploy.py: which workers are to hold which model.
#
# Rule 1: eligible are the present nodes except the scheduler; with fewer than FEW_NODES present, the scheduler too.
# Rule 2: make before break: a worker that is no longer eligible keeps the model until enough eligible ones are ready.
# Rule 3: an absent worker is replaced by another eligible one. With none to replace it, it keeps its place while the model
#         is deployed (it comes back to it), and gives it up while others could make the model deployed.
# Rule 4: a worker that failed to set a version up is not chosen for it again, unless nobody else is left.
# Rule 5: commands are proposed one round at a time and decided anew after each: every one is right on its own.
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from idunno.base.ids import NodeId
from idunno.coordinator.commands import Assign, Unassign
from idunno.coordinator.records import ModelRecord, NodeRecord, WorkerRecord

FEW_NODES: Final = 5
"""design.md, section 1: from five nodes on, four are left to work when one only schedules."""
SCHEDULER_WORKS: Final = ("auto", "always", "never")


def eligible(nodes: Iterable[NodeRecord], scheduler: NodeId, setting: str) -> list[NodeId]:
    """Present nodes that may hold models, in roster order, the scheduler last. `setting`: one of SCHEDULER_WORKS."""
    present = [record.node for record in nodes if record.presence == "present"]
    works = setting == "always" or (setting == "auto" and len(present) < FEW_NODES)
    workers = [node for node in present if node != scheduler]
    return [*workers, scheduler] if works and scheduler in present else workers


def workers_wanted(wanted: int, workers_min: int, workers_max: int, able: int) -> int:
    """How many workers a model gets of `able` eligible ones: what was asked for, else all, within its bounds."""
    count = max(wanted or able, workers_min)
    return max(1, min(count, workers_max) if workers_max else count)


def first_workers(wanted: int, able: list[NodeId], load: Mapping[NodeId, int]) -> tuple[NodeId, ...]:
    """The workers of a new version: those that hold fewest models first. May be fewer than `wanted`, or none."""
    return tuple(sorted(able, key=lambda node: load.get(node, 0))[:wanted])


def model_load(models: Iterable[ModelRecord]) -> dict[NodeId, int]:
    """How many models every node is to hold."""
    load: dict[NodeId, int] = {}
    for record in models:
        for worker in record.workers:
            if worker.state != "failed":
                load[worker.node] = load.get(worker.node, 0) + 1
    return load


class _Workers(msgspec.Struct):
    """A model's workers by what they are good for."""

    active: list[WorkerRecord]  # eligible, assigned or ready
    leaving: list[WorkerRecord]  # present, but not eligible any more
    absent: list[WorkerRecord]
    failed: list[WorkerRecord]  # could not set it up, eligible


def changes(
    record: ModelRecord,
    able: list[NodeId],
    present: set[NodeId],
    load: Mapping[NodeId, int],
    name: Callable[[NodeId], str],
) -> list[Assign | Unassign]:
    """What to change now about who holds the model, with reasons; [] when all is well or nothing can be done.

    Args: `able`, the eligible nodes (`eligible`); `present`, all present ones; `load`, models a node; `name` for reasons.
    """
    if record.state == "failed":
        return []
    workers = _sort(record, able, present)
    wanted = workers_wanted(record.workers_wanted, record.workers_min, record.workers_max, len(able))
    known = {worker.node for worker in record.workers if worker.node in present}
    absent = {worker.node for worker in workers.absent}
    fresh = [node for node in first_workers(len(able), able, load) if node not in known and node not in absent]
    commands: list[Assign | Unassign] = []

    def assign(node: NodeId, why: str) -> None:
        commands.append(Assign(record.model, record.version, node, why))

    def unassign(worker: WorkerRecord, why: str) -> None:
        commands.append(Unassign(record.model, record.version, worker.node, why))

    have = len(workers.active)
    places = workers_wanted(record.workers_wanted, record.workers_min, record.workers_max, len(able) + len(absent))
    for worker in workers.absent:
        if have < wanted and fresh:
            node = fresh.pop(0)
            assign(node, f"{name(node)} replaces {name(worker.node)}, which is away")
            unassign(worker, f"away, replaced by {name(node)}")
            have += 1
        elif have >= places or (record.state == "undeployed" and have > 0):
            unassign(worker, f"away, {have} of {places} workers are there without it")
    while have < wanted and fresh:
        node = fresh.pop(0)
        assign(node, f"{have} of {wanted} workers are there, {name(node)} holds {load.get(node, 0)} models")
        have += 1
    if have == 0 and not workers.leaving and workers.failed:
        again = min(workers.failed, key=lambda worker: (worker.since_ms, worker.node))
        assign(again.node, f"tried again: no other worker is left; it said: {again.error}")
    ready = sum(1 for worker in workers.active if worker.state == "ready")
    if ready > 0 and ready >= min(wanted, have):
        for worker in workers.leaving:
            unassign(worker, f"{name(worker.node)} is the scheduler now, {ready} workers are ready without it")
    return commands


def _sort(record: ModelRecord, able: list[NodeId], present: set[NodeId]) -> _Workers:
    sorted_ = _Workers([], [], [], [])
    for worker in record.workers:
        if worker.node not in present:
            if worker.state != "failed":
                sorted_.absent.append(worker)
        elif worker.state == "failed":
            if worker.node in able:
                sorted_.failed.append(worker)
        elif worker.node in able:
            sorted_.active.append(worker)
        else:
            sorted_.leaving.append(worker)
    return sorted_

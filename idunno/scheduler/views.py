# idunno/scheduler/views.py: models and jobs as people see them, and what they wait for.
#
# Rule 1: pure: made of the machine, and of the dispatcher where this node leads. Elsewhere what only the leader knows is missing.
# Rule 2: a wait has a reason with its numbers; where nothing is waited for there is none.
from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Final

from idunno.base.ids import NodeId
from idunno.coordinator.ledger import FINISHED
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import JobRecord, ModelRecord, WorkerRecord
from idunno.coordinator.views import iso_time
from idunno.scheduler.dispatch import Dispatch
from idunno.scheduler.messages import JobInfo, ModelInfo, ModelWorker, TaskCounts
from idunno.scheduler.queues import PLAN

NAMES_SHOWN: Final = 8


class Work:
    """What the dispatcher's workers do, counted once for all the rows of an answer. Not to be held across awaits."""

    def __init__(self, machine: Machine, dispatch: Dispatch) -> None:
        leases = dispatch.leases.values()
        self.dispatch = dispatch
        self.leased = Counter(lease.head.job for lease in leases if lease.task != PLAN and not lease.ended)
        """Tasks of each job that are at workers; planning is none."""
        self.model_waits_for = cache(lambda model: model_waits_for(machine, machine.registry.get(model), dispatch))
        self.all_busy = cache(lambda model: _all_busy(dispatch, model))
        self.awaited = cache(lambda: _names(machine, dispatch.awaited))


def model_info(machine: Machine, record: ModelRecord) -> ModelInfo:
    return ModelInfo(
        model=record.model,
        version=record.version,
        state=record.state,
        workers=[
            ModelWorker(machine.roster.name(worker.node), _state(machine, worker), worker.error)
            for worker in sorted(record.workers, key=lambda w: machine.roster.name(w.node))
        ],
        batch_size=record.batch_size,
        weight=record.weight / 1000,
        runtime=record.runtime,
        reason=record.reason,
        failures=list(record.failures),
    )


def _state(machine: Machine, worker: WorkerRecord) -> str:
    """assigned | ready | failed, or away: it has a place, but its node is not present."""
    found = machine.roster.find(worker.node)
    away = found is None or found.presence != "present"
    return "away" if away and worker.state != "failed" else worker.state


def job_info(machine: Machine, record: JobRecord, work: Work | None, now_ms: int) -> JobInfo:
    """`work`: the leader's, None elsewhere; `now_ms`: machine time."""
    counts = machine.ledger.counts(record.job)
    finished = record.state in FINISHED
    waiting = min(counts.ready, work.leased[record.job]) if work is not None and not finished else 0
    return JobInfo(
        job=record.job,
        client=record.client,
        model=record.model,
        state=record.state,
        queries=record.queries,
        done=counts.done + counts.errors,
        errors=counts.errors,
        tasks=TaskCounts(counts.ready - waiting, waiting, counts.success, counts.failed),
        submitted=iso_time(record.submitted_ms),
        finished=iso_time(record.finished_ms) if finished else None,
        seconds=max(0, (record.finished_ms if finished else now_ms) - record.submitted_ms) / 1000,
        reason=record.reason if finished else job_waits_for(machine, record, work),
    )


def job_waits_for(machine: Machine, record: JobRecord, work: Work | None) -> str:
    """Why the job is not going on, or going on no faster; "" when nobody but its workers is waited for."""
    if record.state in FINISHED:
        return ""
    model = machine.registry.find(record.model)
    if model is None:
        return f"model {record.model} is not deployed any more"
    if work is None:
        return model_waits_for(machine, model, None) or ("planning" if record.state == "planning" else "")
    dispatch, leased = work.dispatch, work.leased[record.job]
    task = dispatch.leases.get((record.job, PLAN))
    if task is not None:
        return f"planning: {machine.roster.name(task.node)} counts the input's queries"
    ready = dispatch.queues.ready_of_job(record.job)
    if dispatch.recovering and ready:
        return f"recovering: the new scheduler waits for {work.awaited()} to say what they work on"
    if not leased and (why := work.model_waits_for(record.model)):
        return why
    if not ready:
        return "the end of a lost attempt is being written" if not leased and record.state == "running" else ""
    if busy := work.all_busy(record.model):
        return f"planning: {busy}" if record.state == "planning" else busy
    return "planning: counting the input's queries is next" if record.state == "planning" else ""


def _all_busy(dispatch: Dispatch, model: str) -> str:
    """That all workers of the model have as many tasks as they take, and of what others; "" when one has not."""
    able = [worker for worker in dispatch.workers.values() if model in worker.ready]
    if not able or any(len(worker.leases) < worker.slots for worker in able):
        return ""
    others = sorted({lease.head.model for worker in able for lease in worker.leases.values()} - {model})
    beside = f", also with {', '.join(others[:NAMES_SHOWN])}" if others else ""
    return f"all {len(able)} workers of {model} are busy{beside}"


def model_waits_for(machine: Machine, record: ModelRecord, dispatch: Dispatch | None) -> str:
    """Why the model does not serve now; "" when it does."""
    workers = sorted(record.workers, key=lambda w: machine.roster.name(w.node))
    ready = sum(1 for w in workers if w.state == "ready")
    if record.state != "deployed":
        unready = [worker for worker in workers if worker.state != "ready"]
        rows = [f"{machine.roster.name(w.node)}: {w.error or _word(machine, w.node, w.state)}" for w in unready]
        detail = "".join(f"; {row}" for row in rows[:NAMES_SHOWN]) or f"; {record.reason}"
        return f"model {record.model} is {record.state}: {ready} of {len(workers)} workers ready{detail}"
    if dispatch is not None and not any(record.model in w.ready for w in dispatch.workers.values()):
        rows = [
            f"{machine.roster.name(w.node)}: {w.error or _loading(machine, w.node, dispatch)}"
            for w in workers[:NAMES_SHOWN]
        ]
        return f"no worker has model {record.model} loaded: {'; '.join(rows) or 'none is assigned'}"
    return ""


def _word(machine: Machine, node: NodeId, state: str) -> str:
    found = machine.roster.find(node)
    if found is None or found.presence != "present":
        return f"away ({found.presence if found is not None else 'not in the roster'})"
    return "loading" if state == "assigned" else state


def _loading(machine: Machine, node: NodeId, dispatch: Dispatch) -> str:
    found = machine.roster.find(node)
    if found is None or found.presence != "present":
        return _word(machine, node, "")
    return "loading" if node in dispatch.workers else "has not polled this scheduler yet"


def _names(machine: Machine, nodes: frozenset[NodeId]) -> str:
    names = sorted(machine.roster.name(node) for node in nodes)
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    )

# idunno/scheduler/stats.py: the operator's questions: rates, times, assignments, and why.
from __future__ import annotations

from collections.abc import Callable

from idunno.base.errors import NotFound, NotLeader
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import NodeRecord
from idunno.coordinator.timing import mean_s, percentile_s, std_s
from idunno.coordinator.views import iso_time
from idunno.scheduler.cluster import Cluster, at_leader
from idunno.scheduler.dispatch import Dispatch
from idunno.scheduler.jobs import visible
from idunno.scheduler.leading import Leading
from idunno.scheduler.messages import (
    ASSIGNMENTS,
    EXPLAIN,
    RATES,
    TIMES,
    Assignments,
    ByModel,
    Decision,
    Explain,
    Explanation,
    ListAssignments,
    ModelRate,
    Rates,
    Times,
    WorkerRow,
)
from idunno.scheduler.paging import page
from idunno.scheduler.queues import PLAN
from idunno.scheduler.rates import RateWindow
from idunno.scheduler.views import Work, job_waits_for, model_info, model_waits_for
from idunno.wire.answering import left_s
from idunno.wire.calls import Actor, Call, Empty, Registrar


class StatsCalls:
    def __init__(
        self,
        cluster: Cluster,
        window: RateWindow,
        clock_ms: Callable[[], int],
        leading: Callable[[], Leading | None],
    ) -> None:
        self._cluster, self._window, self._clock_ms, self._leading = cluster, window, clock_ms, leading

    def register(self, registrar: Registrar) -> None:
        registrar.register(RATES, self.rates)
        registrar.register(TIMES, self.times)
        registrar.register(ASSIGNMENTS, self.assignments)
        registrar.register(EXPLAIN, self.explain)

    async def rates(self, call: Call[Empty]) -> Rates:
        machine = await self._cluster.read(left_s(call))
        rates = self._window.rates(self._clock_ms())
        rows = [
            ModelRate(
                model=record.model,
                rate=rates.get(record.model, 0.0),
                queries_done=machine.registry.queries_done(record.model),
                workers=sum(1 for worker in model_info(machine, record).workers if worker.state == "ready"),
                waiting=machine.ledger.unanswered(record.model),
            )
            for record in machine.registry.models()
        ]
        weights = {record.model: record.weight for record in machine.registry.models()}
        return Rates(rows, self._window.spread(weights, self._clock_ms()))

    async def times(self, call: Call[ByModel]) -> Times:
        machine = await self._cluster.read(left_s(call))
        record = machine.registry.get(call.request.model)
        timing = machine.registry.timing(record.model)
        return Times(
            model=record.model,
            count=timing.count,
            mean=mean_s(timing),
            std=std_s(timing),
            median=percentile_s(timing, 500),
            p90=percentile_s(timing, 900),
            p95=percentile_s(timing, 950),
            p99=percentile_s(timing, 990),
        )

    async def assignments(self, call: Call[ListAssignments]) -> Assignments:
        after = call.request.after

        async def here(timeout_s: float) -> Assignments:
            machine = await self._cluster.read(timeout_s)
            leading = self._lead()
            nodes = sorted((r for r in machine.roster.nodes() if r.name > after), key=lambda record: record.name)
            return Assignments(*page(self._row(machine, leading, record) for record in nodes))

        return await at_leader(self._cluster, self._leading() is not None, ASSIGNMENTS, call, here)

    def _row(self, machine: Machine, leading: Leading, record: NodeRecord) -> WorkerRow:
        worker = leading.dispatch.workers.get(record.node)
        task = since = None
        if worker is not None and worker.leases:
            lease = min(worker.leases.values(), key=lambda lease: lease.since_ms)
            task = f"{lease.head.job}/{'planning' if lease.task == PLAN else lease.task}"
            now_ms = self._clock_ms()
            since = iso_time(self._window.machine_ms(now_ms) - (now_ms - lease.since_ms))
        return WorkerRow(
            node=record.name,
            role="scheduler" if record.node == leading.me else "worker",
            models=sorted(worker.ready) if worker is not None else [],
            task=task,
            since=since,
            state="active" if record.presence == "present" else record.presence,
        )

    async def explain(self, call: Call[Explain]) -> Explanation:
        what, actor = call.request.what, call.actor

        async def here(timeout_s: float) -> Explanation:
            machine = await self._cluster.read(timeout_s)
            leading = self._lead()
            key, waits_for = subject(machine, leading.dispatch, what, actor)
            rows = [Decision(iso_time(d.at_ms), d.about, d.why) for d in leading.decisions.about(key)]
            return Explanation(what, waits_for, rows)

        return await at_leader(self._cluster, self._leading() is not None, EXPLAIN, call, here)

    def _lead(self) -> Leading:
        leading = self._leading()
        if leading is None:
            raise NotLeader("this node is not the scheduler (any more)")
        return leading


def subject(machine: Machine, dispatch: Dispatch, what: str, actor: Actor) -> tuple[str, str]:
    """The key of decisions about a job, model or node, and what it waits for. Raises NotFound, PermissionDenied."""
    if machine.ledger.find(what) is not None:
        record = visible(machine, what, actor)
        return what, job_waits_for(machine, record, Work(machine, dispatch)) or (
            record.reason if record.finished_ms else ""
        )
    model = machine.registry.find(what)
    if model is not None:
        return what, model_waits_for(machine, model, dispatch)
    try:
        node = machine.roster.resolve(what)
    except NotFound:
        raise NotFound(f"no job, model or node {what[:80]!r}; see `idunno jobs`, `models`, `members`") from None
    return node.node, node_waits_for(machine, dispatch, node)


def node_waits_for(machine: Machine, dispatch: Dispatch, node: NodeRecord) -> str:
    if node.presence != "present":
        return f"{node.name} is {node.presence} since {iso_time(node.since_ms)}: {node.reason}"
    worker = dispatch.workers.get(node.node)
    states = {
        model.model: assigned.state
        for model in machine.registry.models()
        for assigned in model.workers
        if assigned.node == node.node
    }
    if worker is None:
        return "it has not polled this scheduler" if states else "no model is assigned to it"
    loading = sorted(model for model, state in states.items() if state != "failed" and model not in worker.ready)
    if loading:
        return f"loading {', '.join(loading)}"
    if not worker.leases:
        ready = sum(dispatch.queues.ready_of_model(model) for model in worker.ready)
        failed = sorted(model for model, state in states.items() if state == "failed")
        if failed and not ready:
            return f"idle: it could not set up {', '.join(failed)}, see `idunno explain {failed[0]}`"
        return "idle: no task of its models is ready" if not ready else f"{ready} tasks are ready for its next poll"
    return ""

# idunno/coordinator/registry.py: the models: versions, settings, the workers assigned to them, and whether they serve.
#
# Rule 1: whether a model serves is one function of its record (`judge`), called after every change of its workers.
# Rule 2: a model's versions rise for ever, also across undeploy: workers cache by (model, version).
# Rule 3: a deploy replaces the record at once. Until its workers are ready new jobs are refused with that reason, unfinished
#         ones wait and go on with the new version.
# Rule 4: every method either raises and has changed nothing, or has done all of it.
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import msgspec

from idunno.base.errors import Conflict, Exhausted, InvalidArgument, NotFound, NotReady
from idunno.base.ids import NodeId, check_label
from idunno.coordinator.commands import Deploy
from idunno.coordinator.namespace import Namespace
from idunno.coordinator.records import ModelRecord, Record, Timing, WorkerRecord
from idunno.coordinator.results import Done, ModelResult
from idunno.coordinator.rows import Row
from idunno.coordinator.timing import TimingTotal

MODELS_MAX: Final = 10_000
MODEL_FILES_MAX: Final = 1_000
FAILURES_KEPT: Final = 16
FAILURES_ALLOWED: Final = 3
"""So many workers may fail to set a model up before it is called failed (design.md, section 8)."""
DEPLOYS_REMEMBERED: Final = 8
BATCH_SIZE_MAX: Final = 1_000_000
WEIGHT_MAX: Final = 1_000_000  # thousandths: a thousand times the default
ERROR_MAX: Final = 1_000  # characters kept of a model's own message
RUNTIMES: Final = ("onnx",)
NameOf: TypeAlias = Callable[[NodeId], str]


class Deployed(Record, frozen=True):
    request: str
    version: int


class ModelState(Record, frozen=True):
    """A model that is there (`record`), or what is remembered of one that was undeployed."""

    model: str
    last: int  # the highest version given so far
    record: ModelRecord | None = None
    deploys: tuple[Deployed, ...] = ()  # the last requests: a retry finds its version
    queries_done: int = 0
    timing: Timing = Timing()


class RegistryState(Record, frozen=True):
    models: tuple[ModelState, ...] = ()  # in the order of their first deploy


class _Model:
    __slots__ = ("deploys", "last", "queries_done", "record", "timing")

    def __init__(self, state: ModelState) -> None:
        self.last, self.record, self.deploys = state.last, state.record, state.deploys
        self.queries_done, self.timing = state.queries_done, TimingTotal(state.timing)


class Registry:
    def __init__(self, state: RegistryState | None = None) -> None:
        models = state.models if state is not None else ()
        self._models = {model.model: _Model(model) for model in models}

    def state(self) -> RegistryState:
        return RegistryState(
            tuple(
                ModelState(name, m.last, m.record, m.deploys, m.queries_done, m.timing.record())
                for name, m in self._models.items()
            )
        )

    def capture(self) -> Iterator[Row]:
        """Rows for a snapshot, as things are now."""
        return _rows(self.state().models)

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, model: str) -> ModelRecord | None:
        held = self._models.get(model)
        return held.record if held is not None else None

    def get(self, model: str) -> ModelRecord:
        """Raises NotFound."""
        record = self.find(model)
        if record is None:
            raise NotFound(f"no model {model[:80]!r}; see `idunno models`")
        return record

    def serving(self, model: str) -> ModelRecord:
        """The model if inference on it is possible now. Raises NotFound, and NotReady with its state and the reason."""
        record = self.get(model)
        if record.state != "deployed":
            raise NotReady(f"model {model} is {record.state}: {record.reason}; see `idunno models`")
        return record

    def models(self) -> list[ModelRecord]:
        """By name."""
        return [m.record for _, m in sorted(self._models.items()) if m.record is not None]

    def each(self) -> Iterator[ModelRecord]:
        """In the order of their first deploy."""
        return (m.record for m in self._models.values() if m.record is not None)

    def queries_done(self, model: str) -> int:
        """Queries answered by all versions of the model, since its first deploy."""
        held = self._models.get(model)
        return held.queries_done if held is not None else 0

    def timing(self, model: str) -> Timing:
        """Processing times over all versions of the model."""
        held = self._models.get(model)
        return held.timing.record() if held is not None else Timing()

    # -- deploying ----------------------------------------------------------------------------------------------------

    def deploy(
        self, command: Deploy, owner: str, request: str, name_of: NameOf, namespace: Namespace, now_ms: int
    ) -> ModelResult:
        """A new version. `name_of`: what people call a node."""
        held = self._models.get(command.model)
        if held is not None and request:
            for before in held.deploys:
                if before.request == request:
                    now = held.record if held.record is not None and held.record.version == before.version else None
                    state = now.state if now is not None else "replaced"
                    return ModelResult(command.model, before.version, state, changed=False)
        check_label("model", command.model)
        _check_settings(command)
        _check_files(command, namespace)
        if held is None:
            if len(self._models) >= MODELS_MAX:
                raise Exhausted(f"the registry knows {MODELS_MAX} models, undeployed ones included, its bound")
            held = self._models[command.model] = _Model(ModelState(command.model, 0))
        held.last += 1
        if request:
            held.deploys = (*held.deploys, Deployed(request, held.last))[-DEPLOYS_REMEMBERED:]
        workers = tuple(WorkerRecord(node, "assigned", now_ms) for node in dict.fromkeys(command.assign))
        held.record = judge(
            ModelRecord(
                model=command.model,
                version=held.last,
                owner=owner,
                runtime=command.runtime,
                files=command.files,
                workers_wanted=command.workers_wanted,
                batch_size=command.batch_size,
                weight=command.weight,
                workers_min=command.workers_min,
                workers_max=command.workers_max,
                state="undeployed",
                created_ms=now_ms,
                request=request,
                workers=workers,
            ),
            name_of,
        )
        return ModelResult(command.model, held.last, held.record.state)

    def undeploy(self, model: str) -> Done:
        self.get(model)
        self._models[model].record = None
        return Done()

    def set_batch_size(self, model: str, batch_size: int) -> Done:
        record = self.get(model)
        _check_range("batch size", batch_size, 0, BATCH_SIZE_MAX)
        if record.batch_size == batch_size:
            return Done(changed=False)
        self._models[model].record = msgspec.structs.replace(record, batch_size=batch_size)
        return Done()

    # -- workers ------------------------------------------------------------------------------------------------------

    def assign(self, model: str, version: int, node: NodeId, name_of: NameOf, now_ms: int) -> Done:
        """Idempotent; a worker that failed is tried again. Only the current version has workers."""
        record = self._current(model, version)
        if record is None or any(w.node == node and w.state != "failed" for w in record.workers):
            return Done(changed=False)
        others = tuple(w for w in record.workers if w.node != node)
        self._put(msgspec.structs.replace(record, workers=(*others, WorkerRecord(node, "assigned", now_ms))), name_of)
        return Done()

    def unassign(self, model: str, version: int, node: NodeId, reason: str, name_of: NameOf) -> Done:
        record = self._current(model, version)
        if record is None or all(w.node != node for w in record.workers):
            return Done(changed=False)
        others = tuple(w for w in record.workers if w.node != node)
        self._put(
            msgspec.structs.replace(record, workers=others), name_of, lost=f"{name_of(node)}: {reason[:ERROR_MAX]}"
        )
        return Done()

    def remove_node(self, node: NodeId, name_of: NameOf) -> list[str]:
        """It is no worker any more; returns the models that it was one of."""
        models = [record.model for record in self.each() if any(w.node == node for w in record.workers)]
        for model in models:
            self.unassign(model, self.get(model).version, node, "it left the cluster", name_of)
        return models

    def report(self, model: str, version: int, node: NodeId, error: str, name_of: NameOf, now_ms: int) -> ModelResult:
        """A worker is ready, or failed. Said of another version, or by a node that is not assigned, it changes nothing."""
        record = self._current(model, version)
        state = "failed" if error else "ready"
        old = next((w for w in record.workers if w.node == node), None) if record is not None else None
        if record is None or old is None or old.state == state:
            there = self.find(model)
            return ModelResult(model, version, there.state if there is not None else "undeployed", changed=False)
        new = WorkerRecord(node, state, now_ms, error[:ERROR_MAX])
        record = msgspec.structs.replace(record, workers=tuple(new if w.node == node else w for w in record.workers))
        if error:
            line = f"{name_of(node)}: {error[:ERROR_MAX]}"
            record = msgspec.structs.replace(record, failures=(*record.failures, line)[-FAILURES_KEPT:])
        self._put(record, name_of, lost=f"{name_of(node)}: {error[:ERROR_MAX]}")
        return ModelResult(model, version, self.get(model).state)

    def count_queries(self, model: str, queries: int, timing: Timing) -> None:
        held = self._models.get(model)
        if held is not None:
            held.queries_done += queries
            held.timing.add(timing)

    def _current(self, model: str, version: int) -> ModelRecord | None:
        record = self.find(model)
        return record if record is not None and record.version == version else None

    def _put(self, record: ModelRecord, name_of: NameOf, lost: str = "") -> None:
        self._models[record.model].record = judge(record, name_of, lost)


def judge(record: ModelRecord, name_of: NameOf, lost: str = "") -> ModelRecord:
    """The record with the state and reason that follow from its workers. `lost`: why it has one ready worker less, if so.

    deployed: some worker is ready, and none is still being set up or the model served before.
    failed: none is ready, and FAILURES_ALLOWED setups failed since it last served.
    undeployed: otherwise. A worker that failed is waited for no longer; the scheduler replaces it.
    """
    ready = any(w.state == "ready" for w in record.workers)
    pending = [name_of(w.node) for w in record.workers if w.state == "assigned"]
    if ready and (not pending or record.state == "deployed"):
        return msgspec.structs.replace(record, state="deployed", reason="", failures=())
    failed = len(record.failures)
    if not ready and failed >= FAILURES_ALLOWED:
        reason = f"{failed} workers could not set it up: {'; '.join(record.failures)}"
        return msgspec.structs.replace(record, state="failed", reason=reason)
    if pending:
        reason = f"waiting for {', '.join(pending)} to set it up"
    elif failed:
        reason = f"could not be set up ({record.failures[-1]}), another worker is being looked for"
    elif lost:
        reason = f"its last worker is gone ({lost}), another is being looked for"
    else:
        reason = record.reason or "no worker is assigned yet"
    return msgspec.structs.replace(record, state="undeployed", reason=reason)


def _rows(models: tuple[ModelState, ...]) -> Iterator[Row]:
    yield "registry", RegistryState(), 1
    for model in models:
        files = model.record.files if model.record is not None else ()
        yield "model", model, 10 + sum(1 + len(file.blocks) for file in files)


def _check_settings(command: Deploy) -> None:
    if command.runtime not in RUNTIMES:
        raise InvalidArgument(f"no runtime {command.runtime[:40]!r}: there is {', '.join(RUNTIMES)}")
    _check_range("workers", command.workers_wanted, 0, 10_000)
    _check_range("batch size", command.batch_size, 0, BATCH_SIZE_MAX)
    _check_range("weight in thousandths", command.weight, 1, WEIGHT_MAX)
    _check_range("least workers", command.workers_min, 0, 10_000)
    _check_range("most workers", command.workers_max, 0, 10_000)
    if command.workers_max and command.workers_min > command.workers_max:
        raise InvalidArgument(
            f"at least {command.workers_min} and at most {command.workers_max} workers cannot both hold"
        )


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidArgument(f"{what} is {value}: {low} to {high} is possible")


def _check_files(command: Deploy, namespace: Namespace) -> None:
    if not 1 <= len(command.files) <= MODEL_FILES_MAX:
        raise InvalidArgument(f"a model has 1 to {MODEL_FILES_MAX} files, {command.model} has {len(command.files)}")
    if len({file.path for file in command.files}) != len(command.files):
        raise InvalidArgument(f"two files of model {command.model} have the same path")
    for file in command.files:
        stored = namespace.version(file.name, file.version)
        if stored.blocks != file.blocks or stored.size != file.size:
            raise Conflict(
                f"{file.name} version {file.version} does not hold the blocks that the deploy of {command.model} names"
            )

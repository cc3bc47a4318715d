# idunno/scheduler/assigned.py: which models each node is to hold. A change of one model costs its workers, not all models.
#
# Rule 1: a worker is told all its models in one answer, so it never takes a part for the whole. What does not fit is told without
#         its files, which the worker asks for: those of one version never change, so it does not matter when, or whom.
from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
from blake3 import blake3

from idunno.base.ids import NodeId
from idunno.coordinator.records import ModelRecord
from idunno.scheduler.messages import Assignment

TOLD_BYTES_MAX: Final = 512 * 1024
"""Of a node's assignments: half of an answer, the leases are in it too."""


class _Row(msgspec.Struct, frozen=True):
    assignment: Assignment
    bare: Assignment  # without files
    size: int  # bytes of `assignment` in an answer
    bare_size: int
    mark: tuple[str, int, int]  # model, version, since when its report is awaited


class Assigned:
    def __init__(self, models: Iterable[ModelRecord]) -> None:
        self._rows: dict[NodeId, dict[str, _Row]] = {}
        self._workers: dict[str, list[NodeId]] = {}  # of each model
        self._told: dict[NodeId, tuple[int, list[Assignment]]] = {}  # what `of` answers, until it changes
        for record in models:
            self.changed(record.model, record)

    def changed(self, model: str, record: ModelRecord | None) -> None:
        """The model's record as it is now; None: it is gone."""
        now = {} if record is None else _rows(record)
        for node in self._workers.pop(model, ()):
            if node not in now:
                del self._rows[node][model]
                self._told.pop(node, None)
        for node, row in now.items():
            rows = self._rows.setdefault(node, {})
            was = rows.get(model)
            rows[model] = row
            if was is None or was.mark != row.mark:
                self._told.pop(node, None)
        if now:
            self._workers[model] = list(now)

    def of(self, node: NodeId) -> tuple[int, list[Assignment]]:
        """A number that stands for what `node` is to hold, the same under every leader; and that itself, by name."""
        told = self._told.get(node)
        if told is None:
            rows = [row for _, row in sorted(self._rows.get(node, {}).items())]
            digest = blake3(msgspec.msgpack.encode([row.mark for row in rows])).digest(length=6)
            told = self._told[node] = (int.from_bytes(digest, "big") + 1, _fitting(rows))
        return told

    def load(self) -> dict[NodeId, int]:
        """How many models every node is to hold."""
        return {node: len(rows) for node, rows in self._rows.items()}


def _fitting(rows: list[_Row]) -> list[Assignment]:
    """All of them, with their files as far as TOLD_BYTES_MAX goes."""
    left_bytes = TOLD_BYTES_MAX - sum(row.bare_size for row in rows)
    told: list[Assignment] = []
    for row in rows:
        more_bytes = row.size - row.bare_size
        if more_bytes <= left_bytes:
            left_bytes -= more_bytes
            told.append(row.assignment)
        else:
            told.append(row.bare)
    return told


def _rows(record: ModelRecord) -> dict[NodeId, _Row]:
    assignment = Assignment(record.model, record.version, record.runtime, list(record.files))
    bare = msgspec.structs.replace(assignment, files=[])
    size, bare_size = len(msgspec.msgpack.encode(assignment)), len(msgspec.msgpack.encode(bare))

    def row(since_ms: int) -> _Row:
        return _Row(assignment, bare, size, bare_size, (record.model, record.version, since_ms))

    ready = row(0)
    rows: dict[NodeId, _Row] = {}
    for worker in record.workers:
        if worker.state == "assigned":
            # It waits for a report, so it is a new one each time it is made, also to who holds the model from before:
            # unassigned and assigned again between two polls, it must report again.
            rows[worker.node] = row(worker.since_ms)
        elif worker.state != "failed":
            rows[worker.node] = ready
    return rows

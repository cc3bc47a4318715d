# idunno/coordinator/recent.py: the answers of requests that removed or set something.
#
# Rule 1: what a request made stores the request's id with the thing made. What a request removed or set leaves no such place: it
#         is kept here, so that a retry gets its answer again instead of "not found", and undoes nothing that came since.
# Rule 2: bounded; the oldest goes first. A retry comes within its caller's deadline, not ten thousand removals later.
from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from idunno.coordinator.records import Record
from idunno.coordinator.rows import Row

ANSWERS_KEPT: Final = 10_000


class RecentState(Record, frozen=True):
    answered: tuple[str, ...] = ()  # oldest first


class Recent:
    def __init__(self, state: RecentState | None = None) -> None:
        self._answered: dict[str, None] = dict.fromkeys(state.answered if state is not None else ())

    def answered(self, kind: str, what: str, actor: str, request: str) -> bool:
        """Whether this very request of this actor removed `what` already. A request without an id is never found."""
        return request != "" and _key(kind, what, actor, request) in self._answered

    def keep(self, kind: str, what: str, actor: str, request: str) -> None:
        if request == "":
            return
        self._answered[_key(kind, what, actor, request)] = None
        if len(self._answered) > ANSWERS_KEPT:
            del self._answered[next(iter(self._answered))]

    def state(self) -> RecentState:
        return RecentState(tuple(self._answered))

    def capture(self) -> Iterator[Row]:
        """Rows for a snapshot, as things are now."""
        return _rows(tuple(self._answered))


def _rows(answered: tuple[str, ...]) -> Iterator[Row]:
    yield "recent", RecentState(), 1
    for key in answered:
        yield "answered", key, 1


def _key(kind: str, what: str, actor: str, request: str) -> str:
    return "\n".join((kind, what, actor, request))

# idunno/membership/farewell.py: how a member tells the others that it stops or leaves.
#
# Rule 1: a few are told directly, again after each `retry_ms` until they answer; gossip does the rest.
# Rule 2: it is over when all of them have answered, at the latest after `announce_ms`: an exit must not hang on dead members.
from __future__ import annotations

import random

from idunno.base.ids import NodeId
from idunno.membership.book import Book
from idunno.membership.config import SwimConfig
from idunno.membership.events import Announced, Output
from idunno.membership.messages import State
from idunno.membership.voice import Voice


class Farewell:
    def __init__(self, config: SwimConfig, rng: random.Random, book: Book, voice: Voice) -> None:
        self._config, self._rng, self._book, self._voice = config, rng, book, voice
        self.told: dict[NodeId, bool] = {}  # who was told -> whether it has answered
        self._seq = 0
        self._retell_ms = 0
        self._end_ms: int | None = None

    @property
    def is_under_way(self) -> bool:
        return self._end_ms is not None

    def due_ms(self) -> int | None:
        return None if self._end_ms is None else min(self._retell_ms, self._end_ms)

    def begin(self, state: State, seq: int, now_ms: int, out: list[Output]) -> None:
        """`seq`: of the pings that tell it; an Ack of this `seq` is an answer."""
        if state not in (State.STOPPED, State.LEFT):
            raise AssertionError(f"{state.value} is nothing a member announces of itself")
        book = self._book
        book.state, self._seq = state, seq
        alive = [n for n in book.alive.draw(self._rng, len(book.members)) if book.members[n].state is State.ACTIVE]
        self.told = dict.fromkeys(alive[: self._config.announce_members], False)
        self._end_ms = now_ms + self._config.announce_ms
        self._tell(now_ms, out)
        self._end_if_done(out)

    def tick(self, now_ms: int, out: list[Output]) -> None:
        assert self._end_ms is not None
        if now_ms >= self._end_ms:
            self._end(out)
        elif now_ms >= self._retell_ms:
            self._tell(now_ms, out)

    def acked(self, node: NodeId, seq: int, out: list[Output]) -> None:
        if seq == self._seq and node in self.told:
            self.told[node] = True
            self._end_if_done(out)

    def forget(self, node: NodeId) -> None:
        self.told.pop(node, None)

    def _tell(self, now_ms: int, out: list[Output]) -> None:
        self._retell_ms = now_ms + self._config.retry_ms
        silent = [node for node, answered in self.told.items() if not answered]
        out += [self._voice.ping(self._book.members[node], self._seq) for node in silent]

    def _end_if_done(self, out: list[Output]) -> None:
        if self._end_ms is not None and all(self.told.values()):
            self._end(out)

    def _end(self, out: list[Output]) -> None:
        out.append(Announced(len(self.told), sum(self.told.values())))
        self._end_ms = None

# idunno/scheduler/explain.py: the last decisions about every model, job and node, with their reasons.
#
# Rule 1: who decides records why, in a sentence with the numbers that decided. Soft state of the leader: a new leader begins
#         empty and says so.
# Rule 2: bounded: ABOUT_MAX subjects (the least recently decided about is forgotten), DECISIONS_KEPT for each.
from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

import msgspec

ABOUT_MAX: Final = 2_000
DECISIONS_KEPT: Final = 20
"""What fits a screen; a decision is about 200 bytes, so all of it stays below 10 MB."""


class Decided(msgspec.Struct, frozen=True):
    at_ms: int  # wall clock of the leader: for people
    about: str
    why: str


class Decisions:
    def __init__(self) -> None:
        self._about: OrderedDict[str, deque[Decided]] = OrderedDict()

    def record(self, at_ms: int, why: str, *about: str) -> None:
        """`why` was decided, about each of `about` (a model's name, a job's or a node's id)."""
        decided = Decided(at_ms, " ".join(about), why)
        for key in about:
            kept = self._about.get(key)
            if kept is None:
                kept = self._about[key] = deque(maxlen=DECISIONS_KEPT)
                if len(self._about) > ABOUT_MAX:
                    self._about.popitem(last=False)
            else:
                self._about.move_to_end(key)
            if not kept or kept[-1].why != why:  # the same verdict again is no news
                kept.append(decided)

    def about(self, key: str) -> list[Decided]:
        """The last decisions about `key`, newest first."""
        return list(reversed(self._about.get(key, ())))

    def __len__(self) -> int:
        return len(self._about)

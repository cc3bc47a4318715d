# idunno/scheduler/fairness.py: who goes first, so that queries per second and weight come out equal.
#
# Rule 1: virtual time. What is served advances its key's time by queries / weight; the key furthest behind goes first.
#         Queries are counted, not tasks and not seconds: a model whose query costs 50 times more gets 50 times more machine.
# Rule 2: credit is not hoarded. Who was idle comes back at the current virtual time (start-time fair queueing, Goyal et
#         al. 1996, section 2), and who could not be served lags at most CREDIT_GRAINS of its own or others' tasks.
# Rule 3: the same clock shares between models (weights) and, within a model, between clients (weight 1).
# Rule 4: who is first, furthest ahead, and the largest grain are at the ends of sorted lists: a task costs a search in them, not
#         a look at every key.
from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

import msgspec

K = TypeVar("K", bound=str)

WEIGHT_ONE: Final = 1_000
"""Weights are whole thousandths, as in the registry."""
CREDIT_GRAINS: Final = 2
"""The largest lag that choosing the least by itself makes is one task; two leave room for one that was given back."""
IDLE_KEPT_MAX: Final = 256
"""Idle keys whose debt is remembered; beyond it the smallest debts are forgotten (each is about one task)."""


class _Share(msgspec.Struct):
    time: float = 0.0  # virtual: queries per weight 1
    weight: int = WEIGHT_ONE
    grain: float = 0.0  # what the last task advanced it by
    active: bool = False


class FairClock(Generic[K]):
    """Virtual times of competing keys. All soft state: a new one begins with everybody equal."""

    def __init__(self) -> None:
        self._shares: dict[K, _Share] = {}
        self._order: list[tuple[float, K]] = []  # of the active keys, the one furthest behind first
        self._grains: list[float] = []  # of the active keys, rising
        self._idle = 0
        self._floor = 0.0  # the virtual time of the system: never goes back

    def __len__(self) -> int:
        """How many keys are active."""
        return len(self._order)

    def time(self, key: K) -> float:
        share = self._shares.get(key)
        return share.time if share is not None else self._floor

    def wake(self, key: K, weight: int = WEIGHT_ONE) -> None:
        """`key` has work from now on (or has another weight). One that was idle joins at the current virtual time."""
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = _Share()
            self._idle += 1
        share.weight = max(1, weight)
        if not share.active:
            self._raise_floor()
            share.time = max(share.time, self._floor)
            share.active = True
            self._idle -= 1
            self._enter(key, share)

    def rest(self, key: K) -> None:
        """`key` has no work now. What it was served beyond its share stays on its account."""
        share = self._shares.get(key)
        if share is None or not share.active:
            return
        self._raise_floor()
        self._leave(key, share)
        share.active = False
        self._idle += 1
        if self._idle > IDLE_KEPT_MAX:
            self._prune()

    def charge(self, key: K, queries: int) -> None:
        """`queries` were handed out for `key`."""
        share = self._shares.get(key)
        if share is None:
            return
        grain = queries * WEIGHT_ONE / share.weight
        self._set(key, share, share.time + grain, grain)
        self._raise_floor()

    def refund(self, key: K, queries: int) -> None:
        """`queries` that were charged come back unanswered."""
        share = self._shares.get(key)
        if share is not None:
            self._set(key, share, share.time - queries * WEIGHT_ONE / share.weight, share.grain)

    def first(self) -> K:
        """The active key furthest behind; of equal ones the first by name, so that it is always the same. One must be active."""
        self._cap_credit()
        return self._order[0][1]

    def order(self) -> list[K]:
        """The active keys, the one furthest behind first; equal ones by name."""
        self._cap_credit()
        return [key for _, key in self._order]

    def lag(self, key: K) -> float:
        """Queries per weight that `key` is behind the active key that is furthest ahead. 0 when it is that one."""
        return max(0.0, self._order[-1][0] - self.time(key)) if self._order else 0.0

    def _set(self, key: K, share: _Share, time: float, grain: float) -> None:
        if share.active:
            self._leave(key, share)
        share.time, share.grain = time, grain
        if share.active:
            self._enter(key, share)

    def _enter(self, key: K, share: _Share) -> None:
        insort(self._order, (share.time, key))
        insort(self._grains, share.grain)

    def _leave(self, key: K, share: _Share) -> None:
        del self._order[bisect_left(self._order, (share.time, key))]
        del self._grains[bisect_left(self._grains, share.grain)]

    def _raise_floor(self) -> None:
        if self._order:
            self._floor = max(self._floor, self._order[0][0])

    def _cap_credit(self) -> None:
        if len(self._order) < 2:
            return
        least = self._order[-1][0] - CREDIT_GRAINS * self._grains[-1]
        late = 0  # how many are behind even that: rarely any
        while self._order[late][0] < least:
            key = self._order[late][1]
            self._order[late] = (least, key)
            self._shares[key].time = least
            late += 1
        if late:
            self._order.sort()

    def _prune(self) -> None:
        idle: Iterable[tuple[float, K]] = sorted((s.time, k) for k, s in self._shares.items() if not s.active)
        for position, (time, key) in enumerate(idle):
            if time <= self._floor or position < IDLE_KEPT_MAX // 2:
                del self._shares[key]
                self._idle -= 1

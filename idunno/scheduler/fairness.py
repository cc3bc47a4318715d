# idunno/scheduler/fairness.py: who goes first, so that queries per second and weight come out equal.
#
# Rule 1: virtual time. What is served advances its key's time by queries / weight; the key furthest behind goes first.
#         Queries are counted, not tasks and not seconds: a model whose query costs 50 times more gets 50 times more machine.
# Rule 2: credit is not hoarded. Who was idle comes back at the current virtual time (start-time fair queueing, Goyal et
#         al. 1996, section 2), and who could not be served lags at most CREDIT_GRAINS of its own or others' tasks.
# Rule 3: the same clock shares between models (weights) and, within a model, between clients (weight 1).
from __future__ import annotations

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
        self._active: set[K] = set()
        self._idle = 0
        self._floor = 0.0  # the virtual time of the system: never goes back

    @property
    def active(self) -> frozenset[K]:
        return frozenset(self._active)

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
            self._active.add(key)

    def rest(self, key: K) -> None:
        """`key` has no work now. What it was served beyond its share stays on its account."""
        share = self._shares.get(key)
        if share is None or not share.active:
            return
        self._raise_floor()
        share.active = False
        self._active.discard(key)
        self._idle += 1
        if self._idle > IDLE_KEPT_MAX:
            self._prune()

    def charge(self, key: K, queries: int) -> None:
        """`queries` were handed out for `key`."""
        share = self._shares.get(key)
        if share is None:
            return
        share.grain = queries * WEIGHT_ONE / share.weight
        share.time += share.grain
        self._raise_floor()

    def refund(self, key: K, queries: int) -> None:
        """`queries` that were charged come back unanswered."""
        share = self._shares.get(key)
        if share is not None:
            share.time -= queries * WEIGHT_ONE / share.weight

    def order(self) -> list[K]:
        """The active keys, the one furthest behind first; equal ones by name, so that the order is always the same."""
        self._cap_credit()
        return sorted(self._active, key=lambda key: (self._shares[key].time, key))

    def lag(self, key: K) -> float:
        """Queries per weight that `key` is behind the active key that is furthest ahead. 0 when it is that one."""
        if not self._active:
            return 0.0
        return max(0.0, max(self._shares[k].time for k in self._active) - self.time(key))

    def _raise_floor(self) -> None:
        if self._active:
            self._floor = max(self._floor, min(self._shares[key].time for key in self._active))

    def _cap_credit(self) -> None:
        if len(self._active) < 2:
            return
        shares = [self._shares[key] for key in self._active]
        least = max(s.time for s in shares) - CREDIT_GRAINS * max(s.grain for s in shares)
        for share in shares:
            share.time = max(share.time, least)

    def _prune(self) -> None:
        idle: Iterable[tuple[float, K]] = sorted((s.time, k) for k, s in self._shares.items() if not s.active)
        for position, (time, key) in enumerate(idle):
            if time <= self._floor or position < IDLE_KEPT_MAX // 2:
                del self._shares[key]
                self._idle -= 1

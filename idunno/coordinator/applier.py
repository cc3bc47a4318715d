# idunno/coordinator/applier.py: hands committed entries to the machine, and what they meant to whoever follows it.
#
# Rule 1: the machine comes first: followers are told when the entry is applied, in the order of the log, and cannot refuse it.
# Rule 2: a follower's error is a bug of the follower. It is logged with its story; the log goes on, or one bad listener would
#         stop the node's whole machine.
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

from idunno.base.ids import Index
from idunno.coordinator.effects import Effect
from idunno.coordinator.machine import Applied, Machine

log = logging.getLogger("idunno.coordinator")

Follower: TypeAlias = Callable[[Index, Effect], None]


class Applier:
    """The driver's `apply`: Applier(machine)(index, payload)."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._followers: list[Follower] = []

    def subscribe(self, follower: Follower) -> None:
        """Tell `follower(index, effect)` every effect from now on. It must not block; what takes time it queues, bounded."""
        self._followers.append(follower)

    def __call__(self, index: Index, payload: bytes) -> Applied:
        """Raises DecodeError or Incompatible for an entry this version does not know: then nothing more may be applied."""
        applied = self.machine.apply(index, payload)
        for effect in applied.effects:
            for follower in self._followers:
                try:
                    follower(index, effect)
                except Exception:
                    log.exception("follower failed", extra={"index": index, "effect": type(effect).__name__})
        return applied

# idunno/coordinator/applier.py: hands committed entries to the machine, and what they meant to whoever follows it.
#
# Rule 1: the machine comes first: followers are told when the entry is applied, in the order of the log, and cannot refuse it.
# Rule 2: a follower's error is a bug of the follower. It is logged with its story; the log goes on, or one bad listener would
#         stop the node's whole machine.
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeAlias, get_args

from idunno.base.errors import Incompatible
from idunno.base.ids import Index
from idunno.coordinator.effects import Effect, JobsReplaced, ModelChanged, RosterChanged
from idunno.coordinator.machine import Applied, Machine

log = logging.getLogger("idunno.coordinator")

Follower: TypeAlias = Callable[[Index, Effect], None]


class Applier:
    """The driver's `apply`: Applier(machine)(index, payload)."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._followers: dict[type[Effect], list[Follower]] = {kind: [] for kind in get_args(Effect)}
        self.refused = ""
        """Why nothing more is to be applied."""

    def subscribe(self, follower: Follower, *kinds: type[Effect]) -> None:
        """Tell `follower(index, effect)` every effect of these kinds (none given: of all) from now on. It must not block; what
        takes time it queues, bounded."""
        for kind in kinds or self._followers:
            self._followers[kind].append(follower)

    def __call__(self, index: Index, payload: bytes) -> Applied:
        """Raises DecodeError or Incompatible for an entry this version does not know: then nothing more may be applied."""
        if self.refused:
            raise Incompatible(self.refused)
        applied = self.machine.apply(index, payload)
        self._tell(index, applied.effects)
        return applied

    def replace(self, machine: Machine) -> Machine:
        """A snapshot's machine takes the place of this one: followers look at all that they follow anew. Returns the old one."""
        models = {model.model: None for model in [*self.machine.registry.models(), *machine.registry.models()]}
        was = self.machine.become(machine)
        self._tell(machine.index, [RosterChanged(), *(ModelChanged(model) for model in models), JobsReplaced()])
        return was

    def _tell(self, index: Index, effects: Iterable[Effect]) -> None:
        for effect in effects:
            for follower in self._followers[type(effect)]:
                try:
                    follower(index, effect)
                except Exception:
                    log.exception("follower failed", extra={"index": index, "effect": type(effect).__name__})

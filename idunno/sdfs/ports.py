# idunno/sdfs/ports.py: what the file store needs of the coordinator (coordinator/client.py has it).
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from idunno.base.ids import NodeId, Term
from idunno.coordinator.commands import Command
from idunno.coordinator.machine import Machine
from idunno.wire.calls import Actor


class Leadership(Protocol):
    @property
    def leader(self) -> NodeId | None: ...

    @property
    def term(self) -> Term: ...


class Coordination(Protocol):
    @property
    def machine(self) -> Machine: ...

    @property
    def driver(self) -> Leadership: ...

    @property
    def now_ms(self) -> Callable[[], int]:
        """The stamp of a command that this node would propose now."""
        ...

    async def propose(self, command: Command, *, actor: Actor, request: str = "", timeout_s: float) -> tuple[Any, int]:
        """What apply returned, and on how many nodes the entry was synced. Raises what apply raised, Unconfirmed, NoQuorum."""
        ...

    async def read(self, timeout_s: float) -> Machine:
        """The machine, with everything acknowledged before the call applied."""
        ...

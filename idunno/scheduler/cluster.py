# idunno/scheduler/cluster.py: what the scheduler needs of the coordinator (coordinator/client.py carries it out).
#
# Rule 1: what only the leader knows is asked of it once: a call that a node passed on already is answered, or refused NotLeader.
from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from idunno.base.errors import NotLeader
from idunno.coordinator.commands import Command
from idunno.coordinator.machine import Machine
from idunno.wire.answering import left_s
from idunno.wire.calls import A, Actor, Call, Method, Q


class Cluster(Protocol):
    @property
    def machine(self) -> Machine: ...

    async def propose(self, command: Command, *, actor: Actor, request: str = "", timeout_s: float) -> tuple[Any, int]:
        """Write the command into the log; its result, and on how many nodes it is synced. Raises what apply raised."""
        ...

    async def read(self, timeout_s: float) -> Machine:
        """The machine, at least as new as this call (linearizable)."""
        ...

    async def ask_leader(
        self,
        method: Method[Q, A],
        request: Q,
        here: Callable[[float], Awaitable[A]],
        *,
        timeout_s: float,
        actor: Actor | None = None,
        again: bool,
    ) -> A:
        """`here(timeout_s)` when this node leads, else the same call to the leader. `again`: may be sent twice."""
        ...


async def at_leader(
    cluster: Cluster, leads: bool, method: Method[Q, A], call: Call[Q], here: Callable[[float], Awaitable[A]]
) -> A:
    """`here(timeout_s)` at the leader, on behalf of the same actor. Only for what may be asked twice. Raises NotLeader."""
    if call.peer.node is not None:
        if not leads:
            raise NotLeader("this node is not the scheduler; the one that asked will find it")
        return await here(left_s(call))
    return await cluster.ask_leader(method, call.request, here, timeout_s=left_s(call), actor=call.actor, again=True)

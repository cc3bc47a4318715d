"""A real machine behind a coordinator that commits at once, with a SchedulerService on each node: no wire, no disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from idunno.base.errors import IdunnoError, NoQuorum, NotLeader
from idunno.base.ids import Index, NodeId, Term
from idunno.coordinator import commands as c
from idunno.coordinator.machine import Machine
from idunno.membership.events import Changed, MemberView
from idunno.membership.messages import State
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.messages import POLL, TASK_DONE, Held, Lease, Poll, PollAnswer, TaskDone
from idunno.scheduler.service import SchedulerService
from idunno.wire.calls import Actor, Item, Method, Peer, Role
from tests.unit.coordinator.world import genesis, timing
from tests.unit.coordinator.world import node as node_record

if TYPE_CHECKING:
    from idunno.coordinator.client import Coordinator
    from idunno.scheduler.cluster import Cluster

    def _fits(coordinator: Coordinator) -> Cluster:  # the real one is what the scheduler needs
        return coordinator


ANN, BOB, ROOT = Actor("ann", Role.USER), Actor("bob", Role.USER), Actor("root", Role.ADMIN)


def node_id(i: int) -> NodeId:
    return NodeId(f"{i:016x}")


@dataclass
class FakeCall:
    request: Any
    actor: Actor
    body: bytes = b""
    timeout_s: float = 5.0
    forwarded: bool = False

    @property
    def peer(self) -> Peer:
        return Peer(self.actor, node=node_id(9) if self.forwarded else None)

    def remaining_s(self) -> float:
        return self.timeout_s

    async def receive(self) -> Item | None:
        return None

    async def send(self, body: Any = b"", note: bytes = b"") -> None:
        return None


@dataclass
class Registered:
    handlers: dict[str, Callable[[Any], Awaitable[Any]]] = field(default_factory=dict)

    def register(self, method: Method[Any, Any], handler: Any) -> None:
        self.handlers[method.name] = handler


class Node:
    """One node's side of the coordinator: scheduler.cluster.Cluster."""

    def __init__(self, world: World, me: NodeId, config: SchedulerConfig) -> None:
        self.world, self.me, self.registered = world, me, Registered()
        self.service = SchedulerService(self, self.registered, me, world.view, config)

    @property
    def machine(self) -> Machine:
        return self.world.machine

    async def propose(
        self, command: c.Command, *, actor: Actor, request: str = "", timeout_s: float
    ) -> tuple[Any, int]:
        await asyncio.sleep(0)
        if self.world.failing is not None:
            raise self.world.failing
        return self.world.do(command, actor, request), 1

    async def read(self, timeout_s: float) -> Machine:
        await asyncio.sleep(0)
        return self.world.machine

    async def ask_leader(
        self, method: Any, request: Any, here: Any, *, timeout_s: float, actor: Actor | None = None, again: bool
    ) -> Any:
        for _ in range(20):
            leader = self.world.leader
            try:
                if leader is self:
                    return await here(timeout_s)
                if leader is not None:
                    call = FakeCall(request, actor or Actor(self.me, Role.NODE), timeout_s=timeout_s, forwarded=True)
                    return await leader.registered.handlers[method.name](call)
            except NotLeader:
                pass
            await asyncio.sleep(0)
        raise NoQuorum("no leader")


class World:
    def __init__(self, nodes: int = 5, config: SchedulerConfig | None = None) -> None:
        self.machine = Machine()
        self.index = 0
        self.now_ms = 1_700_000_000_000
        self.failing: IdunnoError | None = None
        self.states = {node_id(i): "active" for i in range(1, nodes + 1)}
        self.leader: Node | None = None
        self.term = 0
        self.nodes: dict[NodeId, Node] = {}
        self.node = Actor(node_id(1), Role.NODE)
        self.do(genesis(min(3, nodes)), self.node)
        for i in range(4, nodes + 1):
            self.machine.roster._keep_node(node_record(i))
        for i in range(1, nodes + 1):
            self.nodes[node_id(i)] = Node(self, node_id(i), config or SchedulerConfig())
            self.nodes[node_id(i)].service.start()

    def view(self) -> list[MemberView]:
        return [MemberView(n, self.machine.roster.name(n), "h:1", s, 1, 0, 0, "told") for n, s in self.states.items()]

    def do(self, command: c.Command, actor: Actor, request: str = "") -> Any:
        self.index += 1
        entry = c.Entry(c.FORMAT, self.now_ms, actor.name, actor.role.value, request, command)
        applied = self.machine.apply(Index(self.index), c.encode_entry(entry))
        for node in self.nodes.values():
            for effect in applied.effects:
                node.service.follow(Index(self.index), effect)
        if applied.error is not None:
            raise applied.error
        return applied.result

    def lead(self, i: int) -> None:
        self.term += 1
        old, self.leader = self.leader, self.nodes[node_id(i)]
        if old is not None:
            old.service.role_changed(False, Term(self.term))
        self.leader.service.role_changed(True, Term(self.term))

    def member(self, i: int, state: str) -> None:
        """Membership's verdict, heard by all."""
        self.states[node_id(i)] = state
        [seen] = [member for member in self.view() if member.node == node_id(i)]
        for node in self.nodes.values():
            node.service.member_changed(Changed(seen, State.ACTIVE, State(state), "no answer"))

    async def call(self, method: Method[Any, Any], request: Any, actor: Actor = ANN, at: int = 2, **more: Any) -> Any:
        return await self.nodes[node_id(at)].registered.handlers[method.name](FakeCall(request, actor, **more))

    async def stop(self) -> None:
        for node in self.nodes.values():
            await node.service.stop()

    # -- a worker in few words ----------------------------------------------------------------------------------------

    async def at_leader(self, method: Method[Any, Any], request: Any, worker: int, body: bytes = b"") -> Any:
        assert self.leader is not None
        call = FakeCall(request, Actor(node_id(worker), Role.NODE), body=body, timeout_s=30.0)
        return await self.leader.registered.handlers[method.name](call)

    async def poll(
        self,
        worker: int,
        *held: Lease | Held,
        free: int = 1,
        wait_s: float = 0.0,
        seen: int | None = None,
        boot: int = 0,
    ) -> PollAnswer:
        """A poll with all models loaded that are assigned to it."""
        ready = [
            (record.model, record.version)
            for record in self.machine.registry.models()
            if any(w.node == node_id(worker) and w.state == "ready" for w in record.workers)
        ]
        items = [Held(item.job, item.task, item.attempt) for item in held]
        if seen is None:
            assert self.leader is not None
            leading = self.leader.service.leading()
            seen = leading.assigned.of(node_id(worker))[0] if leading is not None else 0
        request = Poll(node_id(worker), boot, free, ready, items, seen, wait_s)
        answer = await self.at_leader(POLL, request, worker)
        assert isinstance(answer, PollAnswer)
        return answer

    async def finish(self, worker: int, lease: Lease) -> None:
        queries = lease.last - lease.first
        body = b"{}\n" * queries
        request = TaskDone(node_id(worker), lease.job, lease.task, "", len(body), [], queries, 0, timing(queries))
        await self.at_leader(TASK_DONE, request, worker, body)


async def until(condition: Callable[[], bool], turns: int = 2_000) -> None:
    """Let the loop run until `condition` holds."""
    for _ in range(turns):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")

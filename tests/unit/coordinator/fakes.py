"""A small cluster in memory: drivers that commit at once, peers that call handlers directly, a leader one can move."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from idunno.base.errors import IdunnoError, NotLeader, Unavailable
from idunno.base.ids import Index, NodeId, Term
from idunno.coordinator import commands as c
from idunno.coordinator.applier import Applier
from idunno.coordinator.client import Coordinator
from idunno.coordinator.machine import Machine
from idunno.wire.calls import A, Actor, Caller, Lane, Method, Peer, Q, Role
from tests.unit.coordinator.world import SYSTEM, genesis


class FakeDriver:
    def __init__(self, cluster: FakeCluster, me: NodeId) -> None:
        self.cluster, self.me = cluster, me
        self.machine = Machine()
        self.apply = Applier(self.machine)
        self.on_leader: list[Callable[[NodeId | None, Term], None]] = []
        self.leader: NodeId | None = None
        self.term = Term(0)
        self.short_of_space = False
        self.rounds = 0

    @property
    def is_leader(self) -> bool:
        return self.leader == self.me

    async def propose(self, payload: bytes, timeout_s: float) -> tuple[Index, int, Any]:
        if not self.is_leader:
            raise NotLeader(f"{self.me} does not lead")
        trouble = self.cluster.trouble.pop(0) if self.cluster.trouble else None
        if trouble is not None and not trouble.may_have_happened:
            raise trouble
        answer = self.cluster.commit(payload, self.me)
        if trouble is not None:
            raise trouble
        return answer

    async def read_index(self, timeout_s: float) -> Index:
        if not self.is_leader:
            raise NotLeader(f"{self.me} does not lead")
        self.rounds += 1
        await asyncio.sleep(0)
        if self.cluster.trouble:
            raise self.cluster.trouble.pop(0)
        return Index(len(self.cluster.log))

    async def applied(self, index: Index, timeout_s: float) -> None:
        self.cluster.catch_up(self.me)


@dataclass
class FakeCall:
    """calls.Call, for a handler."""

    request: Any
    peer: Peer
    actor: Actor
    body: bytes = b""
    time_s: float = 5.0

    def remaining_s(self) -> float:
        return self.time_s

    async def receive(self) -> None:
        return None

    async def send(self, body: Any = b"", note: bytes = b"") -> None:
        raise AssertionError("no handler here streams")


class FakeNode:
    """One node's handlers; also its Registrar."""

    def __init__(self, cluster: FakeCluster, me: NodeId) -> None:
        self.me, self.handlers = me, dict[str, Callable[[Any], Awaitable[Any]]]()
        self.driver = FakeDriver(cluster, me)
        self.coordinator = Coordinator(self.driver, self.driver.machine, cluster.peers(me), me, lambda: cluster.now_ms)

    def register(self, method: Method[Q, A], handler: Any) -> None:
        self.handlers[method.name] = handler

    async def ask(self, method: Method[Q, A], request: Q, actor: Actor, peer: Peer | None = None) -> A:
        """Call a handler through the wire's encoding, both ways."""
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=method.request)
        answer = await self.handlers[method.name](FakeCall(sent, peer or Peer(actor), actor))
        return msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=method.answer)


@dataclass
class FakeCaller:
    cluster: FakeCluster
    me: NodeId
    to: NodeId

    async def call(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Any = b"", actor: Actor | None = None
    ) -> A:
        self.cluster.calls.append((self.me, self.to, method.name))
        if self.to in self.cluster.frozen:
            await asyncio.Event().wait()
        if self.to in self.cluster.down:
            raise Unavailable(f"{self.to} cannot be reached")
        me = Actor(self.me, Role.NODE)
        return await self.cluster.nodes[self.to].ask(method, request, actor or me, Peer(me, node=self.me))


@dataclass
class FakePeers:
    cluster: FakeCluster
    me: NodeId

    def to(self, node: NodeId, lane: Lane = Lane.CALLS) -> Caller:
        return FakeCaller(self.cluster, self.me, node)  # type: ignore[return-value]


@dataclass
class FakeCluster:
    """`trouble`: errors that the next proposals or reads meet; one that may have happened is raised after the commit."""

    nodes: dict[NodeId, FakeNode] = field(default_factory=dict)
    log: list[bytes] = field(default_factory=list)
    trouble: list[IdunnoError] = field(default_factory=list)
    down: set[NodeId] = field(default_factory=set)
    frozen: set[NodeId] = field(default_factory=set)
    calls: list[tuple[NodeId, NodeId, str]] = field(default_factory=list)
    now_ms: int = 1_000

    def begin(self, names: list[NodeId], first: c.Genesis | None = None) -> None:
        for name in names:
            self.nodes[name] = FakeNode(self, name)
        entry = c.Entry(c.FORMAT, self.now_ms, SYSTEM.name, "node", "", first or genesis())
        self.commit(c.encode_entry(entry), names[0])
        for name in names:
            self.catch_up(name)

    def peers(self, me: NodeId) -> FakePeers:
        return FakePeers(self, me)

    def commit(self, payload: bytes, at: NodeId) -> tuple[Index, int, Any]:
        self.log.append(payload)
        return Index(len(self.log)), 3, self.catch_up(at)

    def catch_up(self, node: NodeId) -> Any:
        driver, applied = self.nodes[node].driver, None
        for index in range(driver.machine.index + 1, len(self.log) + 1):
            applied = driver.apply(Index(index), self.log[index - 1])
        return applied

    def lead(self, leader: NodeId | None, *, known_to: list[NodeId] | None = None) -> None:
        for name, node in self.nodes.items():
            if known_to is None or name in known_to:
                node.driver.leader, node.driver.term = leader, Term(node.driver.term + 1)
                for callback in node.driver.on_leader:
                    callback(leader, node.driver.term)


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until it holds; the test's own deadline ends it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)

# tests/unit/sdfs/world.py: a cluster of real file stores in one process: real RPC sessions, disks in memory, virtual time.
#
# Rule 1: only the coordinator is a stand-in: one real machine that all nodes share, so an entry is applied everywhere at once.
# Rule 2: time jumps to the next timer when nothing is left to do: no test waits, and all runs of a test are equal.
# Rule 3: `World.before` is told each step of each living node before it happens, and may kill nodes there.
from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from idunno.base.disk import Also, Buffer
from idunno.base.errors import ConnectionLost, NoQuorum, Unavailable
from idunno.base.ids import BlockId, Index, NodeId, Term
from idunno.coordinator.commands import AddUser, Command, Entry, SetPresence, encode_entry
from idunno.coordinator.effects import KeepSmall
from idunno.coordinator.machine import Machine
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.client import FileClient, source_of
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.datanode import DataNode
from idunno.sdfs.hashing import block_id
from idunno.sdfs.messages import PutAnswer
from idunno.sdfs.service import FileService
from idunno.sdfs.small import SmallStore
from idunno.wire.calls import A, Actor, Call, Caller, Empty, Handler, Lane, Method, Peer, Q, Role, Stream
from idunno.wire.local import LocalCaller
from idunno.wire.server import Server
from tests.unit.coordinator import world as coordinator
from tests.unit.fakes import MemoryDisk, _MemoryFile

T = TypeVar("T")

USER = Actor("alice", Role.USER)
OTHER = Actor("bob", Role.USER)
MB = 1024 * 1024
CONFIG = SdfsConfig(floor_bytes=0, floor_percent=0)


# -- time -----------------------------------------------------------------------------------------------------------------


class _Jump(selectors.SelectSelector):
    """Instead of waiting for a timer, moves the clock to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is left to do and nothing will happen any more: the test would hang"
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s


def run(main: Callable[[], Coroutine[Any, Any, T]], timeout_s: float = 1e6) -> T:
    """Run on virtual time. Fails when a task died unobserved."""
    behind: list[dict[str, Any]] = []

    async def guarded() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: behind.append(context))
        return await asyncio.wait_for(main(), timeout_s)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(guarded())
    assert not behind, behind
    return result


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never became true")


async def inline(work: Callable[[], T], /) -> T:
    """An `offload` without threads: another task may run before the work, as with a real one."""
    await asyncio.sleep(0)
    return work()


# -- disks that tell what they do -------------------------------------------------------------------------------------------


class ToldFile(_MemoryFile):
    """A file whose operations are told to `disk.before` first."""

    async def write(self, offset: int, data: Sequence[Buffer], *, sync: bool = False, also: Also | None = None) -> None:
        await self._told("write")
        await super().write(offset, data, sync=sync, also=also)

    async def sync(self) -> None:
        await self._told("sync")
        await super().sync()

    async def read(self, offset: int, length: int, *, also: Also | None = None) -> bytes:
        await self._told("read")
        return await super().read(offset, length, also=also)

    async def _told(self, doing: str) -> None:
        assert isinstance(self._disk, ToldDisk)
        await self._disk.tell(doing, self._path)


class ToldDisk(MemoryDisk):
    """Tells `before(doing, path)` each operation before it happens, and keeps the list."""

    def __init__(self, *, capacity_bytes: int = 1 << 40) -> None:
        super().__init__(capacity_bytes=capacity_bytes)
        self.before: Callable[[str, str], Awaitable[None]] | None = None
        self.story: list[tuple[str, str]] = []

    async def tell(self, doing: str, path: str) -> None:
        self.story.append((doing, path))
        if self.before is not None:
            await self.before(doing, path)

    async def open(self, path: str, *, create: bool = False, direct: bool = False) -> ToldFile:
        await self.tell("create" if create else "open", path)
        file = await super().open(path, create=create)
        return ToldFile(self, path, file._inode)

    async def rename(self, source: str, target: str) -> None:
        await self.tell("rename", target)
        await super().rename(source, target)

    async def sync_directory(self, path: str) -> None:
        await self.tell("sync_directory", path)
        await super().sync_directory(path)


# -- the cluster ------------------------------------------------------------------------------------------------------------


class Driver:
    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def leader(self) -> NodeId | None:
        return self._world.leader

    @property
    def term(self) -> Term:
        return self._world.term


class Coordination:
    """One node's coordinator: the world's machine."""

    def __init__(self, world: World) -> None:
        self.driver = Driver(world)
        self._world = world

    @property
    def machine(self) -> Machine:
        return self._world.machine

    def now_ms(self) -> int:
        return self._world.now_ms

    async def propose(self, command: Command, *, actor: Actor, request: str = "", timeout_s: float) -> tuple[Any, int]:
        await self._led(timeout_s)
        result = self._world.apply(command, actor, request)
        await asyncio.sleep(0.001)
        return result, self._world.machine.roster.acknowledge_copies()

    async def read(self, timeout_s: float) -> Machine:
        await self._led(timeout_s)
        return self._world.machine

    async def _led(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._world.led.wait(), timeout_s)
        except TimeoutError:
            raise NoQuorum("no leader") from None


class _Registrar:
    """Tells the world each call of a node before it is handled and before it is answered."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def register(self, method: Method[Q, A], handler: Handler[Q, A]) -> None:
        async def told(call: Call[Q]) -> Any:
            await self._node.tell(f"{method.name} begins", "")
            answer = await handler(call)
            await self._node.tell(f"{method.name} ends", "")
            return answer

        self._node.server.register(method, told)


class Dead:
    """The Caller of a node that is gone."""

    def __init__(self, node: NodeId) -> None:
        self._node = node

    def _error(self) -> Unavailable:
        return Unavailable(f"node {self._node} is dead")

    async def call(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> A:
        raise self._error()

    async def call_with_body(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> tuple[A, bytes]:
        raise self._error()

    def open(self, method: Method[Q, A], request: Q, *, timeout_s: float, actor: Actor | None = None) -> Stream[A]:
        raise self._error()

    def notify(self, method: Method[Q, Empty], request: Q | msgspec.Raw, body: Buffer = b"") -> bool:
        return False


class Node:
    def __init__(self, world: World, number: int, disk: ToldDisk) -> None:
        self.world, self.disk = world, disk
        self.id = NodeId(f"{number:016x}")
        self.name = f"n{number}"
        self.alive = True
        self.running = asyncio.Event()  # clear it to freeze the node (SIGSTOP): its connections stay, nothing moves
        self.running.set()
        self.server = Server(lambda _: None, name=self.name)
        self.blocks = BlockStore(disk, world.config)
        self.small = SmallStore(disk, inline)
        self.callers: dict[tuple[str, Lane], LocalCaller] = {}  # into this node, by who calls
        self.files = FileService(
            self.id, Coordination(world), self.blocks, self.small, self, config=world.config, rng=random.Random(number)
        )
        self.data = DataNode(
            self.id,
            self.blocks,
            self.small,
            self,
            config=world.config,
            may_write=self.files.may_write,
            may_read=self.files.may_read,
            locate=self.files.locate,
            report=self.files.report,
            heard=self.files.witness.heard,
            must_show=self.files.must_show,
        )
        self.files.register(_Registrar(self))
        self.data.register(_Registrar(self))
        disk.before = self.tell

    async def start(self) -> None:
        await self.blocks.open()
        await self.small.open()
        self.data.start()
        self.files.start()
        self.data.leader_changed(self.world.leader, self.world.term)

    async def stop(self) -> None:
        await self.server.close(0)
        await self.data.stop()
        await self.files.stop()
        await self.small.close()

    async def tell(self, doing: str, path: str) -> None:
        if self.alive and self.world.before is not None:
            self.world.before(self, doing, path)
        if not self.alive:
            await asyncio.Event().wait()  # a dead process does nothing more
        await self.running.wait()

    def to(self, node: NodeId, lane: Lane = Lane.CALLS) -> Caller:
        if not self.alive:
            return Dead(node)
        return self.world.caller(node, Peer(Actor(self.id, Role.NODE), node=self.id), lane)

    def link(self, peer: Peer, lane: Lane) -> Caller:
        """A caller into this node."""
        key = (peer.actor.name, lane)
        if key not in self.callers or self.callers[key].closed:
            self.callers[key] = LocalCaller(self.server, peer)
        return self.callers[key]


class World:
    """`size` nodes; alice and bob are users. `before(node, doing, path)` may kill and is told before each step."""

    def __init__(
        self, size: int, *, config: SdfsConfig = CONFIG, capacity_bytes: int = 1 << 40, disk: type[ToldDisk] = ToldDisk
    ) -> None:
        self.config = config
        self.rng = random.Random(size)
        self.machine = Machine()
        self.now_ms = 1_000_000
        self.leader: NodeId | None = None
        self.term = Term(1)
        self.led = asyncio.Event()  # somebody leads
        self.before: Callable[[Node, str, str], None] | None = None
        self.log: list[tuple[Index, bytes]] = []
        self.nodes: dict[NodeId, Node] = {}
        self._ended: set[asyncio.Task[None]] = set()
        self.apply(coordinator.genesis(size), coordinator.SYSTEM)
        for number, actor in enumerate((USER, OTHER)):
            user = coordinator.user(actor.name, "user", 50 + number)
            self.apply(AddUser(user, "t-user"), coordinator.SYSTEM)
        for number in range(1, size + 1):
            node = Node(self, number, disk(capacity_bytes=capacity_bytes))
            self.nodes[node.id] = node

    async def __aenter__(self) -> World:
        for node in self.nodes.values():
            await node.start()
        self.lead(next(iter(self.nodes)))
        await until(lambda: not self.leading.recovering)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.before = None
        for node in self.nodes.values():
            node.running.set()
            if node.alive:
                await node.stop()
        for task in self._ended:
            task.cancel()
        await asyncio.gather(*self._ended, return_exceptions=True)

    def node(self, number: int) -> Node:
        return self.nodes[NodeId(f"{number:016x}")]

    @property
    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.alive]

    @property
    def leading(self) -> Any:
        assert self.leader is not None
        return self.nodes[self.leader].files.leading

    # -- the coordinator's part -----------------------------------------------------------------------------------------

    def apply(self, command: Command, actor: Actor, request: str = "") -> Any:
        self.now_ms += 1
        entry = encode_entry(Entry(1, self.now_ms, actor.name, actor.role.value, request, command))
        index = Index(self.machine.index + 1)
        applied = self.machine.apply(index, entry)
        self.log.append((index, entry))
        if applied.error is not None:
            raise applied.error
        for effect in applied.effects:
            for node in self.living:
                if isinstance(effect, KeepSmall):
                    node.small.keep(effect.block, effect.content)
                node.files.follow(index, effect)
        return applied.result

    def lead(self, node: NodeId | None) -> None:
        """`node` is elected; None: nobody leads for now."""
        self.term = Term(self.term + 1)
        self.leader = node
        if node is None:
            self.led.clear()
        else:
            self.led.set()
        for each in self.living:
            each.files.role_changed(each.id == node, self.term)
            each.data.leader_changed(node, self.term)

    def set_presence(self, node: NodeId, presence: str) -> None:
        boot = self.machine.roster.node(node).boot
        self.apply(SetPresence(node, presence, boot, "test"), coordinator.SYSTEM)

    # -- what happens to nodes ------------------------------------------------------------------------------------------

    def kill(self, node: Node, *, noticed_after_s: float | None = 3.0) -> None:
        """kill -9 and loss of power. Connections break at once; the roster learns of it later, or never (None)."""
        node.alive = False
        node.disk.crash(self.rng)
        for links in [node.callers, *(other.callers for other in self.nodes.values())]:
            for (caller, _), link in list(links.items()):
                if links is node.callers or caller == node.id:
                    assert link._link is not None
                    link._link.close(ConnectionLost(f"{node.name} died"))
        self._end(node.data.stop())
        self._end(node.files.stop())
        if node.small._task is not None:
            node.small._task.cancel()
        if self.leader == node.id:
            self.lead(None)
            self._end(self._elect(1.0))
        if noticed_after_s is not None:
            self._end(self._notice(node, noticed_after_s))

    async def _elect(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.lead(self.living[-1].id)

    async def _notice(self, node: Node, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if not node.alive:
            self.set_presence(node.id, "failed")

    def _end(self, work: Coroutine[Any, Any, None]) -> None:
        self._ended.add(asyncio.get_running_loop().create_task(work))

    async def restart(self, node: Node) -> Node:
        """The same data directory in a new process."""
        again = Node(self, int(node.id, 16), node.disk)
        self.nodes[node.id] = again
        await again.start()
        for index, entry in self.log:  # the log is replayed from its beginning
            for effect in _effects(self.log, index, entry):
                if isinstance(effect, KeepSmall):
                    again.small.keep(effect.block, effect.content)
        if self.machine.roster.node(node.id).presence != "present":
            self.set_presence(node.id, "present")
        return again

    # -- clients --------------------------------------------------------------------------------------------------------

    def caller(self, node: NodeId, peer: Peer, lane: Lane = Lane.CALLS) -> Caller:
        there = self.nodes.get(node)
        return there.link(peer, lane) if there is not None and there.alive else Dead(node)

    def client(self, actor: Actor = USER, entry: int = 1) -> FileClient:
        """Talks to node `entry` while that lives, then to the next."""

        def caller() -> Caller:
            serving = [n for n in self.living if not n.server._dispatch.stopping]
            order = [n for n in serving if int(n.id, 16) >= entry] or serving
            return self.caller(order[0].id, Peer(actor)) if order else Dead(NodeId("nobody"))

        return FileClient(caller, offload=inline, rng=random.Random(f"{actor.name} {entry} {self.rng.random()}"))

    def worker(self, number: int) -> FileClient:
        """A node's own client, through its own handlers."""
        node = self.node(number)
        peer = Peer(Actor(node.id, Role.NODE), node=node.id)
        return FileClient(lambda: self.caller(node.id, peer), offload=inline, rng=random.Random(number))

    async def put(self, content: bytes, name: str, *, entry: int = 1, **more: Any) -> PutAnswer:
        return await self.client(entry=entry).put(source_of(content), name, **more)

    async def get(self, name: str, *, entry: int = 1, **more: Any) -> bytes:
        return await read(self.client(entry=entry), name, **more)

    def durable(self, block: BlockId) -> list[Node]:
        """The nodes whose disk would have the block, whole, after a loss of power now."""
        path = f"blocks/{block[:2]}/{block}"
        found = []
        for node in self.nodes.values():
            inode = node.disk._durable_names.get(path)
            if inode is not None and block_id(inode.synced) == block:
                found.append(node)
        return found


def _effects(log: list[tuple[Index, bytes]], index: Index, entry: bytes) -> tuple[Any, ...]:
    machine = Machine()
    for at, payload in log:
        applied = machine.apply(at, payload)
        if at == index:
            return applied.effects
    raise AssertionError(f"no entry {index}")


async def read(client: FileClient, name: str, **more: Any) -> bytes:
    got = bytearray()

    async def sink(offset: int, content: Buffer) -> None:
        assert offset == len(got), "bytes out of order"
        got.extend(content)

    await client.get(name, sink, **more)
    return bytes(got)


def content_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)

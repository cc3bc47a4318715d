"""Contents of small files from other nodes: checked, kept, waited for only as long as somebody may have them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from idunno.base.errors import DiskFailed, Unavailable
from idunno.base.ids import BlockId, NodeId
from idunno.sdfs.hashing import block_id
from idunno.sdfs.small import QUEUE_BYTES_MAX, SmallStore
from idunno.sdfs.small_copies import BATCH, READ_SMALL, ReadSmall, SmallCopies
from idunno.wire.calls import Empty, Item
from tests.unit.fakes import MemoryDisk

ME, A, B = (NodeId(name) for name in ("me", "a", "b"))


async def inline(work: Any) -> Any:
    return work()


class Stream:
    def __init__(self, items: list[Item]) -> None:
        self._items = items

    async def receive(self) -> Item | None:
        return self._items.pop(0) if self._items else None

    async def answer(self) -> Empty:
        return Empty()


class Peers:
    """Answers as each node's `small.read` would, or refuses."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, SmallCopies] = {}
        self.asked: list[tuple[NodeId, int]] = []

    def register(self, method: Any, handler: Any) -> None:
        assert method is READ_SMALL

    def to(self, node: NodeId, lane: Any = None) -> Any:
        return _Caller(self, node)


class _Caller:
    def __init__(self, peers: Peers, node: NodeId) -> None:
        self._peers, self._node = peers, node

    @asynccontextmanager
    async def open(self, method: Any, request: ReadSmall, *, timeout_s: float) -> AsyncIterator[Stream]:
        if self._node not in self._peers.nodes:
            raise Unavailable(f"{self._node} is away")
        self._peers.asked.append((self._node, len(request.blocks)))
        call = _Call(request)
        await self._peers.nodes[self._node]._read(call)  # type: ignore[arg-type]
        yield Stream(call.sent)


class _Call:
    def __init__(self, request: ReadSmall) -> None:
        self.request, self.sent = request, list[Item]()

    async def send(self, body: bytes = b"", note: bytes = b"") -> None:
        self.sent.append(Item(note, body))


async def node(peers: Peers, name: NodeId, *contents: bytes) -> tuple[SmallCopies, SmallStore, MemoryDisk]:
    disk = MemoryDisk()
    store = SmallStore(disk, inline)
    await store.open()
    for content in contents:
        store.keep(block_id(content), content)
    copies = SmallCopies(name, store, peers, peers)
    return copies, store, disk


def names(*contents: bytes) -> list[BlockId]:
    return [block_id(content) for content in contents]


def test_what_is_missing_comes_from_whoever_has_it_and_is_durable_then() -> None:
    async def story() -> None:
        peers = Peers()
        mine, store, disk = await node(peers, ME, b"mine")
        peers.nodes[A] = (await node(peers, A, b"one"))[0]
        peers.nodes[B] = (await node(peers, B, b"one", b"two"))[0]
        await mine.fetch(names(b"mine", b"one", b"two"), [A, ME, B, A])
        assert peers.asked == [(A, 2), (B, 1)]
        await store.close()
        disk.crash()
        again = SmallStore(disk, inline)
        await again.open()
        assert [await again.get(name) for name in names(b"mine", b"one", b"two")] == [b"mine", b"one", b"two"]
        await again.close()

    asyncio.run(story())


def test_many_come_in_batches() -> None:
    async def story() -> None:
        peers = Peers()
        mine, store, _ = await node(peers, ME)
        contents = [b"%d" % number for number in range(2 * BATCH + 5)]
        peers.nodes[A] = (await node(peers, A, *contents))[0]
        await mine.fetch(names(*contents), [A])
        assert [count for _, count in peers.asked] == [BATCH, BATCH, 5]
        assert all(name in store for name in names(*contents))

    asyncio.run(story())


def test_as_long_as_somebody_is_silent_the_missing_may_be_there() -> None:
    async def story() -> None:
        peers = Peers()
        mine, store, _ = await node(peers, ME)
        peers.nodes[A] = (await node(peers, A, b"one"))[0]
        with pytest.raises(Unavailable, match="1 small contents are missing, and not all answered: b: b is away"):
            await mine.fetch(names(b"one", b"two"), [A, B])
        assert names(b"one")[0] in store  # what was got stays
        peers.nodes[B] = (await node(peers, B))[0]
        await mine.fetch(names(b"one", b"two"), [A, B])  # nobody has it: lost, said in the log, waited for no longer
        assert names(b"two")[0] not in store

    asyncio.run(story())


def test_what_comes_while_the_queue_is_full_waits_for_room_and_is_there_in_the_end() -> None:
    async def story() -> None:
        peers = Peers()
        mine, store, _ = await node(peers, ME)
        contents = [b"%06d" % number * 600 for number in range(100)]
        peers.nodes[A] = (await node(peers, A, *contents))[0]
        async with store._writing:  # a write that takes long, while the log goes on
            for number in range((QUEUE_BYTES_MAX - 50 * 3_600) // 4_096):
                content = b"%08d" % number * 512
                store.keep(block_id(content), content)
            fetching = asyncio.ensure_future(mine.fetch(names(*contents), [A]))
            while not store._flushing.locked():  # noqa: ASYNC110
                await asyncio.sleep(0)
        await fetching
        assert all(name in store for name in names(*contents))
        assert store.dropped == 0

    asyncio.run(story())


def test_what_finds_no_room_on_a_failing_disk_does_not_count_as_got(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        peers = Peers()
        mine, store, disk = await node(peers, ME)
        peers.nodes[A] = (await node(peers, A, b"wanted" * 600))[0]
        disk.faults["write"] = "No space left on device"
        for number in range(QUEUE_BYTES_MAX // 4_096):
            content = b"%08d" % number * 512
            store.keep(block_id(content), content)
        with pytest.raises(DiskFailed):
            await mine.fetch(names(b"wanted" * 600), [A])

        async def flush() -> None:  # the log fills it again at once
            pass

        monkeypatch.setattr(store, "flush", flush)
        with pytest.raises(Unavailable, match="no room for small contents"):
            await mine.fetch(names(b"wanted" * 600), [A])
        assert names(b"wanted" * 600)[0] not in store

    asyncio.run(story())

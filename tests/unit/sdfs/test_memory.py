# A 300 MB file passes through client and nodes in pieces: bytes are counted, on disks that make them up and throw them away.
from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import ClassVar

from idunno.base.disk import Also, Buffer
from idunno.base.ids import BlockId
from idunno.sdfs.client import FileClient
from idunno.sdfs.hashing import block_id
from tests.unit.sdfs.world import MB, ToldDisk, ToldFile, World, run

BLOCKS = 38
"""304 MB."""
NODE_BYTES_MAX = 20 * MB
"""Three blocks under way, each with the stream's credit in and a write buffer, and as much to spare."""
ALL_BYTES_MAX = 64 * MB
"""What one process may hold for it (here: client and five nodes together)."""


def block(number: int) -> bytes:
    return number.to_bytes(8, "big") * MB


class ThinFile(ToldFile):
    """Keeps the length of what is written, and reads a block's content from its name."""

    async def write(self, offset: int, data: Sequence[Buffer], *, sync: bool = False, also: Also | None = None) -> None:
        await self._told("write")
        if also is not None:
            also(data)

    async def read(self, offset: int, length: int, *, also: Also | None = None) -> bytes:
        await self._told("read")
        number = ThinDisk.numbers[BlockId(self._path.rpartition("/")[2])]
        assert offset % 8 == 0
        data = number.to_bytes(8, "big") * (min(length, 8 * MB - offset) // 8)
        if also is not None:
            also([data])
        return data


class ThinDisk(ToldDisk):
    numbers: ClassVar[dict[BlockId, int]] = {}

    async def open(self, path: str, *, create: bool = False, direct: bool = False) -> ToldFile:
        file = await super().open(path, create=create)
        return ThinFile(self, path, file._inode) if "small" not in path else file


def test_300_mb_pass_through_in_pieces() -> None:
    async def story() -> None:
        async with World(5, disk=ThinDisk) as world:
            peak = 0

            def before(node: object, doing: str, path: str) -> None:
                nonlocal peak
                for each in world.nodes.values():
                    incoming = sum(serving.held for serving in each.server._local)
                    waiting = sum(
                        call.inbox.outstanding for serving in each.server._local for call in serving.calls.values()
                    )
                    peak = max(peak, incoming + waiting + each.blocks.buffered_bytes)

            world.before = before
            given = taken = most = 0

            async def source(length: int) -> bytes:
                nonlocal given, most
                if given == BLOCKS * 8 * MB:
                    return b""
                content = block(given // (8 * MB))
                ThinDisk.numbers[block_id(content)] = given // (8 * MB)
                given += len(content)
                most = max(most, given - taken)
                return content

            def progress(done: int, total: int) -> None:
                nonlocal taken
                taken = done

            client = world.client(entry=2)
            tracemalloc.start()
            try:
                answer = await client.put(source, "large", size=BLOCKS * 8 * MB, progress=progress)
                assert (answer.blocks, answer.copies, taken) == (BLOCKS, 4, given)
                assert most <= 4 * 8 * MB
                _, traced = tracemalloc.get_traced_memory()
                assert traced < ALL_BYTES_MAX
                tracemalloc.reset_peak()
                await check_get(client)
                _, traced = tracemalloc.get_traced_memory()
                assert traced < ALL_BYTES_MAX
            finally:
                tracemalloc.stop()
            assert 0 < peak < NODE_BYTES_MAX

    run(story)


async def check_get(client: FileClient) -> None:
    got = 0

    async def sink(offset: int, content: Buffer) -> None:
        nonlocal got
        assert offset == got
        assert content == block(got // (8 * MB))
        got += len(content)

    await client.get("large", sink)
    assert got == BLOCKS * 8 * MB

# idunno/fs/streams.py: content on its way between an open file and the cluster; runs in the connection's loop.
#
# Rule 1: memory is bounded: a Reader has at most AHEAD blocks under way beside the one asked for, a Writer holds one piece
#         beside what the put holds.
# Rule 2: a Writer's put hears of its end only from `finish`. Until then nothing is visible, and `discard` takes it back.
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import accumulate
from typing import Final

from idunno.base.disk import Buffer
from idunno.base.errors import InvalidArgument
from idunno.sdfs.client import FileClient
from idunno.sdfs.messages import FileInfo, PutAnswer
from idunno.sdfs.upload import Source

AHEAD: Final = 2
"""Blocks fetched before they are asked for: one arrives while another is being asked for, 16 MiB."""
DISCARD_S: Final = 5.0
"""For telling the cluster that a put is given up. It forgets an abandoned one by itself, later."""


class Reader:
    """The blocks of one version, read ahead when they are read in order."""

    def __init__(self, files: FileClient, info: FileInfo, timeout_s: float) -> None:
        self.info = info
        self._files, self._timeout_s = files, timeout_s
        self._starts = [0, *accumulate(block.size for block in info.blocks)]
        self._under_way: dict[int, asyncio.Task[Buffer]] = {}
        self._before = -2  # the block given last

    async def block(self, number: int, last: int) -> Buffer:
        """A block, asked for by a read that goes on to block `last`. Raises as FileClient.read."""
        if number == self._before + 1:
            last = number + AHEAD
        end = min(last, number + AHEAD, len(self.info.blocks) - 1) + 1
        for other in [other for other in self._under_way if not number <= other < end]:
            _forget(self._under_way.pop(other))
        for wanted in range(number, end):
            if wanted not in self._under_way:
                self._under_way[wanted] = asyncio.create_task(self._fetch(wanted), name=f"read ahead {wanted}")
        self._before = number
        return await self._under_way.pop(number)

    def source(self) -> Source:
        """All of it, in order."""
        rest, number, last = memoryview(b""), 0, len(self.info.blocks) - 1

        async def read(length: int) -> Buffer:
            nonlocal rest, number
            if not rest and number <= last:
                rest = memoryview(await self.block(number, last))
                number += 1
            piece, rest = rest[:length], rest[length:]
            return piece

        return read

    def drop(self) -> None:
        """Stop reading ahead."""
        while self._under_way:
            _forget(self._under_way.popitem()[1])

    async def _fetch(self, number: int) -> Buffer:
        start, size = self._starts[number], self.info.blocks[number].size
        return await self._files.read(self.info, start, size, timeout_s=self._timeout_s)


def _forget(task: asyncio.Task[Buffer]) -> None:
    task.cancel()
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody wants to hear of it


class Writer:
    """One put whose content comes piece by piece."""

    def __init__(self, put: Callable[[Source], Awaitable[PutAnswer]]) -> None:
        self._rest = memoryview(b"")
        self._ended = self._discarded = False
        self._more, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._task = asyncio.ensure_future(put(self._source))
        self._task.add_done_callback(lambda _: self._room.set())

    async def write(self, piece: Buffer) -> None:
        """Wait until the piece before was taken, then leave this one. Raises what the put raised."""
        await self._room.wait()
        if self._task.done():
            self._task.result()
            raise AssertionError("a put ended before its content")
        self._rest = memoryview(piece)
        if self._rest:
            self._room.clear()
        self._more.set()

    async def finish(self) -> PutAnswer:
        """The content is complete: make the version. Raises as FileClient.put."""
        await self._room.wait()
        self._ended = True
        self._more.set()
        return await self._task

    def give_up(self) -> None:
        """The content never becomes complete."""
        self._discarded = True
        self._more.set()
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def discard(self) -> None:
        """Give up, and wait until nothing is under way."""
        self.give_up()
        await asyncio.wait({self._task}, timeout=DISCARD_S)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _source(self, length: int) -> Buffer:
        while not self._rest and not self._ended and not self._discarded:
            self._more.clear()
            await self._more.wait()
        if self._discarded:
            raise InvalidArgument("the file was given up by who wrote it")  # the put then aborts in the cluster too
        piece, self._rest = self._rest[:length], self._rest[length:]
        if not self._rest:
            self._room.set()
        return piece


def joined(first: Source, second: Source) -> Source:
    """What `first` gives, then what `second` gives."""
    ended = False

    async def read(length: int) -> Buffer:
        nonlocal ended
        if not ended and len(piece := await first(length)):
            return piece
        ended = True
        return await second(length)

    return read

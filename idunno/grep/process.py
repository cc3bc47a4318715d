# idunno/grep/process.py: a child process as the search sees it, so that a simulated node can hand in another.
from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Protocol

READ_BYTES: Final = 256 * 1024
"""The reader's buffer; the pipe is not read while twice as much waits, and so the child waits as well."""


class Child(Protocol):
    async def give(self, order: bytes) -> None:
        """Write its whole standard input, and end it."""
        ...

    async def read(self) -> bytes:
        """The next piece of its standard output; b"" at the end."""
        ...

    async def end(self) -> int:
        """Kill it if it still runs; the exit status, negative for a signal."""
        ...


Spawn = Callable[[], Awaitable[Child]]


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def give(self, order: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(order)
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended already: its exit status says why
            await stdin.drain()
        stdin.close()

    async def read(self) -> bytes:
        assert self._process.stdout is not None
        return await self._process.stdout.read(READ_BYTES)

    async def end(self) -> int:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):  # it ended just now
                self._process.kill()
        while await self.read():
            pass  # what is left in the pipe: some versions of asyncio see the end of a process only behind it
        return await self._process.wait()


async def spawn_child() -> Child:
    """Start idunno/grep/child.py. Through the running loop (`loop.subprocess_exec`)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # nothing is imported from the directory that the node happens to run in
        "-m",
        "idunno.grep.child",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=READ_BYTES,
        start_new_session=True,  # Ctrl-C on a node in the foreground is for the node
    )
    return _Process(process)

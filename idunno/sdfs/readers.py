# idunno/sdfs/readers.py: segments of small contents that are read again and again stay open for it, until they go.
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from idunno.base.disk import Disk, File
from idunno.base.errors import DiskFailed

READERS_MAX: Final = 8
"""Segments kept open: half a gigabyte of small files that are read without opening anything."""


class Readers:
    """Segments that are kept open for reading, the one used last at the end."""

    def __init__(self, disk: Disk, path_of: Callable[[int], str]) -> None:
        self._disk, self._path_of = disk, path_of
        self._files: dict[int, File] = {}
        self._users: Counter[int] = Counter()  # reads under way: such a file is not closed
        self._gone: set[int] = set()  # removed while one was under way

    async def read(self, segment: int, offset: int, length: int) -> bytes:
        """Raises DiskFailed, NotFound. What the system has in memory costs no thread."""
        self._users[segment] += 1
        try:
            file = self._files.pop(segment, None)
            if file is None:
                file = await self._disk.open(self._path_of(segment))
            other = self._files.pop(segment, None)
            self._files[segment] = other or file  # before any await: whoever comes meanwhile finds it
            if other is not None:  # somebody else was as fast
                await file.close()
                file = other
            found = file.read_now(offset, length)
            return found if found is not None else await file.read(offset, length)
        except DiskFailed:
            await self._drop(segment)
            raise
        finally:
            self._users[segment] -= 1
            if not self._users[segment]:
                del self._users[segment]
                if segment in self._gone:
                    await self.forget(segment)
            if len(self._files) > READERS_MAX:
                idle = next((number for number in self._files if number not in self._users), None)
                if idle is not None:
                    await self._files.pop(idle).close()

    async def _drop(self, segment: int) -> None:
        """What failed once is opened anew the next time."""
        if self._users[segment] == 1 and (file := self._files.pop(segment, None)) is not None:
            await file.close()

    async def forget(self, segment: int) -> None:
        """It was removed: its space is free when the last who reads it has done."""
        if segment in self._users:
            self._gone.add(segment)
            return
        self._gone.discard(segment)
        if (file := self._files.pop(segment, None)) is not None:
            await file.close()

    async def close(self) -> None:
        files, self._files = self._files, {}
        for file in files.values():
            await file.close()

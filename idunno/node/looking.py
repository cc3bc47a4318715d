# idunno/node/looking.py: a disk that can only be looked at: what is written to it is dropped, and said to be done.
#
# Rule: opening a log or a store tidies up what a crash left (a torn end, a half-made file). To look at a stopped node's state
#       without touching it, it is opened over this: what is read is what a start would go on with.
from __future__ import annotations

from collections.abc import Sequence

from idunno.base.disk import Also, Buffer, Disk, Entry, File, Space
from idunno.base.errors import NotFound


class LookingDisk:
    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    async def open(self, path: str, *, create: bool = False, direct: bool = False) -> File:
        try:
            return LookingFile(await self._disk.open(path))
        except NotFound:
            if not create:
                raise
            return LookingFile(None)

    async def read_all(self, path: str, *, bytes_max: int) -> bytes:
        return await self._disk.read_all(path, bytes_max=bytes_max)

    async def replace(self, path: str, data: Buffer, *, mode: int = 0o600) -> None: ...

    async def rename(self, source: str, target: str) -> None: ...

    async def remove(self, path: str) -> None: ...

    async def list(self, path: str) -> list[Entry]:
        return await self._disk.list(path)

    async def make_directory(self, path: str) -> None: ...

    async def sync_directory(self, path: str) -> None: ...

    async def space(self) -> Space:
        return await self._disk.space()

    def local_path(self, path: str) -> str:
        return self._disk.local_path(path)


class LookingFile:
    """`file` None: one that would have been made now."""

    def __init__(self, file: File | None) -> None:
        self._file = file

    async def read(self, offset: int, length: int, *, also: Also | None = None) -> bytes:
        return await self._file.read(offset, length, also=also) if self._file is not None else b""

    def read_now(self, offset: int, length: int) -> bytes | None:
        return None

    async def write(
        self, offset: int, data: Sequence[Buffer], *, sync: bool = False, also: Also | None = None
    ) -> None: ...

    async def sync(self) -> None: ...

    async def allocate(self, length: int) -> None: ...

    async def truncate(self, length: int) -> None: ...

    async def size(self) -> int:
        return await self._file.size() if self._file is not None else 0

    async def close(self) -> None:
        if self._file is not None:
            await self._file.close()

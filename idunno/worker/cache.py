# idunno/worker/cache.py: local copies of what is in SDFS and needed here: models' files and jobs' inputs.
#
# Rule 1: content decides identity: equal blocks are one entry, fetched once, however many want it at the same moment.
# Rule 2: what is in use is pinned and stays. The rest goes, longest unused first, when the bound is met; a want that finds no
#         room waits for pins to be released, and says so when that does not happen in time.
# Rule 3: nothing here outlives the process: it is fetched again after a start, usually from the node's own blocks. So
#         nothing is synced, and a torn file is impossible.
# Rule 4: an entry has a folder of its own. Folders are numbered and used again, for a Disk removes no directories.
from __future__ import annotations

import asyncio
import hashlib
import heapq
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Protocol

import msgspec

from idunno.base.disk import Buffer, Disk, File
from idunno.base.errors import Corrupt, Exhausted, IdunnoError, NotFound
from idunno.base.ids import check_file_name
from idunno.coordinator.records import Block
from idunno.sdfs.download import Sink

log = logging.getLogger("idunno.worker")

FOLDER: Final = "cache"
BYTES_MAX: Final = 4 * 1024**3
FETCH_S: Final = 120.0
"""For one entry: 4 GiB from a neighbour over gigabit take 35 s."""
ROOM_S: Final = 60.0
"""How long a want waits for others to release their pins."""


class Fetcher(Protocol):
    """What is needed of sdfs/client.py."""

    async def fetch(self, blocks: Sequence[Block], sink: Sink, *, what: str, timeout_s: float) -> None:
        """Give the bytes of `blocks`, each verified, to `sink`. It retries by itself, over elections and lost nodes."""
        ...


class Part(msgspec.Struct, frozen=True):
    """A file of an entry: where it goes in the entry's folder, its name in SDFS (for messages), and its content."""

    path: str
    name: str
    size: int
    blocks: tuple[Block, ...]


class _Entry(msgspec.Struct, eq=False):
    key: str
    folder: str
    parts: tuple[Part, ...]
    size: int
    pins: int = 0
    reserved: bool = False  # its size counts in the cache's
    fetch: asyncio.Task[None] | None = None
    made: list[str] = msgspec.field(default_factory=list)  # files on disk


class Pin:
    """An entry in use. `folder` is its path on the node's Disk. Release it exactly once."""

    def __init__(self, cache: Cache, entry: _Entry) -> None:
        self._cache, self._entry = cache, entry
        self.folder = entry.folder

    def release(self) -> None:
        self._cache._release(self._entry)


class Cache:
    """`await open()` first. All methods are the loop's."""

    def __init__(self, disk: Disk, files: Fetcher, *, bytes_max: int = BYTES_MAX) -> None:
        self._disk, self._files, self._bytes_max = disk, files, bytes_max
        self._entries: dict[str, _Entry] = {}  # the one used last stands last
        self._free_numbers: list[int] = []
        self._numbers = 0
        self._room = asyncio.Event()  # set whenever there may be more room
        self._chores: set[asyncio.Task[None]] = set()
        self.bytes_used = 0

    async def open(self) -> None:
        """Remove what an earlier process left. Raises DiskFailed."""
        await self._disk.make_directory(FOLDER)
        await self._clear(FOLDER)

    async def close(self) -> None:
        tasks = [*self._chores, *(e.fetch for e in self._entries.values() if e.fetch is not None)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def pin(self, parts: Sequence[Part]) -> Pin:
        """The files of `parts`, together in one folder and kept until the pin is released.

        Raises InvalidArgument for a part's path that leaves the folder, Exhausted when there is no room, and what the
        file store raises.
        """
        digest = hashlib.sha256()
        for part in parts:
            check_file_name(part.path)
            digest.update(f"{part.path}\0{part.size}\0{' '.join(b.block for b in part.blocks)}\0".encode())
        key = digest.hexdigest()
        entry = self._entries.pop(key, None)
        if entry is None:
            entry = _Entry(key, f"{FOLDER}/{self._number()}", tuple(parts), sum(part.size for part in parts))
            entry.fetch = asyncio.create_task(self._fetch(entry), name=f"fetch {parts[0].name}")
        self._entries[key] = entry
        entry.pins += 1
        try:
            if entry.fetch is not None:
                await asyncio.shield(entry.fetch)  # one who stops waiting does not take it from the others
        except BaseException:
            self._release(entry)
            raise
        return Pin(self, entry)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _release(self, entry: _Entry) -> None:
        if entry.pins < 1:
            raise AssertionError(f"{entry.folder} was released more often than pinned")
        entry.pins -= 1
        if entry.pins == 0 and entry.fetch is not None and not entry.fetch.done():
            entry.fetch.cancel()  # nobody waits any more; it cleans up after itself
            self._entries.pop(entry.key, None)
        self._room.set()

    async def _fetch(self, entry: _Entry) -> None:
        try:
            await self._make_room(entry)
            await self._disk.make_directory(entry.folder)
            async with asyncio.timeout(FETCH_S):
                for part in entry.parts:
                    await self._fetch_part(entry, part)
        except BaseException as error:
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]
            self._unreserve(entry)
            self._chore(self._discard(entry))
            if isinstance(error, TimeoutError):
                what = ", ".join(part.name for part in entry.parts[:3])
                raise Exhausted(f"{what}: not fetched within {FETCH_S:g} s ({entry.size} bytes)") from None
            raise
        entry.fetch = None

    async def _fetch_part(self, entry: _Entry, part: Part) -> None:
        path = f"{entry.folder}/{part.path}"
        if "/" in part.path:
            await self._disk.make_directory(path.rpartition("/")[0])
        file = await self._disk.open(path, create=True)
        entry.made.append(path)
        try:
            await self._fill(file, part)
        finally:
            await file.close()

    async def _fill(self, file: File, part: Part) -> None:
        await file.truncate(0)
        end = 0

        async def write(offset: int, data: Buffer) -> None:
            nonlocal end
            end = offset + len(data)
            if end > part.size:
                raise Corrupt(f"{part.name} has more than its {part.size} bytes")
            await file.write(offset, [data])

        await self._files.fetch(part.blocks, write, what=part.name, timeout_s=FETCH_S)
        if end != part.size:
            raise Corrupt(f"{part.name} has {end} bytes, not {part.size}")

    async def _make_room(self, entry: _Entry) -> None:
        if entry.size > self._bytes_max:
            raise Exhausted(
                f"{entry.parts[0].name} has {entry.size} bytes, the worker's cache holds {self._bytes_max}: split it, or "
                "raise cache_bytes in node.toml"
            )
        try:
            async with asyncio.timeout(ROOM_S):
                while not self._evict_for(entry.size):
                    self._room.clear()
                    await self._room.wait()
                self.bytes_used += entry.size
                entry.reserved = True
        except TimeoutError:
            raise Exhausted(
                f"{entry.parts[0].name} needs {entry.size} bytes, but of the {self._bytes_max} of the worker's cache "
                f"{self.bytes_used} are in use: raise cache_bytes in node.toml, or undeploy a model"
            ) from None

    def _evict_for(self, size: int) -> bool:
        for entry in list(self._entries.values()):
            if self.bytes_used + size <= self._bytes_max:
                break
            if entry.pins == 0 and entry.fetch is None:
                del self._entries[entry.key]
                self._unreserve(entry)
                self._chore(self._discard(entry))
        return self.bytes_used + size <= self._bytes_max

    def _unreserve(self, entry: _Entry) -> None:
        if entry.reserved:
            entry.reserved = False
            self.bytes_used -= entry.size
            self._room.set()

    async def _discard(self, entry: _Entry) -> None:
        """Remove the files of an entry that nobody finds any more, then let its folder be used again."""
        for path in entry.made:
            try:
                await self._disk.remove(path)
            except IdunnoError as error:
                # The folder is not used again, so what stays there can do no harm until the next start removes it.
                log.warning("cache file not removed", extra={"path": path, "error": str(error)})
                return
        heapq.heappush(self._free_numbers, int(entry.folder.rpartition("/")[2]))

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chore_done)

    def _chore_done(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("chore of the cache failed", exc_info=error)

    def _number(self) -> int:
        if self._free_numbers:
            return heapq.heappop(self._free_numbers)
        self._numbers += 1
        return self._numbers

    async def _clear(self, folder: str) -> None:
        for entry in await self._disk.list(folder):
            path = f"{folder}/{entry.name}"
            if entry.is_directory:
                await self._clear(path)
            else:
                try:
                    await self._disk.remove(path)
                except NotFound:
                    continue

# tests/unit/fakes.py: stand-ins for the outside world that several packages' tests share.
#
# Rule 1: MemoryDisk keeps what a real disk may keep, and no more: after `crash()` unsynced bytes are gone or torn, and
#         unsynced names are as they were at the last `sync_directory`.
# Rule 2: nothing here draws chance of its own: what survives a crash is decided by the `random.Random` handed in.
from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from idunno.base.disk import Also, Buffer, Entry, Space
from idunno.base.errors import Corrupt, DiskFailed, NotFound

SECTOR_BYTES = 512
"""What a disk writes whole or not at all; a torn write ends or has holes at such a border."""


@dataclass(eq=False)
class _Inode:
    live: bytearray = field(default_factory=bytearray)
    synced: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (new size, None)

    def write(self, offset: int, data: bytes) -> None:
        _put(self.live, offset, data)
        self.unsynced.append((offset, data))

    def resize(self, size: int) -> None:
        _resize(self.live, size)
        self.unsynced.append((size, None))

    def sync(self) -> None:
        for at, data in self.unsynced:
            if data is None:
                _resize(self.synced, at)
            else:
                _put(self.synced, at, data)
        self.unsynced = []

    def crash(self, rng: random.Random | None) -> None:
        for at, data in self.unsynced if rng is not None else ():
            assert rng is not None
            if data is None:
                _resize(self.synced, at)
                continue
            start, stop = at, at + len(data)
            while start < stop:  # sectors reach the platter in any order, or not at all
                end = min(stop, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
                if rng.random() < 0.5:
                    _put(self.synced, start, data[start - at : end - at])
                start = end
        self.live, self.unsynced = bytearray(self.synced), []


def _put(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


class _MemoryFile:
    def __init__(self, disk: MemoryDisk, path: str, inode: _Inode) -> None:
        self._disk, self._path, self._inode, self._epoch = disk, path, inode, disk.crashes

    def _check(self, doing: str) -> None:
        if self._epoch != self._disk.crashes:
            raise DiskFailed(f"{self._path}: {doing}: opened before the crash")
        self._disk._check(doing, self._path)

    async def read(self, offset: int, length: int, *, also: Also | None = None) -> bytes:
        self._check("read")
        data = bytes(self._inode.live[offset : offset + length])
        if also is not None:
            also([data])
        return data

    def read_now(self, offset: int, length: int) -> bytes | None:
        return None

    async def write(self, offset: int, data: Sequence[Buffer], *, sync: bool = False, also: Also | None = None) -> None:
        self._check("write")
        if also is not None:
            also(data)
        joined = b"".join(data)
        self._disk._reserve(self._path, max(0, offset + len(joined) - len(self._inode.live)))
        self._inode.write(offset, joined)
        if sync:
            await self.sync()

    async def sync(self) -> None:
        self._check("sync")
        await self._disk._before_sync()
        self._check("sync")
        self._inode.sync()
        self._disk.syncs += 1

    async def allocate(self, length: int) -> None:
        self._check("allocate")
        more = max(0, length - len(self._inode.live))
        self._disk._reserve(self._path, more)
        if more:
            self._inode.resize(length)

    async def truncate(self, length: int) -> None:
        self._check("truncate")
        self._inode.resize(length)

    async def size(self) -> int:
        self._check("size")
        return len(self._inode.live)

    async def close(self) -> None:
        return None


class MemoryDisk:
    """A Disk in memory. `faults` maps an operation ("write", "sync", "allocate", "open", ...) to the error text it now
    raises; `capacity_bytes` makes it full; clearing `sync_gate` (an asyncio.Event) holds every sync until it is set."""

    def __init__(self, *, capacity_bytes: int = 1 << 40) -> None:
        self.capacity_bytes, self.crashes, self.syncs = capacity_bytes, 0, 0
        self.faults: dict[str, str] = {}
        self.sync_gate: asyncio.Event | None = None
        self._names: dict[str, _Inode] = {}
        self._durable_names: dict[str, _Inode] = {}
        self._directories: set[str] = {""}

    # -- what a test does to it -------------------------------------------------------------------------------------

    def crash(self, rng: random.Random | None = None) -> None:
        """Power loss: without `rng` everything unsynced is gone, with it each unsynced sector survives by chance."""
        self.crashes += 1
        self._names = dict(self._durable_names)
        for inode in {id(i): i for i in self._names.values()}.values():
            inode.crash(rng)

    def flip(self, path: str, offset: int, mask: int = 1) -> None:
        """Bit rot: change a synced byte."""
        inode = self._names[path]
        inode.live[offset] ^= mask
        inode.synced[offset] ^= mask

    def content(self, path: str) -> bytes:
        return bytes(self._names[path].live)

    def paths(self) -> list[str]:
        return sorted(self._names)

    @property
    def used_bytes(self) -> int:
        return sum(len(inode.live) for inode in self._names.values())

    # -- Disk -------------------------------------------------------------------------------------------------------

    async def open(self, path: str, *, create: bool = False, direct: bool = False) -> _MemoryFile:
        self._check("open", path)
        if path not in self._names:
            if not create:
                raise NotFound(f"{path}: no such file")
            if _parent(path) not in self._directories:
                raise NotFound(f"{path}: no such directory")
            self._names[path] = _Inode()
        return _MemoryFile(self, path, self._names[path])

    async def read_all(self, path: str, *, bytes_max: int) -> bytes:
        self._check("read", path)
        if path not in self._names:
            raise NotFound(f"{path}: no such file")
        data = bytes(self._names[path].live)
        if len(data) > bytes_max:
            raise Corrupt(f"{path}: {len(data)} bytes, at most {bytes_max} expected")
        return data

    async def replace(self, path: str, data: Buffer, *, mode: int = 0o600) -> None:
        self._check("replace", path)
        if _parent(path) not in self._directories:
            raise NotFound(f"{path}: no such directory")
        self._reserve(path, len(data))
        await self._before_sync()
        self._check("replace", path)
        self._names[path] = self._durable_names[path] = _Inode(bytearray(data), bytearray(data))
        self.syncs += 1

    async def rename(self, source: str, target: str) -> None:
        self._check("rename", source)
        if source not in self._names:
            raise NotFound(f"{source}: no such file")
        self._names[target] = self._names.pop(source)

    async def remove(self, path: str) -> None:
        self._check("remove", path)
        if self._names.pop(path, None) is None:
            raise NotFound(f"{path}: no such file")

    async def list(self, path: str) -> list[Entry]:
        self._check("list", path)
        prefix = path.rstrip("/") + "/" if path.rstrip("/") else ""
        found = {
            name[len(prefix) :]: Entry(name[len(prefix) :], len(inode.live), 0.0, False)
            for name, inode in self._names.items()
            if name.startswith(prefix) and "/" not in name[len(prefix) :]
        }
        for directory in self._directories:
            if directory and _parent(directory) == path.rstrip("/"):
                name = directory[len(prefix) :]
                found[name] = Entry(name, 0, 0.0, True)
        return [found[name] for name in sorted(found)]

    async def make_directory(self, path: str) -> None:
        self._check("make_directory", path)
        parts = path.strip("/").split("/")
        self._directories.update("/".join(parts[: i + 1]) for i in range(len(parts)))

    async def sync_directory(self, path: str) -> None:
        self._check("sync_directory", path)
        await self._before_sync()
        self._check("sync_directory", path)
        here = path.rstrip("/")
        kept = {name: inode for name, inode in self._durable_names.items() if _parent(name) != here}
        kept.update({name: inode for name, inode in self._names.items() if _parent(name) == here})
        self._durable_names = kept
        self.syncs += 1

    async def space(self) -> Space:
        return Space(max(0, self.capacity_bytes - self.used_bytes), self.capacity_bytes)

    def local_path(self, path: str) -> str:
        return f"/memory/{path}"

    # -- inside -----------------------------------------------------------------------------------------------------

    def _check(self, doing: str, path: str) -> None:
        if doing in self.faults:
            raise DiskFailed(f"{path}: {doing}: {self.faults[doing]}")

    def _reserve(self, path: str, more: int) -> None:
        if more > self.capacity_bytes - self.used_bytes:
            raise DiskFailed(f"{path}: No space left on device")

    async def _before_sync(self) -> None:
        if self.sync_gate is not None:
            await self.sync_gate.wait()
        else:
            await asyncio.sleep(0)  # a sync is never done in the same breath: other tasks run meanwhile


def _parent(path: str) -> str:
    return path.rpartition("/")[0]

# tests/simulation/disk.py: a machine's disk, with everything that real ones do to those who trust them.
#
# Rule 1: what a process wrote is there for the next process. What was not synced may be gone after a loss of power: each
#         sector written since the last sync survives by chance, and so does each new, renamed or removed name.
# Rule 2: a disk is slow (every operation takes virtual time), may be full, may refuse, may rot, may stall.
# Rule 3: an operation that was begun happens, whether somebody still waits for it or not: a thread carries it out.
# Rule 4: what survives, and how long something takes, is drawn from the world's seed.
from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from idunno.base.disk import Also, Buffer, Entry, Space
from idunno.base.errors import Corrupt, DiskFailed, IdunnoError, NotFound
from tests.simulation.loop import SimLoop

if TYPE_CHECKING:
    from tests.simulation.trace import Trace

SECTOR_BYTES: Final = 512
"""What a disk writes whole or not at all."""


@dataclass(eq=False, slots=True)
class Inode:
    live: bytearray = field(default_factory=bytearray)
    """As a process sees it, without the zeros at its end: `size` says how long it is."""
    size: int = 0
    synced: bytearray = field(default_factory=bytearray)
    synced_size: int = 0
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, data), or (new size, None), since the last sync."""

    def write(self, offset: int, data: bytes) -> None:
        _put(self.live, offset, data)
        self.size = max(self.size, offset + len(data))
        self.pending.append((offset, data))

    def resize(self, size: int) -> None:
        del self.live[size:]
        self.size = size
        self.pending.append((size, None))

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        found = bytes(self.live[offset : offset + length])
        return found if len(found) == length else found + bytes(length - len(found))

    def sync(self) -> None:
        for at, data in self.pending:
            self._durable(at, data)
        self.pending = []

    def _durable(self, at: int, data: bytes | None) -> None:
        if data is None:
            del self.synced[at:]
            self.synced_size = at
        else:
            _put(self.synced, at, data)
            self.synced_size = max(self.synced_size, at + len(data))

    def lose_power(self, rng: random.Random, counts: Counter[str]) -> None:
        for at, data in self.pending:
            if data is None:
                self._durable(at, None)
                continue
            start, stop, lost = at, at + len(data), 0
            while start < stop:  # sectors reach the disk in any order, or not at all
                end = min(stop, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
                if rng.random() < 0.5:
                    self._durable(start, data[start - at : end - at])
                else:
                    lost += 1
                start = end
            counts["unsynced sectors lost"] += lost
        self.pending = []
        self.live, self.size = bytearray(self.synced), self.synced_size

    def copy(self) -> Inode:
        return Inode(bytearray(self.synced), self.synced_size, bytearray(self.synced), self.synced_size)


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


@dataclass(slots=True)
class Speed:
    """How long operations take."""

    operation_s: float = 0.000_05
    sync_s: float = 0.000_8
    """A good SSD's; a tenth of them take up to ten times as long."""
    bytes_per_s: float = 500e6


Step: TypeAlias = tuple[str, float, Callable[[], Any]]
"""An operation or a part of one: its name, how long it takes, what it does at its end."""


class SimDisk:
    """The disk itself. What the world sets: `speed`, `capacity_bytes`, `refuse` (operation -> error text), `stalled_until`."""

    def __init__(self, rng: random.Random, trace: Trace, name: str) -> None:
        self.name, self.speed, self.capacity_bytes = name, Speed(), 1 << 40
        self.refuse: dict[str, str] = {}
        self.stalled_until = 0.0
        self.counts: Counter[str] = Counter()
        self._rng, self._trace = rng, trace
        self.names: dict[str, Inode] = {}
        self.durable: dict[str, Inode] = {}
        self.changes: dict[str, list[tuple[str, str]]] = {}
        """Directory -> names changed since its last sync: ("link", path), ("unlink", path), ("rename", "old\\0new")."""
        self.directories: dict[str, None] = {"": None}
        self.used = 0

    # -- what the world does to it --------------------------------------------------------------------------------

    def lose_power(self) -> None:
        for directory in list(self.changes):
            self._lose_names(directory)
        self.names = dict(self.durable)
        for inode in {id(inode): inode for inode in self.names.values()}.values():
            inode.lose_power(self._rng, self.counts)
        self._count_used()

    def _lose_names(self, directory: str) -> None:
        """Each unsynced change of a name reached the disk or did not; a renaming is one change."""
        for what, about in self.changes.pop(directory):
            if self._rng.random() < 0.5:
                self.counts["unsynced names lost"] += 1
                continue
            old, _, new = about.partition("\0")
            if what == "link" and old in self.names:
                self.durable[old] = self.names[old]
            elif what == "unlink":
                self.durable.pop(old, None)
            elif what == "rename":
                inode = self.durable.pop(old, None) or self.names.get(new)
                if inode is not None:
                    self.durable[new] = inode

    def image(self) -> dict[str, Inode]:
        """What a backup would hold: the synced contents."""
        return {name: inode.copy() for name, inode in self.durable.items()}

    def restore(self, image: dict[str, Inode]) -> None:
        self.names = {name: inode.copy() for name, inode in image.items()}
        self.durable, self.changes = dict(self.names), {}
        self._count_used()

    def rot(self, path: str, offset: int) -> None:
        """A bit flips in what was synced."""
        inode = self.names[path]
        for content in (inode.live, inode.synced):
            if offset < len(content):
                content[offset] ^= 1 << self._rng.randrange(8)
        self.counts["bits flipped"] += 1

    def paths(self, prefix: str = "") -> list[str]:
        return sorted(path for path in self.names if path.startswith(prefix))

    def content(self, path: str) -> bytes:
        inode = self.names[path]
        return inode.read(0, inode.size)

    def written_bytes(self, path: str) -> int:
        """Without the zeros that were only allocated."""
        return len(self.names[path].live)

    def put(self, path: str, content: bytes) -> None:
        """As if it had always been there."""
        self.names[path] = self.durable[path] = Inode(
            bytearray(content), len(content), bytearray(content), len(content)
        )
        self._count_used()

    # -- for the view -----------------------------------------------------------------------------------------------

    def takes(self, size: int) -> float:
        return size / self.speed.bytes_per_s

    def sync_takes(self) -> float:
        rng = self._rng
        return self.speed.sync_s * (1.0 + (rng.random() * 9.0 if rng.random() < 0.1 else rng.random()))

    def find(self, path: str) -> Inode:
        inode = self.names.get(path)
        if inode is None:
            raise NotFound(f"{path}: no such file")
        return inode

    def check_directory(self, path: str) -> None:
        if _parent(path) not in self.directories:
            raise NotFound(f"{path}: no such directory")

    def reserve(self, path: str, more: int) -> None:
        if more > 0 and self.used + more > self.capacity_bytes:
            self.counts["no space"] += 1
            raise DiskFailed(f"{path}: No space left on device")

    def changed(self, what: str, about: str, directory: str | None = None) -> None:
        where = _parent(about) if directory is None else directory
        self.changes.setdefault(where, []).append((what, about))

    def entries(self, path: str) -> list[Entry]:
        prefix = path.rstrip("/") + "/" if path.rstrip("/") else ""
        found = {
            name[len(prefix) :]: Entry(name[len(prefix) :], inode.size, 0.0, False)
            for name, inode in self.names.items()
            if name.startswith(prefix) and "/" not in name[len(prefix) :]
        }
        for directory in self.directories:
            if directory and _parent(directory) == path.rstrip("/"):
                name = directory[len(prefix) :]
                found[name] = Entry(name, 0, 0.0, True)
        return [found[name] for name in sorted(found)]

    def _count_used(self) -> None:
        self.used = sum(inode.size for inode in self.names.values())

    def synced(self, path: str) -> None:
        self._trace.note("sync", self.name, path)


class DiskView:
    """base.disk.Disk: a disk as a process sees it. `serial`: through one thread, operations wait for each other."""

    def __init__(self, disk: SimDisk, *, serial: bool) -> None:
        self._disk, self._serial, self._free_at = disk, serial, 0.0

    async def open(self, path: str, *, create: bool = False, direct: bool = False) -> SimFile:
        return SimFile(self, path, await self.do(path, ("open", 0.0, lambda: self._open(path, create=create))))

    def _open(self, path: str, *, create: bool) -> Inode:
        inode = self._disk.names.get(path)
        if inode is None:
            if not create:
                raise NotFound(f"{path}: no such file")
            self._disk.check_directory(path)
            inode = self._disk.names[path] = Inode()
            self._disk.changed("link", path)
        return inode

    async def read_all(self, path: str, *, bytes_max: int) -> bytes:
        def read() -> bytes:
            inode = self._disk.find(path)
            if inode.size > bytes_max:
                raise Corrupt(f"{path}: {inode.size} bytes, at most {bytes_max} expected")
            return inode.read(0, inode.size)

        found: bytes = await self.do(path, ("read", 0.0, read))
        return found

    async def replace(self, path: str, data: Buffer, *, mode: int = 0o600) -> None:
        content, temporary = bytes(data), f"{path}.new"

        def write() -> None:
            self._disk.check_directory(path)
            self._disk.reserve(path, len(content))
            old = self._disk.names.get(temporary)
            self._disk.used += len(content) - (old.size if old is not None else 0)
            inode = self._disk.names[temporary] = Inode()
            inode.write(0, content)
            self._disk.changed("link", temporary)

        def publish() -> None:
            inode = self._disk.names.pop(temporary)
            inode.sync()
            old = self._disk.names.get(path)
            self._disk.used -= old.size if old is not None else 0
            self._disk.names[path] = self._disk.durable[path] = inode
            self._disk.changes[_parent(path)] = [
                c for c in self._disk.changes.get(_parent(path), []) if c[1] != temporary
            ]

        await self.do(
            path, ("replace", self._disk.takes(len(content)), write), ("sync", self._disk.sync_takes(), publish)
        )

    async def rename(self, source: str, target: str) -> None:
        def rename() -> None:
            inode = self._disk.find(source)
            old = self._disk.names.get(target)
            self._disk.used -= old.size if old is not None else 0
            del self._disk.names[source]
            self._disk.names[target] = inode
            self._disk.changed("rename", f"{source}\0{target}", _parent(target))

        await self.do(source, ("rename", 0.0, rename))

    async def remove(self, path: str) -> None:
        def remove() -> None:
            self._disk.used -= self._disk.find(path).size
            del self._disk.names[path]
            self._disk.changed("unlink", path)

        await self.do(path, ("remove", 0.0, remove))

    async def list(self, path: str) -> list[Entry]:
        return self._disk.entries(path) if await self.do(path, ("list", 0.0, lambda: True)) else []

    async def make_directory(self, path: str) -> None:
        def make() -> None:
            parts = path.strip("/").split("/")
            for count in range(len(parts)):
                self._disk.directories["/".join(parts[: count + 1])] = None

        await self.do(path, ("make_directory", 0.0, make))

    async def sync_directory(self, path: str) -> None:
        def sync() -> None:
            here = path.rstrip("/")
            self._disk.durable = {name: inode for name, inode in self._disk.durable.items() if _parent(name) != here}
            self._disk.durable.update(
                (name, inode) for name, inode in self._disk.names.items() if _parent(name) == here
            )
            self._disk.changes.pop(here, None)

        await self.do(path, ("sync", self._disk.sync_takes(), sync))

    async def space(self) -> Space:
        found: Space = await self.do("", ("space", 0.0, self._space))
        return found

    def _space(self) -> Space:
        return Space(max(0, self._disk.capacity_bytes - self._disk.used), self._disk.capacity_bytes)

    def local_path(self, path: str) -> str:
        return f"/{self._disk.name}/{path}"

    # -- inside ---------------------------------------------------------------------------------------------------

    async def do(self, path: str, *steps: Step) -> Any:
        """What the last of `steps` returns. They happen one after another, each at the end of its time."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        done = loop.create_future()
        now = loop.scheduler.now
        start = max(now, self._free_at) if self._serial else now
        when = start + self._disk.speed.operation_s + steps[0][1]
        if self._serial:
            self._free_at = when + sum(seconds for _, seconds, _ in steps[1:])
        loop.deliver_at(when, self._step, loop, done, path, steps, 0)
        return await done

    def _step(self, loop: SimLoop, done: asyncio.Future[Any], path: str, steps: tuple[Step, ...], number: int) -> None:
        now = loop.scheduler.now
        if now < self._disk.stalled_until:
            self._disk.counts["stalled"] += 1
            loop.deliver_at(self._disk.stalled_until, self._step, loop, done, path, steps, number)
            return
        doing, _, work = steps[number]
        try:
            if doing in self._disk.refuse:
                self._disk.counts["refused"] += 1
                raise DiskFailed(f"{path}: {doing}: {self._disk.refuse[doing]}")
            result = work()
        except IdunnoError as error:
            if not done.done():
                done.set_exception(error)
            return
        if doing == "sync":
            self._disk.synced(path)
        if number + 1 < len(steps):
            loop.deliver_at(now + steps[number + 1][1], self._step, loop, done, path, steps, number + 1)
        elif not done.done():
            done.set_result(result)


class SimFile:
    """base.disk.File."""

    def __init__(self, view: DiskView, path: str, inode: Inode) -> None:
        self._view, self._disk, self._path, self._inode = view, view._disk, path, inode

    async def read(self, offset: int, length: int, *, also: Also | None = None) -> bytes:
        inode = self._inode
        takes = self._disk.takes(max(0, min(length, len(inode.live) - offset)))
        found: bytes = await self._view.do(self._path, ("read", takes, lambda: inode.read(offset, length)))
        if also is not None:
            also([found])
        return found

    def read_now(self, offset: int, length: int) -> bytes | None:
        return None

    async def write(self, offset: int, data: Sequence[Buffer], *, sync: bool = False, also: Also | None = None) -> None:
        joined = b"".join(data)
        if also is not None:
            also(data)

        def write() -> None:
            self._grow(offset + len(joined))
            self._inode.write(offset, joined)

        step: Step = ("write", self._disk.takes(len(joined)), write)
        if sync:
            await self._view.do(self._path, step, self._sync())
        else:
            await self._view.do(self._path, step)

    async def sync(self) -> None:
        await self._view.do(self._path, self._sync())

    def _sync(self) -> Step:
        return "sync", self._disk.sync_takes(), self._inode.sync

    async def allocate(self, length: int) -> None:
        def allocate() -> None:
            if length > self._inode.size:
                self._grow(length)
                self._inode.resize(length)

        await self._view.do(self._path, ("allocate", 0.0, allocate))

    async def truncate(self, length: int) -> None:
        def truncate() -> None:
            self._disk.used += length - self._inode.size
            self._inode.resize(length)

        await self._view.do(self._path, ("truncate", 0.0, truncate))

    async def size(self) -> int:
        found: int = await self._view.do(self._path, ("look", 0.0, lambda: self._inode.size))
        return found

    async def close(self) -> None:
        return

    def _grow(self, size: int) -> None:
        more = max(0, size - self._inode.size)
        self._disk.reserve(self._path, more)
        self._disk.used += more


def _parent(path: str) -> str:
    return path.rpartition("/")[0]

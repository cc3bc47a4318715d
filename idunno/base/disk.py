# idunno/base/disk.py: the disk as everything but the composition root sees it.
#
# Rule 1: paths are relative to the node's data directory, with '/', e.g. "log/0000000001.seg".
# Rule 2: nothing is durable until it is synced: data by `sync`, a name (created, renamed, removed) by `sync_directory`.
# Rule 3: every failure of the device or the system is a DiskFailed; a file that is not there is a NotFound.
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview
Also = Callable[[Sequence[Buffer]], object]
"""What else is done with bytes that are being written or read."""


@dataclass(frozen=True, slots=True)
class Entry:
    name: str  # without its directory
    size: int  # bytes
    modified_s: float  # the file system's own time; for people and caches, never for decisions between nodes
    is_directory: bool


@dataclass(frozen=True, slots=True)
class Space:
    free_bytes: int
    total_bytes: int


class File(Protocol):
    """An open file. Methods of one file may be awaited one after another only; the caller keeps the order."""

    async def read(self, offset: int, length: int, *, also: Also | None = None) -> bytes:
        """Up to `length` bytes from `offset`; fewer only at the end of the file.

        `also` is given them before they are, in the thread that read them.
        """
        ...

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Exactly these bytes, if the system has them in memory; None when it does not, or cannot tell: `read` them then."""
        ...

    async def write(self, offset: int, data: Sequence[Buffer], *, sync: bool = False, also: Also | None = None) -> None:
        """Write the buffers one after another at `offset`; with `sync` they are durable on return (fdatasync).

        Where they are much the device begins to write them at once, which makes a later `sync` short. `also`: what else is to
        be done with the bytes off the loop, such as hashing them, before they are written: one hand-over to another thread
        instead of two. It is given all of them, in order, in one part or several.
        """
        ...

    async def sync(self) -> None: ...

    async def allocate(self, length: int) -> None:
        """Reserve space so that the file has at least `length` bytes, new ones zero. Raises DiskFailed if there is none."""
        ...

    async def truncate(self, length: int) -> None: ...

    async def size(self) -> int: ...

    async def close(self) -> None: ...


class Disk(Protocol):
    async def open(self, path: str, *, create: bool = False, direct: bool = False) -> File:
        """Open for reading and writing. `create` makes the file (not its directory) when it is not there.

        `direct`: for large content that is written and read once, in order: it goes past the system's cache where it can.
        """
        ...

    async def read_all(self, path: str, *, bytes_max: int) -> bytes:
        """A whole small file. Raises NotFound, and Corrupt when it is larger than `bytes_max`."""
        ...

    async def replace(self, path: str, data: Buffer, *, mode: int = 0o600) -> None:
        """Make `path` hold `data`, durably and atomically: temporary file, sync, rename, sync of the directory."""
        ...

    async def rename(self, source: str, target: str) -> None: ...

    async def remove(self, path: str) -> None:
        """Remove a file. Raises NotFound."""
        ...

    async def list(self, path: str) -> list[Entry]:
        """What the directory holds, sorted by name; [] when it is not there."""
        ...

    async def make_directory(self, path: str) -> None:
        """Make it and its parents, durably; nothing happens when it is there."""
        ...

    async def sync_directory(self, path: str) -> None: ...

    async def space(self) -> Space: ...

    def local_path(self, path: str) -> str:
        """The absolute path for handing to another process (a model child). Never used to get round this interface."""
        ...

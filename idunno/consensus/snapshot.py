# idunno/consensus/snapshot.py: the file of a snapshot: what it is of, and a stream of bytes that only the machine understands.
#
# Rule 1: it is written beside and takes its place whole, synced, by one rename: there is the old one or the new one.
# Rule 2: every piece carries a checksum over itself and all before it; a file without its end mark is none.
# Rule 3: one that comes from the leader is its file, byte for byte, in order; it is checked whole before it counts.
#
# Layout, little-endian: magic, format (u16), zero (u16), length of the head (u32), head (MessagePack), CRC-32 of all that; then
# pieces: length (u32, 1 to PIECE_BYTES), CRC-32 (u32), bytes; then 0 (u32), CRC-32 (u32) of the count of bytes (u64).
from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator, Iterable
from typing import Final

import msgspec

from idunno.base.disk import Disk, File
from idunno.base.errors import Corrupt, Incompatible, NotFound
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.records import REJOIN
from idunno.consensus.voters import VOTERS_MAX

PATH: Final = "log/snapshot"
NEW_PATH: Final = "log/snapshot.new"
PART_PATH: Final = "log/snapshot.part"
MAGIC: Final = b"idunnoSN"
FORMAT: Final = 1
PIECE_BYTES: Final = 256 * 1024
HEAD_BYTES_MAX: Final = 4096
BYTES_MAX: Final = 64 * 1024**3
"""What a leader may announce: a cluster of a hundred million files."""

_BEGIN: Final = struct.Struct("<8sHHI")
_CRC: Final = struct.Struct("<I")
_PIECE: Final = struct.Struct("<II")
_COUNT: Final = struct.Struct("<Q")


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The machine after entry `index` of `term`, with the voters that the entry `voters_index` named (0: the first ones)."""

    index: Index
    term: Term
    voters: tuple[NodeId, ...]
    voters_index: Index


async def write(disk: Disk, path: str, head: Head, content: AsyncIterator[bytes]) -> int:
    """Write and sync a snapshot's file; returns its size. Raises DiskFailed, and what `content` raises."""
    await _remove(disk, path)
    file = await disk.open(path, create=True)
    try:
        packed = msgspec.msgpack.encode(head)
        begin = _BEGIN.pack(MAGIC, FORMAT, 0, len(packed)) + packed
        checksum, at, total = zlib.crc32(begin), 0, 0
        await file.write(0, [begin, _CRC.pack(checksum)])
        at = len(begin) + _CRC.size
        async for piece in _even(content):
            checksum = zlib.crc32(piece, checksum)
            await file.write(at, [_PIECE.pack(len(piece), checksum), piece])
            at += _PIECE.size + len(piece)
            total += len(piece)
        end = _PIECE.pack(0, zlib.crc32(_COUNT.pack(total), checksum))
        await file.write(at, [end])
        await file.sync()
        return at + len(end)
    finally:
        await file.close()


async def _even(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces of PIECE_BYTES."""
    waiting = bytearray()
    async for part in content:
        waiting += part
        while len(waiting) >= PIECE_BYTES:
            yield bytes(waiting[:PIECE_BYTES])
            del waiting[:PIECE_BYTES]
    if waiting:
        yield bytes(waiting)


async def replace(disk: Disk, path: str) -> None:
    """`path`, synced, becomes the snapshot."""
    await disk.rename(path, PATH)
    await disk.sync_directory("log")


class Reader:
    """A snapshot's file, open: `head`, then `content()`."""

    def __init__(self, file: File, path: str, head: Head, size: int, at: int, checksum: int) -> None:
        self.head, self.size = head, size
        self._file, self._path, self._at, self._checksum = file, path, at, checksum

    @classmethod
    async def open(cls, disk: Disk, path: str) -> Reader:
        """Raises NotFound, Corrupt, Incompatible, DiskFailed."""
        file = await disk.open(path)
        try:
            size = await file.size()
            data = await file.read(0, _BEGIN.size + HEAD_BYTES_MAX + _CRC.size)
            head, at, checksum = decode_head(data, path)
        except BaseException:
            await file.close()
            raise
        return cls(file, path, head, size, at, checksum)

    async def content(self) -> AsyncIterator[bytes]:
        """Pieces of at most PIECE_BYTES. Raises Corrupt; only the end of the iteration says that all was as it was written."""
        at, checksum, total = self._at, self._checksum, 0
        while True:
            head = await self._file.read(at, _PIECE.size)
            length, wanted = _PIECE.unpack(head) if len(head) == _PIECE.size else (PIECE_BYTES + 1, 0)
            if length > PIECE_BYTES:
                raise Corrupt(f"{self._path} is damaged at offset {at}; {REJOIN}")
            at += _PIECE.size
            if length == 0:
                if zlib.crc32(_COUNT.pack(total), checksum) != wanted or at != self.size:
                    raise Corrupt(f"{self._path} does not end as it was written, at offset {at}; {REJOIN}")
                return
            piece = await self._file.read(at, length)
            checksum = zlib.crc32(piece, checksum)
            if len(piece) != length or checksum != wanted:
                raise Corrupt(f"{self._path} is damaged at offset {at}; {REJOIN}")
            at += length
            total += length
            yield piece

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file itself, to be sent."""
        return await self._file.read(offset, length)

    async def close(self) -> None:
        await self._file.close()


def decode_head(data: bytes, path: str) -> tuple[Head, int, int]:
    """(head, its end, its checksum). Raises Corrupt, Incompatible."""
    if len(data) < _BEGIN.size or data[: len(MAGIC)] != MAGIC:
        raise Corrupt(f"{path} is no snapshot; {REJOIN}")
    _, format_, _, length = _BEGIN.unpack_from(data)
    if format_ != FORMAT:
        raise Incompatible(f"{path} has format {format_}, this version of idunno reads {FORMAT}: use a newer one")
    end = _BEGIN.size + length
    if length > HEAD_BYTES_MAX or end + _CRC.size > len(data):
        raise Corrupt(f"{path} is damaged at its head; {REJOIN}")
    checksum = zlib.crc32(data[:end])
    if _CRC.unpack_from(data, end)[0] != checksum:
        raise Corrupt(f"{path} is damaged at its head; {REJOIN}")
    try:
        head = msgspec.msgpack.decode(data[_BEGIN.size : end], type=Head)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{path} has a head that this version does not know ({error}); {REJOIN}") from error
    if head.index < 1 or head.term < 1 or len(head.voters) > VOTERS_MAX or head.voters_index > head.index:
        raise Corrupt(f"{path} is of entry {head.index}, term {head.term}, {len(head.voters)} voters; {REJOIN}")
    return head, end + _CRC.size, checksum


async def clear(disk: Disk, paths: Iterable[str] = (NEW_PATH, PART_PATH)) -> None:
    """Remove what interrupted attempts left."""
    for path in paths:
        await _remove(disk, path)


async def _remove(disk: Disk, path: str) -> None:
    try:
        await disk.remove(path)
    except NotFound:
        return

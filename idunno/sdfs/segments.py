# idunno/sdfs/segments.py: how small contents lie in their segments, and how what is good of a damaged one is found.
#
# Rule 1: a record counts when its checksum holds, whatever is before it: behind damage the next good one is looked for.
# Rule 2: damage is looked past for RESYNC_BYTES: a sector or a page of it. Behind more of it, or behind a torn end, nothing is.
#
# Layout: small/<number>.seg, each SEGMENT_MAGIC, then records: content length (u16), CRC-32 of the rest (u32), BLAKE3 of the
# content (32 bytes), content; big-endian.
from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import AsyncGenerator
from functools import partial
from typing import Final, NamedTuple

from idunno.base.disk import Buffer, Disk
from idunno.base.errors import DiskFailed
from idunno.base.ids import BlockId
from idunno.coordinator.records import SMALL_BYTES_MAX
from idunno.sdfs.hashing import Offload

log = logging.getLogger("idunno.sdfs")

SEGMENT_MAGIC: Final = b"IDSMALL1"
CHUNK_BYTES: Final = 1024 * 1024
"""Read at once: all that scanning a segment takes of memory."""
RESYNC_BYTES: Final = 16 * 1024
"""A page of 4 KiB is gone, and the record that begins in it: a good one follows within 8.2 KiB. Trying each byte takes 5 ms."""

_HEAD: Final = struct.Struct(">HI32s")
HEAD_BYTES: Final = _HEAD.size


class Record(NamedTuple):
    key: bytes
    """The content's BLAKE3."""
    offset: int
    """Of the content."""
    length: int


class Parsed(NamedTuple):
    records: list[Record]
    used: int
    """Where the next record begins; 0 when nothing good was found."""
    damaged: bool


def path_of(segment: int) -> str:
    return f"small/{segment:010}.seg"


def head_of(block: BlockId, content: Buffer) -> bytes:
    key = bytes.fromhex(block)
    return _HEAD.pack(len(content), zlib.crc32(content, zlib.crc32(key)), key)


class Walk:
    """The good records of one segment of `size` bytes, a chunk at a time."""

    def __init__(self, disk: Disk, path: str, size: int, offload: Offload) -> None:
        self._disk, self._path, self._size, self._offload = disk, path, size, offload
        self.whole = False
        """Behind the last chunk: whether all of it are good records, to its very end."""
        self.readable = True

    async def chunks(self) -> AsyncGenerator[tuple[int, bytes, list[Record]], None]:
        """(where the chunk begins, its bytes, its records, whose offsets are in it). Raises NotFound."""
        try:
            file = await self._disk.open(self._path)
        except DiskFailed as error:
            self._unreadable(0, error)
            return
        try:
            whole, offset = self._size > 0, 0
            while offset < self._size:
                try:
                    data = await file.read(offset, CHUNK_BYTES)
                except DiskFailed as error:
                    self._unreadable(offset, error)
                    whole, offset = False, offset + CHUNK_BYTES
                    continue
                begin = 0
                if offset == 0:
                    begin = len(SEGMENT_MAGIC)
                    whole = data[:begin] == SEGMENT_MAGIC
                parsed = await self._offload(partial(parse, data, begin, offset + len(data) >= self._size))
                whole = whole and not parsed.damaged
                yield offset, data, parsed.records
                if parsed.used == 0:
                    break
                offset += parsed.used
            self.whole = whole and offset == self._size
        finally:
            await file.close()

    def _unreadable(self, offset: int, error: DiskFailed) -> None:
        self.readable = False
        log.error("small contents unreadable", extra={"path": self._path, "offset": offset, "error": str(error)})


def parse(data: bytes, begin: int, last: bool) -> Parsed:
    """The good records in `data` behind `begin`. `last`: nothing comes behind it."""
    records: list[Record] = []
    at, damaged = begin, False
    while at < len(data):
        found = _record(data, at)
        if found is None and not last and at + HEAD_BYTES + SMALL_BYTES_MAX > len(data) and at > begin:
            break  # it may go on in the next chunk, which begins with it
        if found is None:
            damaged = True
            found = _next_record(data, at)
            if found is None:
                if last or at == begin:
                    return Parsed(records, 0, True)
                break  # with more of what is behind it, perhaps
        records.append(found)
        at = found.offset + found.length
    return Parsed(records, at, damaged)


def _record(data: bytes, at: int) -> Record | None:
    """The good record whose head is at `at`."""
    if at + HEAD_BYTES > len(data):
        return None
    length, checksum, key = _HEAD.unpack_from(data, at)
    content_at = at + HEAD_BYTES
    if not 1 <= length <= SMALL_BYTES_MAX or content_at + length > len(data):
        return None
    if zlib.crc32(memoryview(data)[content_at : content_at + length], zlib.crc32(key)) != checksum:
        return None
    return Record(key, content_at, length)


def _next_record(data: bytes, damaged: int) -> Record | None:
    """The next good one behind a head that is none, or whose content is not good."""
    if damaged + 2 <= len(data):  # where it is if the length is right
        length = data[damaged] << 8 | data[damaged + 1]
        if found := _record(data, damaged + HEAD_BYTES + length):
            return found
    for at in range(damaged + 1, min(len(data) - HEAD_BYTES, damaged + RESYNC_BYTES)):
        if data[at] <= SMALL_BYTES_MAX >> 8 and (found := _record(data, at)):
            return found
    return None

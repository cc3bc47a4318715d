# idunno/sdfs/small.py: contents of small files (up to SMALL_BYTES_MAX), kept on every node.
#
# Rule 1: the bytes come with the log (KeepSmall), so this store is a copy: `keep` only queues, a task writes behind, and
#         only a full segment and `close` are synced. What a crash loses comes again when the log is replayed.
# Rule 2: a content can be read from the moment it is kept: from the queue until it is on the disk.
# Rule 3: what is read is checked against its name; a bad record is as if it were not there.
# Rule 4: what nothing refers to goes with its segment. Marked is what a snapshot refers to, and what was kept since (marks.py);
#         swept, when that snapshot counts, is a full segment of which half or less is marked: that is written anew, and synced
#         before the file goes. So what the machine of the newest snapshot and the log behind it refer to is here always.
# Rule 5: what a failed sync may have lost is written anew before anything counts as synced: the system calls the next one good.
# Rule 6: the queue is bounded. When the disk cannot follow, contents are dropped with a log line, and read from other nodes.
#
# Layout: small/<number>.seg, each SEGMENT_MAGIC, then records: content length (u16), CRC-32 of the rest (u32), BLAKE3 of the
# content (32 bytes), content; big-endian.
from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Final

from idunno.base.disk import Buffer, Disk, File
from idunno.base.errors import DiskFailed, Exhausted, NotFound
from idunno.base.ids import BlockId
from idunno.coordinator.records import SMALL_BYTES_MAX
from idunno.sdfs import tasks
from idunno.sdfs.hashing import Offload, block_id
from idunno.sdfs.marks import Marks, Place
from idunno.sdfs.readers import Readers

log = logging.getLogger("idunno.sdfs")

SEGMENT_MAGIC: Final = b"IDSMALL1"
SEGMENT_BYTES_MAX: Final = 64 * 1024 * 1024
"""A new segment is begun above this: scanning one at start takes 1 MiB of memory whatever its size; this bounds its loss."""
QUEUE_BYTES_MAX: Final = 16 * 1024 * 1024
"""4,096 of the largest small files; writing behind is faster than the log's syncs, so it fills up only when the disk fails."""
BATCH_BYTES: Final = 1024 * 1024
GATHER_S: Final = 0.05
"""How long what is queued may wait for more: nothing depends on it being on the disk (rule 1), and a write costs two hand-overs
to a thread, however little it holds."""
RETRY_S: Final = 1.0
LIVE_SHARE_MAX: Final = 0.5
"""Of a segment that is swept: one byte is written for each that becomes free, at most."""
SWEEP_BYTES_MAX: Final = 4 * SEGMENT_BYTES_MAX
"""Of segments that one sweep reads: a second's work, and as much as log comes from snapshot to snapshot."""
SLICE: Final = 2_000
"""Records that are looked at, or written, between two breaths of the loop: a few ms."""
EMPTY: Final = block_id(b"")
"""An empty file's content takes no record."""

_HEAD: Final = struct.Struct(">HI32s")


class _UnreadableError(Exception):
    """A doubted segment, where DiskFailed may be about the one that is written."""


class SmallStore:
    """Small contents by their BLAKE3."""

    def __init__(self, disk: Disk, offload: Offload) -> None:
        self._disk, self._offload = disk, offload
        self.segment_bytes, self.live_share_max = SEGMENT_BYTES_MAX, LIVE_SHARE_MAX
        self._index: dict[bytes, Place] = {}
        self._marks: Marks | None = None  # from `mark` until what it began is swept, or begun anew
        self._pins = 0
        self._doubted: set[int] = set()
        """Segments of which a sync failed. The system may say of the next one that all is well: nothing more is written to them,
        and nothing counts as synced before what they hold is written anew, and synced, elsewhere."""
        self._synced = True  # whether the segment that is written was ever synced since it was begun
        self._hollow: set[int] = set()  # those doubted that never were: nothing in them is durable
        self.losses = 0
        """How often something that was here is found unreadable, and is here no more."""
        self._queue: dict[BlockId, bytes] = {}  # in order of arrival
        self._queue_bytes = 0
        self._segment, self._end = 0, 0  # where the next record goes
        self._file: File | None = None  # of that segment
        self._writing = asyncio.Lock()  # `flush` and the task write alike
        self._flushing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._full = asyncio.Event()  # enough is queued for a batch, or this is closing
        self._closing = False
        self._readers = Readers(disk, _path)
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0
        """Contents that did not fit the queue, since the start."""

    async def open(self) -> None:
        """Read all segments to learn what they hold; a torn end is cut off."""
        await self._disk.make_directory("small")
        for entry in await self._disk.list("small"):
            number, _, rest = entry.name.partition(".")
            if rest == "seg" and number.isdecimal():
                self._segment = int(number)
                self._end = await self._scan(self._segment, entry.size)
        await self._append_to(self._segment or 1)
        self._task = tasks.begin(self._write_behind(), "small-store")

    def __contains__(self, block: BlockId) -> bool:
        return block == EMPTY or block in self._queue or bytes.fromhex(block) in self._index

    def keep(self, block: BlockId, content: bytes) -> None:
        """Hold `content`, which the caller knows to be the block's. Idempotent; never waits, never fails."""
        if self.hold(block):
            return
        if self._queue_bytes + len(content) > QUEUE_BYTES_MAX:
            self.dropped += 1
            log.error("small content dropped", extra={"block": block, "queued_bytes": self._queue_bytes})
            return
        self._queue[block] = content
        self._queue_bytes += len(content)
        self._wake.set()
        if self._queue_bytes >= BATCH_BYTES:
            self._full.set()

    def hold(self, block: BlockId) -> bool:
        """Whether the content is here. If so something refers to it: the sweep that is prepared or under way leaves it."""
        if block == EMPTY or block in self._queue:
            return True
        place = self._index.get(bytes.fromhex(block))
        if place is not None and self._marks is not None:
            self._marks.add(place)
        return place is not None

    def check_room(self) -> None:
        """Raises Exhausted when the disk is so far behind that no new small file should be begun here."""
        if self._queue_bytes > QUEUE_BYTES_MAX // 2:
            raise Exhausted(
                f"{self._queue_bytes:,} bytes of small files wait for the disk (at most {QUEUE_BYTES_MAX // 2:,}); "
                "look for a full or failing disk on this node"
            )

    async def get(self, block: BlockId) -> bytes | None:
        """The content; None when it is not here, or not as its name says."""
        if block == EMPTY:
            return b""
        if (queued := self._queue.get(block)) is not None:
            return queued
        key = bytes.fromhex(block)
        place = self._index.get(key)
        if place is None:
            return None
        segment, offset, length = place
        try:
            content = await self._readers.read(segment, offset, length)
        except (DiskFailed, NotFound) as error:
            if block in self._queue or self._index.get(key) != place:
                return await self.get(block)  # swept meanwhile: moved, kept anew, or gone
            log.error("small content unreadable", extra={"block": block, "error": str(error)})
            return None
        if block_id(content) != block:
            log.error("small content is corrupt", extra={"block": block, "segment": segment, "offset": offset})
            if self._index.get(key) == place:
                del self._index[key]  # so that it can be kept anew
                self.losses += 1
            return None
        return content

    async def flush(self) -> None:
        """Everything kept so far, but for what `losses` counts, is on the disk, synced, when this returns. Raises DiskFailed."""
        async with self._flushing:
            doubted, all_read = sorted(self._doubted), True
            for segment in doubted:
                all_read &= await self._write_elsewhere(segment)
                if segment in self._hollow and all_read:
                    # Else a disk that goes on failing were filled with one copy behind the other.
                    await self._let_go(segment)
            last = next(reversed(self._queue), None)  # what comes meanwhile does not keep this from ending
            while last in self._queue:
                await self._write_batch()
            async with self._writing:
                await self._sync(self._open_file())
            if more := self._doubted.difference(doubted):  # the sync of one that became full failed meanwhile
                raise DiskFailed(f"{_path(min(more))} could not be synced")
            for segment in doubted:
                if not all_read:  # they stay: what was synced of them before may be readable at the next start
                    self._doubted.discard(segment)
                    self._hollow.discard(segment)
                elif segment in self._doubted:
                    await self._let_go(segment)
                log.info("small contents written anew", extra={"path": _path(segment)})

    async def _sync(self, file: File) -> None:
        try:
            await file.sync()
            self._synced = True
        except DiskFailed:
            self._doubted.add(self._segment)
            if not self._synced:
                self._hollow.add(self._segment)
            raise

    async def _write_elsewhere(self, segment: int) -> bool:
        """Have all contents of a doubted segment written anew. False when some could not be read: that is here no more."""
        async with self._writing:
            if segment == self._segment:
                await self._begin_another()
        moved: dict[bytes, Place] = {}
        size = (await self._sizes()).get(segment)
        if size is None:
            return True  # its removal was interrupted
        try:
            damaged = await self._move(segment, size, None, moved)
        except _UnreadableError as error:
            log.error("small contents unreadable", extra={"path": _path(segment), "error": str(error)})
            await self._give_up(segment, moved)
            return False
        if damaged:
            await self._give_up(segment, moved)
        return True

    def _open_file(self) -> File:
        if self._file is None:  # closed: a node that stops does not wait for a disk for ever
            raise DiskFailed("small contents are not written any more: the node is stopping")
        return self._file

    async def close(self) -> None:
        """Write what is queued, sync, let go. Raises DiskFailed."""
        self._closing = True
        self._wake.set()
        self._full.set()
        if self._task is not None:
            await self._task  # it ends by itself: a batch under way is never torn
            self._task = None
        try:
            if self._file is not None:
                await self.flush()
        finally:
            await self._readers.close()
            if self._file is not None:
                await self._file.close()
                self._file = None

    # -- writing behind -----------------------------------------------------------------------------------------------

    async def _write_behind(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._queue and not self._closing:
                    await self._gather()
                    await self._write_batch()
            except DiskFailed as error:
                log.error("small contents not written", extra={"waiting": len(self._queue), "error": str(error)})
                loop.call_later(RETRY_S, self._wake.set)

    async def _gather(self) -> None:
        """Until there is a batch, or the oldest of what is queued has waited GATHER_S."""
        if self._queue_bytes < BATCH_BYTES and not self._closing:
            self._full.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._full.wait()

    async def _write_batch(self) -> None:
        async with self._writing:
            if self._queue:
                await self._write_records()

    async def _write_records(self) -> None:
        if self._end >= self.segment_bytes or self._segment in self._doubted:
            await self._begin_another()
        records: list[Buffer] = []
        places: dict[BlockId, tuple[int, int, int]] = {}
        at = self._end
        for block, content in self._queue.items():
            head = _HEAD.pack(len(content), zlib.crc32(content, zlib.crc32(key := bytes.fromhex(block))), key)
            records += [head, content]
            places[block] = (self._segment, at + len(head), len(content))
            at += len(head) + len(content)
            if at - self._end >= BATCH_BYTES or len(places) >= SLICE:
                break
        await self._open_file().write(self._end, records)
        self._end = at
        for block, place in places.items():
            self._index[bytes.fromhex(block)] = place
            self._queue_bytes -= len(self._queue.pop(block))

    async def _begin_another(self) -> None:
        full = self._open_file()
        if self._segment not in self._doubted:
            await self._sync(full)
        await self._append_to(self._segment + 1)
        await full.close()

    async def _append_to(self, segment: int) -> None:
        path = _path(segment)
        file = await self._disk.open(path, create=True)
        try:
            await self._begin_or_cut(segment, file)
        except BaseException:
            await file.close()
            raise
        self._file = file

    async def _begin_or_cut(self, segment: int, file: File) -> None:
        if segment != self._segment or self._end < len(SEGMENT_MAGIC):
            await file.truncate(0)
            await file.write(0, [SEGMENT_MAGIC])
            await self._disk.sync_directory("small")
            self._segment, self._end, self._synced = segment, len(SEGMENT_MAGIC), False
        else:
            await file.truncate(self._end)

    # -- sweeping -----------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """Begin to mark: from now on what is held is what a sweep leaves. Marks that nothing was swept by are forgotten."""
        self._marks = Marks(self._segment, _HEAD.size)

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """Within, no sweep begins: for who reads what a machine of some time ago refers to."""
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1

    async def sweep(self) -> None:
        """All that is referred to was held since `mark`: let go of the rest, as far as it lies in segments that are worth it.

        What cannot be done now is tried again with the next marks.
        """
        marks = self._marks
        if marks is None or self._pins:
            return
        try:
            for segment, size in await self._worth(marks):
                try:
                    await self._sweep_segment(segment, size, marks)
                except (DiskFailed, NotFound) as error:
                    log.warning("small contents not swept", extra={"path": _path(segment), "error": str(error)})
        except DiskFailed as error:
            log.warning("small contents not swept", extra={"path": "small", "error": str(error)})
        finally:
            self._marks = None

    async def _worth(self, marks: Marks) -> list[tuple[int, int]]:
        """Numbers and sizes of the segments to be swept, those first that most becomes free of."""
        found = (await self._sizes()).items()
        sizes = {segment: size for segment, size in found if segment < marks.before and segment not in self._doubted}
        worth, read = [], 0
        for segment in sorted(sizes, key=lambda segment: (marks.live_bytes[segment] / max(1, sizes[segment]), segment)):
            read += sizes[segment]
            if marks.live_bytes[segment] > self.live_share_max * sizes[segment] or read > SWEEP_BYTES_MAX:
                break
            worth.append((segment, sizes[segment]))
        return worth

    async def _sizes(self) -> dict[int, int]:
        """Bytes of each segment."""
        entries = [(*entry.name.partition("."), entry.size) for entry in await self._disk.list("small")]
        return {int(number): size for number, _, rest, size in entries if rest == "seg" and number.isdecimal()}

    async def _sweep_segment(self, segment: int, size: int, marks: Marks) -> None:
        moved: dict[bytes, Place] = {}
        try:
            if await self._move(segment, size, marks, moved):
                await self._give_up(segment, moved)
            await self.flush()
        except BaseException:
            # Where they were they are durable; and the file stays.
            for key, place in moved.items():
                self._index[key] = place
            raise
        await self._let_go(segment)
        log.info(
            "small contents swept",
            extra={"path": _path(segment), "bytes": size, "kept_bytes": marks.live_bytes[segment]},
        )

    async def _let_go(self, segment: int) -> None:
        with contextlib.suppress(NotFound):  # a removal that was interrupted
            await self._disk.remove(_path(segment))
        self._doubted.discard(segment)
        self._hollow.discard(segment)
        await self._readers.forget(segment)

    async def _move(self, segment: int, size: int, marks: Marks | None, moved: dict[bytes, Place]) -> bool:
        """Have a segment's marked contents (all of one that is doubted) written anew, forget the others. Whether something in
        it is damaged."""
        file, damaged = await self._disk.open(_path(segment)), False
        try:
            offset = len(SEGMENT_MAGIC)
            while offset < size:
                try:
                    data = await file.read(offset, BATCH_BYTES)
                except DiskFailed as error:
                    if marks is not None:
                        raise  # where it is it is durable: another time
                    raise _UnreadableError(str(error)) from error
                records, used, bad = await self._offload(partial(_parse, data))
                damaged = damaged or bad > 0 or used == 0
                for begin in range(0, len(records), SLICE):
                    for key, at, length in records[begin : begin + SLICE]:
                        place = (segment, offset + at, length)
                        if self._index.get(key) != place:
                            continue
                        if marks is None or place in marks:
                            moved[key] = place
                            self._write_anew(key, data[at : at + length])
                        else:
                            del self._index[key]
                    while self._queue_bytes > BATCH_BYTES or len(self._queue) > SLICE:
                        await self._write_batch()
                    await asyncio.sleep(0)
                if used == 0:
                    break  # torn, or nonsense
                offset += used
        finally:
            await file.close()
        return damaged

    def _write_anew(self, key: bytes, content: bytes) -> None:
        block = BlockId(key.hex())
        if block not in self._queue:  # a sweep before this one may have failed
            self._queue[block] = content
            self._queue_bytes += len(content)

    async def _give_up(self, segment: int, moved: dict[bytes, Place]) -> None:
        """What was not found good when all of it was read: this node gets it from others with the next snapshot."""
        for number, (key, place) in enumerate(list(self._index.items()), 1):
            if place[0] == segment and key not in moved and self._index.get(key) == place:
                log.error("small content is corrupt", extra={"block": key.hex(), "segment": segment})
                del self._index[key]
                self.losses += 1
            if number % SLICE == 0:
                await asyncio.sleep(0)

    # -- scanning -----------------------------------------------------------------------------------------------------

    async def _scan(self, segment: int, size: int) -> int:
        """Index a segment's good records. Returns the end of what can be parsed, 0 when it has no header."""
        file = await self._disk.open(_path(segment))
        try:
            if await file.read(0, len(SEGMENT_MAGIC)) != SEGMENT_MAGIC:
                log.error("no segment of small contents", extra={"path": _path(segment), "size": size})
                return 0
            offset = len(SEGMENT_MAGIC)
            while offset < size:
                data = await file.read(offset, BATCH_BYTES)
                records, used, bad = await self._offload(partial(_parse, data))
                if bad:
                    log.error(
                        "small contents are corrupt", extra={"path": _path(segment), "offset": offset, "records": bad}
                    )
                for key, at, length in records:
                    self._index[key] = (segment, offset + at, length)
                if used == 0:
                    break  # torn, or nonsense: nothing behind it can be found
                offset += used
            return offset
        finally:
            await file.close()


def _parse(data: bytes) -> tuple[list[tuple[bytes, int, int]], int, int]:
    """(name, offset of the content, length) of each good record in `data`; bytes of whole records; how many were bad."""
    records = []
    used = bad = 0
    for at, length, checksum, key in _records(data):
        end = at + length
        if zlib.crc32(memoryview(data)[at:end], zlib.crc32(key)) == checksum:
            records.append((key, at, length))
        else:
            bad += 1
        used = end
    return records, used, bad


def _records(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(offset of the content, length, CRC, name) of the records that lie wholly in `data`; ends at an impossible one."""
    at = 0
    while at + _HEAD.size <= len(data):
        length, checksum, key = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if not 1 <= length <= SMALL_BYTES_MAX or at + length > len(data):
            return
        yield at, length, checksum, key
        at += length


def _path(segment: int) -> str:
    return f"small/{segment:010}.seg"

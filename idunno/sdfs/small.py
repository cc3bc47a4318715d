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
#         Until a segment has gone it is known where its contents lay there: a newer copy that is found bad counts for nothing.
# Rule 6: what cannot be read is not forgotten, for a disk may fail for a while; it does not count as here until it was read, or
#         kept anew. No file is cut or written to in which anything was found damaged: the next one is begun.
# Rule 7: the queue is bounded, and who applies the log waits for `room` in it. When the disk fails nobody waits for it: contents
#         are dropped with a log line, read from other nodes, and kept anew from the log before that is cut (keeper.py).
#
# How contents lie in segments is in segments.py.
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Final

from idunno.base.disk import Buffer, Disk, File
from idunno.base.errors import DiskFailed, Exhausted, IdunnoError, NotFound
from idunno.base.ids import BlockId
from idunno.sdfs import tasks
from idunno.sdfs.hashing import Offload, block_id
from idunno.sdfs.marks import Marks, Place
from idunno.sdfs.readers import Readers
from idunno.sdfs.segments import HEAD_BYTES, SEGMENT_MAGIC, Walk, head_of, path_of

log = logging.getLogger("idunno.sdfs")

SEGMENT_BYTES_MAX: Final = 64 * 1024 * 1024
"""A new segment is begun above this: scanning one at start takes 1 MiB of memory whatever its size; this bounds its loss."""
QUEUE_BYTES_MAX: Final = 16 * 1024 * 1024
"""4,096 of the largest small files; writing behind is faster than the log's syncs, so it fills up only when the disk fails."""
BATCH_BYTES: Final = 1024 * 1024
GATHER_S: Final = 0.05
"""How long what is queued may wait for more: nothing depends on it being on the disk (rule 1), and a write costs two hand-overs
to a thread, however little it holds."""
RETRY_S: Final = 1.0
STALL_S: Final = 10.0
"""A disk that writes nothing for so long counts as failing: the sync of a full segment takes 7 s at 10 MB/s."""
KEEP_TRIES: Final = 3
"""Flushes that who may wait tries to find room by: it takes a second, unless the log fills the queue as fast as it is written."""
LIVE_SHARE_MAX: Final = 0.5
"""Of a segment that is swept: one byte is written for each that becomes free, at most."""
SWEEP_BYTES_MAX: Final = 4 * SEGMENT_BYTES_MAX
"""Of segments that one sweep reads: a second's work, and as much as log comes from snapshot to snapshot."""
SLICE: Final = 2_000
"""Records that are looked at, or written, between two breaths of the loop: a few ms."""
FAILED_READS_MAX: Final = 16
"""Of single contents of one segment, each of which may take a failing disk seconds: the rest is taken for unreadable then."""
EMPTY: Final = block_id(b"")
"""An empty file's content takes no record."""

_CORRUPT: Final = "the bytes are not what their name says"


class SmallStore:
    """Small contents by their BLAKE3."""

    def __init__(self, disk: Disk, offload: Offload) -> None:
        self._disk, self._offload = disk, offload
        self.segment_bytes, self.live_share_max = SEGMENT_BYTES_MAX, LIVE_SHARE_MAX
        self._index: dict[bytes, Place] = {}
        self._unread: set[bytes] = set()
        """Of the index: what could not be read when that was last tried."""
        self._older: dict[int, dict[bytes, Place]] = {}
        """Where contents that were written anew lay in their segments, by segment, until it goes: the newest last."""
        self._unscanned: set[int] = set()
        """What could not be read at the start, so that nobody knows what they hold: they stay for the next start."""
        self._stubborn: set[int] = set()  # segments that could not be swept when that was last tried
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
        self._file: File | None = None  # of that segment; None: the next one is begun with the next record
        self._writing = asyncio.Lock()  # `flush` and the task write alike
        self._flushing = asyncio.Lock()
        self._follows = True
        """Whether the disk writes what is queued: that is worth to be waited for."""
        self._tried = asyncio.Event()  # to write some of it
        self._wake = asyncio.Event()
        self._full = asyncio.Event()  # enough is queued for a batch, or this is closing
        self._closing = asyncio.Event()
        self._closed = False
        self._readers = Readers(disk, path_of)
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0
        """Contents that did not fit the queue, since the start."""

    async def open(self) -> None:
        """Read all segments to learn what they hold."""
        await self._disk.make_directory("small")
        whole = False
        for segment, size in sorted((await self._sizes()).items()):
            whole = await self._scan(segment, size)
            self._segment, self._end = segment, size
        try:
            if whole:
                self._file = await self._disk.open(path_of(self._segment))
            else:
                if self._segment:  # what is good of it may never have been synced
                    self._doubted.add(self._segment)
                await self._begin(self._segment + 1)
        except DiskFailed as error:  # a full disk is no reason not to start
            log.error("no segment of small contents to write to", extra={"error": str(error)})
        self._task = tasks.begin(self._write_behind(), "small-store")

    async def _scan(self, segment: int, size: int) -> bool:
        """Index a segment's good records. Whether all of it is good, so that more can be written to it."""
        walk = Walk(self._disk, path_of(segment), size, self._offload)
        async with contextlib.aclosing(walk.chunks()) as chunks:
            async for begin, _, records in chunks:
                for key, at, length in records:
                    self._index[key] = (segment, begin + at, length)
        if not walk.readable:
            self._unscanned.add(segment)
        if not walk.whole:
            log.warning("segment of small contents is damaged or torn", extra={"path": path_of(segment), "bytes": size})
        return walk.whole

    def __contains__(self, block: BlockId) -> bool:
        if block == EMPTY or block in self._queue:
            return True
        key = bytes.fromhex(block)
        return key in self._index and key not in self._unread

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
        """Whether the content is here. Something refers to it: the sweep that is prepared or under way leaves it."""
        if block == EMPTY or block in self._queue:
            return True
        place = self._index.get(key := bytes.fromhex(block))
        if place is not None and self._marks is not None:
            self._marks.add(place)
        return place is not None and key not in self._unread

    async def keep_surely(self, block: BlockId, content: bytes) -> None:
        """The same for who may wait until there is room. Raises DiskFailed, Exhausted."""
        for _ in range(KEEP_TRIES):
            if block in self or self._queue_bytes + len(content) <= QUEUE_BYTES_MAX:
                return self.keep(block, content)
            await self.flush()
        raise Exhausted(f"no room for small contents: {self._queue_bytes:,} bytes of others wait for the disk")

    async def room(self) -> None:
        """Wait until half of the queue is free, as long as the disk writes it: not for one that fails, or stands still."""
        while self._queue_bytes > QUEUE_BYTES_MAX // 2 and self._follows:
            self._tried.clear()
            try:
                async with asyncio.timeout(STALL_S):
                    await self._tried.wait()
            except TimeoutError:
                self._follows = False
                log.error("small contents: the disk stands still", extra={"queued_bytes": self._queue_bytes})

    def check_room(self) -> None:
        """Raises Exhausted when the disk is so far behind that no new small file should be begun here."""
        if self._queue_bytes > QUEUE_BYTES_MAX // 2:
            raise Exhausted(
                f"{self._queue_bytes:,} bytes of small files wait for the disk (at most {QUEUE_BYTES_MAX // 2:,}); "
                "look for a full or failing disk on this node"
            )

    async def get(self, block: BlockId) -> bytes | None:
        """The content; None when it is not here, or cannot be read as its name says."""
        if block == EMPTY:
            return b""
        key = bytes.fromhex(block)
        while block not in self._queue:
            place = self._index.get(key)
            if place is None:
                return None
            content, problem = await self._read(block, place)
            if content is not None:
                if self._index.get(key) == place:
                    self._unread.discard(key)
                return content
            if self._index.get(key) == place and not self._fall_back(key, place):
                log.error("small content cannot be read", extra={"block": block, "place": place, "problem": problem})
                if problem == _CORRUPT:
                    self._forget(key)  # so that it can be kept anew
                    self.losses += 1
                elif key not in self._unread:
                    self._unread.add(key)
                    self.losses += 1
                return None
        return self._queue[block]

    async def _read(self, block: BlockId, place: Place) -> tuple[bytes | None, str]:
        """The content, or why it is not there."""
        try:
            content = await self._readers.read(*place)
        except (DiskFailed, NotFound) as error:
            return None, str(error)
        return (content, "") if block_id(content) == block else (None, _CORRUPT)

    def _fall_back(self, key: bytes, place: Place) -> bool:
        """What lies there is no good: where else it was, in a segment that has not gone yet."""
        for older in self._older.values():
            if older.get(key) == place:
                del older[key]
        for older in reversed(self._older.values()):
            if key in older:
                self._index[key] = older[key]
                return True
        return False

    def _forget(self, key: bytes) -> None:
        self._index.pop(key, None)
        self._unread.discard(key)

    async def flush(self) -> None:
        """Everything kept so far, but for what `losses` counts, is on the disk, synced, when this returns. Raises DiskFailed."""
        async with self._flushing:
            self._check_open()
            doubted = sorted(self._doubted)
            whole = set()
            for segment in doubted:
                if await self._write_elsewhere(segment):
                    whole.add(segment)
                    if segment in self._hollow:
                        # Else a disk that goes on failing were filled with one copy behind the other.
                        await self._let_go(segment)
            last = next(reversed(self._queue), None)  # what comes meanwhile does not keep this from ending
            while last in self._queue:
                await self._write_batch()
            async with self._writing:
                self._check_open()
                if self._file is not None:
                    await self._sync(self._file)
            if more := self._doubted.difference(doubted):  # the sync of one that became full failed meanwhile
                raise DiskFailed(f"{path_of(min(more))} could not be synced")
            for segment in doubted:
                if await self._went_back(segment):
                    raise DiskFailed(f"{path_of(segment)}: what was written anew of it was found bad")
                if segment in whole and segment in self._doubted and not self._unread_in(segment):
                    await self._let_go(segment)
                self._doubted.discard(segment)  # what was synced of it before may be readable at another time
                self._hollow.discard(segment)
                log.info("small contents written anew", extra={"path": path_of(segment)})

    async def _sync(self, file: File) -> None:
        try:
            await file.sync()
            self._synced = True
        except BaseException:  # who is cancelled does not learn how it ended
            self._doubted.add(self._segment)
            if not self._synced:
                self._hollow.add(self._segment)
            raise

    async def _write_elsewhere(self, segment: int) -> bool:
        """Have all contents of a doubted segment written anew. False when some could not be read."""
        async with self._writing:
            if segment == self._segment and self._file is not None:
                await self._begin_another()
        size = (await self._sizes()).get(segment)
        if size is None:
            return True  # its removal was interrupted
        return await self._move(segment, size, None) and segment not in self._unscanned

    def _unread_in(self, segment: int) -> bool:
        return any(self._index[key][0] == segment for key in self._unread)

    async def _went_back(self, segment: int) -> bool:
        """Whether something that was written anew was found bad since: it is where it was. From now on nothing goes back."""
        for number, (key, place) in enumerate(self._older.pop(segment, {}).items(), 1):
            if self._index.get(key) == place:
                return True
            if number % SLICE == 0:
                await asyncio.sleep(0)
        return False

    def _check_open(self) -> None:
        if self._closed:  # a node that stops does not wait for a disk for ever
            raise DiskFailed("small contents are not written any more: the node is stopping")

    async def close(self) -> None:
        """Write what is queued, sync, let go. Raises DiskFailed."""
        self._closing.set()
        self._wake.set()
        self._full.set()
        try:
            if self._task is not None:
                await self._task  # it ends by itself: a batch under way is never torn
                self._task = None
            if not self._closed:
                await self.flush()
        finally:
            self._closed = True
            await self._readers.close()
            if self._file is not None:
                await self._file.close()
                self._file = None

    # -- writing behind -----------------------------------------------------------------------------------------------

    async def _write_behind(self) -> None:
        while not self._closing.is_set():
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._queue and not self._closing.is_set():
                    await self._gather()
                    await self._write_batch()
            except IdunnoError as error:
                log.error("small contents not written", extra={"waiting": len(self._queue), "error": str(error)})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_S):
                        await self._closing.wait()
                self._wake.set()

    async def _gather(self) -> None:
        """Until there is a batch, or the oldest of what is queued has waited GATHER_S."""
        if self._queue_bytes < BATCH_BYTES and not self._closing.is_set():
            self._full.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._full.wait()

    async def _write_batch(self) -> None:
        async with self._writing:
            if self._queue:
                try:
                    await self._write_records()
                    self._follows = True
                except IdunnoError:
                    self._follows = False
                    raise
                finally:
                    self._tried.set()

    async def _write_records(self) -> None:
        self._check_open()
        if self._file is None or self._end >= self.segment_bytes or self._segment in self._doubted:
            file = await self._begin_another()
        else:
            file = self._file
        records: list[Buffer] = []
        places: dict[BlockId, Place] = {}
        at = self._end
        for block, content in self._queue.items():
            records += [head_of(block, content), content]
            places[block] = (self._segment, at + HEAD_BYTES, len(content))
            at += HEAD_BYTES + len(content)
            if at - self._end >= BATCH_BYTES or len(places) >= SLICE:
                break
        await file.write(self._end, records)
        self._end = at
        for block, place in places.items():
            self._index[key := bytes.fromhex(block)] = place
            self._unread.discard(key)
            self._queue_bytes -= len(self._queue.pop(block))

    async def _begin_another(self) -> File:
        full = self._file
        if full is not None and self._segment not in self._doubted:
            await self._sync(full)
        file = await self._begin(self._segment + 1)
        if full is not None:
            await full.close()
        return file

    async def _begin(self, segment: int) -> File:
        file = await self._disk.open(path_of(segment), create=True)
        try:
            await file.truncate(0)  # it was begun before, in vain
            await file.write(0, [SEGMENT_MAGIC])
            await self._disk.sync_directory("small")
        except BaseException:
            await file.close()
            raise
        self._file, self._segment, self._end, self._synced = file, segment, len(SEGMENT_MAGIC), False
        return file

    # -- sweeping -----------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """Begin to mark: from now on what is held is what a sweep leaves. Marks that nothing was swept by are forgotten."""
        self._marks = Marks(self._segment, HEAD_BYTES)

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
                    self._stubborn.add(segment)
                    log.warning("small contents not swept", extra={"path": path_of(segment), "error": str(error)})
        except DiskFailed as error:
            log.warning("small contents not swept", extra={"path": "small", "error": str(error)})
        finally:
            self._marks = None

    async def _worth(self, marks: Marks) -> list[tuple[int, int]]:
        """Numbers and sizes of the segments to be swept, those first that most becomes free of, and those last that could not
        be swept before: they are to keep no other from it."""
        sizes = await self._sizes()
        share = {
            segment: marks.live_bytes[segment] / max(1, size)
            for segment, size in sizes.items()
            if segment < marks.before and segment not in self._doubted and segment not in self._unscanned
        }
        worth, read = [], 0
        for segment in sorted(share, key=lambda segment: (segment in self._stubborn, share[segment], segment)):
            if share[segment] <= self.live_share_max:
                read += sizes[segment]
                if read > SWEEP_BYTES_MAX:
                    break
                worth.append((segment, sizes[segment]))
        return worth

    async def _sizes(self) -> dict[int, int]:
        """Bytes of each segment."""
        entries = [(*entry.name.partition("."), entry.size) for entry in await self._disk.list("small")]
        return {int(number): size for number, _, rest, size in entries if rest == "seg" and number.isdecimal()}

    async def _sweep_segment(self, segment: int, size: int, marks: Marks) -> None:
        try:
            if not await self._move(segment, size, marks):
                raise DiskFailed("some of what is referred to cannot be read")
            await self.flush()
        except BaseException:
            # Where they were they are durable; and the file stays.
            for key, place in self._older.pop(segment, {}).items():
                if key in self._index:  # else what lies there was found bad, too
                    self._index[key] = place
            raise
        if await self._went_back(segment) or self._unread_in(segment):
            raise DiskFailed("what was written anew of it was found bad")
        await self._let_go(segment)
        log.info(
            "small contents swept",
            extra={"path": path_of(segment), "bytes": size, "kept_bytes": marks.live_bytes[segment]},
        )

    async def _let_go(self, segment: int) -> None:
        self._older.pop(segment, None)
        with contextlib.suppress(NotFound):  # a removal that was interrupted
            await self._disk.remove(path_of(segment))
        for among in (self._doubted, self._hollow, self._stubborn):
            among.discard(segment)
        await self._readers.forget(segment)

    async def _move(self, segment: int, size: int, marks: Marks | None) -> bool:
        """Have a segment's marked contents (all of one that is doubted) written anew, forget the others. False when some of them
        could not be read: they stay where they are."""
        moved = self._older.setdefault(segment, {})
        walk = Walk(self._disk, path_of(segment), size, self._offload)
        async with contextlib.aclosing(walk.chunks()) as chunks:
            async for begin, data, records in chunks:
                for first in range(0, len(records), SLICE):
                    for key, at, length in records[first : first + SLICE]:
                        place = (segment, begin + at, length)
                        if self._index.get(key) != place:
                            continue
                        if marks is None or place in marks:
                            moved[key] = place
                            self._write_anew(BlockId(key.hex()), data[at : at + length])
                        else:
                            self._forget(key)
                    await self._write_much()
        return walk.whole or await self._move_rest(segment, marks)

    async def _move_rest(self, segment: int, marks: Marks | None) -> bool:
        """The same for what was not found among the good records: one by one, as long as that goes well."""
        left, failed = [], 0
        moved = self._older[segment]
        for number, (key, place) in enumerate(list(self._index.items()), 1):
            if place[0] == segment and key not in moved and self._index.get(key) == place:
                if marks is not None and place not in marks:
                    self._forget(key)
                    continue
                block = BlockId(key.hex())
                content = await self.get(block) if failed < FAILED_READS_MAX else None
                if content is not None:
                    where = self._index[key]
                    self._older.setdefault(where[0], {})[key] = where
                    self._write_anew(block, content)
                elif self._index.get(key) == place:
                    left.append(block)
                    failed += 1
                    if key not in self._unread:
                        self._unread.add(key)
                        self.losses += 1
            if number % SLICE == 0:
                await self._write_much()
        if left:
            log.error(
                "small contents cannot be read", extra={"path": path_of(segment), "count": len(left), "first": left[0]}
            )
        return not left

    async def _write_much(self) -> None:
        while self._queue_bytes > BATCH_BYTES or len(self._queue) > SLICE:
            await self._write_batch()
        await asyncio.sleep(0)

    def _write_anew(self, block: BlockId, content: bytes) -> None:
        if block not in self._queue:  # a sweep before this one may have failed
            self._queue[block] = content
            self._queue_bytes += len(content)

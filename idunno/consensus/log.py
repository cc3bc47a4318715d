# idunno/consensus/log.py: the durable log and hard state of one node, through `Disk`.
#
# Rule 1: files are only appended to. An entry whose index is not new replaces that one and all behind it: the truncation is
#         durable with the very write that needs it, and there is no moment in which neither suffix is there.
# Rule 2: `stage` changes memory, `flush` the disk: one write and one sync for all that was staged (group commit), the hard
#         state first. Only what was flushed may be promised. A flush that failed may be tried again: it writes the same
#         bytes to the same place, so an error of a sync is never forgotten.
# Rule 3: opening validates every byte that was ever synced. What a crash tore (Rule 3 of records.py) is cut; anything else
#         that is not as it was written is Corrupt, with file, offset and next step.
# Rule 4: recent payloads are kept in memory up to a bound, older ones are read when a follower is far behind.
# Rule 5: what a snapshot covers goes by whole segments, oldest first. A log that ends before the snapshot, or differs from it
#         there, gives way to it: at once when one is installed (`begin_anew`), else at opening.
# Rule 6: a reserve is kept beside the log. When the disk is full the next segment takes its place, and `short` says so.
# Rule 7: space that is reserved and never written costs its first write a change of the file's extents, synced with it: more
#         than the records themselves. So small writes go where a write before them has left zeros.
from __future__ import annotations

import contextlib
import logging
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Final

from idunno.base.disk import Disk, File
from idunno.base.errors import Conflict, Corrupt, DiskFailed, NotFound
from idunno.base.ids import Index, Term
from idunno.consensus.config import RaftConfig
from idunno.consensus.events import HardState
from idunno.consensus.messages import PAYLOAD_BYTES_MAX, Entry
from idunno.consensus.records import (
    RECORD_BYTES_MAX,
    RECORD_HEADER_BYTES,
    REJOIN,
    SEGMENT_HEADER_BYTES,
    STATE_BYTES_MAX,
    SegmentHeader,
    decode_record,
    decode_state,
    encode_record,
    encode_segment_header,
    encode_state,
)
from idunno.consensus.recovery import Recovered, recover
from idunno.consensus.voters import Voters

log = logging.getLogger("idunno.consensus")

DIRECTORY: Final = "log"
STATE_PATH: Final = "log/state"
SEGMENT_BYTES: Final = RaftConfig().segment_bytes
CACHE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Payloads kept in memory: four seconds of a busy cluster (1,000 small files of 4 KiB a second)."""
FLUSH_BYTES_MAX: Final = 4 * 1024 * 1024
"""One write. Past it, the next sync is due anyway: 4 MiB take a disk of 400 MB/s 10 ms."""
ZERO_BYTES: Final = 128 * 1024
"""Zeros behind a small write: for some thirty of small files. With its records it stays what a prompt disk is waited for."""
RESERVE_PATH: Final = "log/reserve"
RESERVE_SEGMENTS: Final = 2
"""For a segment, in which tens of thousands of deletes fit, and a snapshot of a small cluster, after which segments go."""
_NOTHING: Final = 1 << 63
_ZEROS: Final = memoryview(bytes(ZERO_BYTES))


def segment_path(segment: int) -> str:
    return f"{DIRECTORY}/{segment:08d}.seg"


class Log:
    """The entries behind a base with their payloads, and the hard state. One flush or `forget` at a time; `stage` and
    `cached` any time."""

    def __init__(self, disk: Disk, hard: HardState, found: Recovered, segment_bytes: int, cache_bytes_max: int) -> None:
        self.hard = hard  # as it is on disk
        self.terms = found.terms  # as found at open; kept up to date by the core, not here
        self._disk, self._segment_bytes, self._cache_bytes_max = disk, segment_bytes, cache_bytes_max
        self.named = found.named  # as found at open, likewise
        self.short = False
        """The disk was full and the reserve is used up: only what frees space should still be written."""
        self._reserved = self._reserving = False
        self._where: array[int] = found.where  # segment << 32 | offset of each entry on disk, behind the base
        self._base = int(found.terms.base)
        self._first_segment = found.first_segment
        self._segment, self._tail, self._previous = found.segment, found.tail, found.previous
        self._zeroed = found.tail  # up to here the segment's space has been written
        self._file: File | None = None
        self._staged: deque[tuple[Index, Entry | None]] = deque()  # None: the log begins anew behind that index
        self._staged_first = _NOTHING  # the lowest index among them
        self._staged_hard: HardState | None = None
        self._cache: dict[int, bytes] = {}  # contiguous, up to the last entry
        self._cache_first, self._cache_bytes = self._base + len(self._where) + 1, 0

    # -- making and opening -----------------------------------------------------------------------------------------

    @classmethod
    async def create(cls, disk: Disk, first_payload: bytes | None, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Make a log with the entry (index 1, term 1, `first_payload`), or an empty one for a node that joins (None).

        Raises Conflict when there is one already. A creation that was interrupted is begun again.
        """
        await disk.make_directory(DIRECTORY)
        if await _state(disk) is not None:
            raise Conflict(f"{STATE_PATH} exists: this node has a log already")
        made = cls(disk, HardState(Term(0)), Recovered(), segment_bytes, 0)
        await made._begin_segment(1, 1)
        if first_payload is not None:
            made.stage(Index(1), [Entry(Term(1), first_payload)])
        await made.flush()
        made.hard = HardState(Term(0 if first_payload is None else 1))
        await made.close()  # the state file comes last: it says that the log is whole

    @classmethod
    async def open(
        cls,
        disk: Disk,
        *,
        snapshot: tuple[Index, Term] | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        cache_bytes_max: int = CACHE_BYTES_MAX,
    ) -> Log:
        """Read and validate everything. `snapshot`: index and term of the one that was found beside the log.

        Raises NotFound (never created), Corrupt, Incompatible, DiskFailed.
        """
        state = await _state(disk)
        if state is not None:
            await disk.sync_directory(
                DIRECTORY
            )  # the names found, too, may be the last act of a process that was killed
        segments = sorted(e.name for e in await disk.list(DIRECTORY) if e.name.endswith(".seg"))
        if state is None:
            if len(segments) > 1:
                raise Corrupt(f"{STATE_PATH} is missing beside {len(segments)} segments; {REJOIN}")
            raise NotFound(
                "this node has no log: it was never initialised, or its set-up was interrupted; run it again"
            )
        hard, end = state
        found = await recover(disk, DIRECTORY, segments)
        if found.terms.last_term > hard.term:
            raise Corrupt(
                f"{STATE_PATH} is of term {hard.term}, but the log reaches term {found.terms.last_term}: "
                f"an old copy was restored; {REJOIN}"
            )
        if found.segment << 32 | found.tail < end:
            raise Corrupt(
                f"{segment_path(found.segment)}: the log ends or is damaged at offset {found.tail}, but was synced up to "
                f"offset {end & 0xFFFFFFFF} of {segment_path(end >> 32)}; {REJOIN}"
            )
        opened = cls(disk, hard, found, segment_bytes, cache_bytes_max)
        await opened._reconcile(*(snapshot or (Index(0), Term(0))))
        return opened

    async def _reconcile(self, index: Index, term: Term) -> None:
        """Bring log and snapshot together: see Rule 5."""
        terms = self.terms
        if terms.base > index:
            raise Corrupt(
                f"{DIRECTORY} begins behind entry {terms.base}, but the snapshot holds {index} entries; {REJOIN}"
            )
        if terms.last < index or (index > terms.base and terms.term(index) != term):
            self.begin_anew(index)
            await self.flush()
            terms.reset(index, term)
            self.named = {}
        elif terms.base == index:
            terms.reset_base_term(term)
        elif terms.base > 0:  # its term is not known: the next one's is
            terms.compact(terms.base + 1)
        if self.hard.term < term:  # the snapshot was synced first; nothing was promised in its term
            await self._save_state(HardState(term))

    def voters(self, first: Voters) -> Voters:
        """Those that the log names, after those that the snapshot, or else the node's directory, says were first."""
        for index, voters in self.named.items():
            if index > first.index:
                first.append(index, voters)
        return first

    async def close(self) -> None:
        """What was flushed is final: damage in it will be noticed, the last write included. Raises DiskFailed."""
        await self._close_file()
        await self._save_state(self.hard)

    async def _save_state(self, hard: HardState) -> None:
        await self._disk.replace(STATE_PATH, encode_state(hard, self._segment << 32 | self._tail))
        self.hard = hard

    async def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            await file.close()

    @property
    def size_bytes(self) -> int:
        """What the log takes on disk, but for what is reserved and not written yet."""
        return (self._segment - self._first_segment) * self._segment_bytes + self._tail

    # -- writing ----------------------------------------------------------------------------------------------------

    def stage(self, first: Index, entries: Sequence[Entry]) -> None:
        """Take entries in for the next flush; they replace whatever stands at `first` and behind."""
        for index in range(first, self._cache_first + len(self._cache)):  # a suffix that is replaced
            self._cache_bytes -= len(self._cache.pop(index, b""))
        if first < self._cache_first:
            self._cache_first = first
        if first < self._staged_first:
            self._staged_first = first
        for index, entry in enumerate(entries, first):
            size = len(entry.payload)
            assert size <= PAYLOAD_BYTES_MAX
            self._staged.append((Index(index), entry))
            self._cache[index] = entry.payload
            self._cache_bytes += size
        self._evict()

    def begin_anew(self, index: Index) -> None:
        """With the next flush nothing that was staged or written before counts: the log goes on behind the snapshot of
        `index`, which is durable."""
        self._staged.append((index, None))
        self._cache, self._cache_first, self._cache_bytes = {}, index + 1, 0
        self._staged_first = _NOTHING

    def stage_hard(self, hard: HardState) -> None:
        self._staged_hard = hard

    async def flush(self) -> None:
        """Make durable what was staged before the call. Raises DiskFailed; then nothing staged is lost, try again."""
        hard, count = self._staged_hard, len(self._staged)
        if hard is not None:
            await self._save_state(hard)
            if self._staged_hard is hard:
                self._staged_hard = None
        while count:
            if self._staged[0][1] is None:
                await self._begin_anew(self._staged[0][0])
                self._staged.popleft()
                count -= 1
                continue
            buffers, taken, tail, previous, where = self._encode(count)
            if not taken:
                assert self._tail > SEGMENT_HEADER_BYTES, "an entry larger than a segment"
                await self._begin_segment(self._segment + 1, self._base + len(self._where) + 1)
                continue
            file = self._file or await self._open_segment()
            zeros = self._zeros_behind(tail)
            await file.write(self._tail, [b"".join(buffers), zeros], sync=True)
            self._tail, self._previous, self._zeroed = tail, previous, max(self._zeroed, tail + len(zeros))
            for index, at in where:
                del self._where[index - 1 - self._base :]
                self._where.append(at)
            for _ in range(taken):
                self._staged.popleft()
            count -= taken
            self._staged_first = self._lowest_staged()
            self._evict()

    def _zeros_behind(self, end: int) -> memoryview:
        """What a small write up to `end` brings along, if it leaves what was written before: see Rule 7."""
        if end <= self._zeroed or end - self._tail > ZERO_BYTES // 2:
            return _ZEROS[:0]
        return _ZEROS[: min(ZERO_BYTES, self._segment_bytes - end)]

    def _lowest_staged(self) -> int:
        lowest = _NOTHING
        for index, entry in self._staged:
            lowest = min(lowest, index) if entry is not None else _NOTHING
        return lowest

    def _encode(self, count: int) -> tuple[list[bytes], int, int, int, list[tuple[int, int]]]:
        """As much of the first `count` staged entries as fits this segment and one write."""
        buffers: list[bytes] = []
        where: list[tuple[int, int]] = []
        at, previous = self._tail, self._previous
        for index, entry in self._staged:
            if entry is None:
                break
            size = RECORD_HEADER_BYTES + len(entry.payload)
            if (
                len(where) == count
                or at + size > self._segment_bytes
                or (where and at + size > self._tail + FLUSH_BYTES_MAX)
            ):
                break
            header, previous = encode_record(self._segment, at, previous, self._tail, index, entry.term, entry.payload)
            buffers += (header, entry.payload)
            where.append((index, self._segment << 32 | at))
            at += size
        return buffers, len(where), at, previous, where

    async def _open_segment(self) -> File:
        self._file = await self._disk.open(segment_path(self._segment))
        return self._file

    async def _begin_anew(self, index: Index) -> None:
        await self._begin_segment(self._segment + 1, index + 1, anew=True)
        self._where, self._base = array("Q"), int(index)
        await self._remove_segments(self._segment)

    async def _remove_segments(self, before: int) -> None:
        """Oldest first, so that what is left after a crash is in a row."""
        while self._first_segment < before:
            with contextlib.suppress(NotFound):  # removed before, by an attempt that did not come to its end
                await self._disk.remove(segment_path(self._first_segment))
            self._first_segment += 1
        await self._disk.sync_directory(DIRECTORY)

    async def roll(self) -> None:
        """Begin a segment, if the present one holds anything: so that the next snapshot covers what this one holds whole."""
        if self._tail > SEGMENT_HEADER_BYTES:
            await self._begin_segment(self._segment + 1, self._base + len(self._where) + 1)

    async def forget(self, index: Index) -> Index:
        """Remove the segments that hold nothing behind `index`, which a durable snapshot covers. Returns the new base.

        Raises DiskFailed; what is left then is whole.
        """
        at = max(0, min(index - self._base, len(self._where)))
        keep = self._where[at] >> 32 if at < len(self._where) else self._segment
        if keep > self._first_segment:
            gone = bisect_left(self._where, keep << 32)
            await self._remove_segments(keep)
            del self._where[:gone]
            self._base += gone
        await self.regain_reserve()
        return Index(self._base)

    async def regain_reserve(self) -> None:
        """Once there is space again, the reserve is made anew, and the log is short no more."""
        if self.short and not self._reserving:
            self._reserving = True
            try:
                self.short = not await self.keep_reserve()
            finally:
                self._reserving = False

    async def keep_reserve(self) -> bool:
        """Whether there is a reserve, by now."""
        try:
            file = await self._disk.open(RESERVE_PATH, create=True)
            try:
                await file.allocate(RESERVE_SEGMENTS * self._segment_bytes)
            finally:
                await file.close()
        except DiskFailed as error:
            log.warning("no reserve for the log", extra={"problem": str(error)})
            with contextlib.suppress(NotFound, DiskFailed):  # what it got of the space
                await self._disk.remove(RESERVE_PATH)
            return False
        self._reserved = True
        return True

    async def _begin_segment(self, segment: int, first: int, *, anew: bool = False) -> None:
        """Reserve the next file, durably, before anything in it is promised; in place of the reserve if need be."""
        try:
            await self._make_segment(segment, first, anew)
        except DiskFailed:
            if not await self.use_reserve():
                raise
            await self._make_segment(segment, first, anew)

    async def use_reserve(self) -> bool:
        """Give the reserve's space free, if there is one: what is to be written next frees more. Whether it is free now."""
        if not self._reserved:
            return False
        self._reserved = False  # before the wait: a segment and a snapshot may want it at once
        try:
            await self._disk.remove(RESERVE_PATH)
        except NotFound:
            pass  # somebody needed the space: free it is
        except DiskFailed as error:
            self._reserved = True
            log.warning("reserve of the log not given free", extra={"problem": str(error)})
            return False
        self.short = True
        log.error("reserve of the log is used: its disk is full")
        return True

    async def _make_segment(self, segment: int, first: int, anew: bool) -> None:
        file = await self._disk.open(segment_path(segment), create=True)
        try:
            await file.truncate(0)  # what an interrupted attempt left
            await file.allocate(self._segment_bytes)
            header = SegmentHeader(segment, Index(first), self._previous, anew)
            await file.write(0, [encode_segment_header(header)], sync=True)
            await file.sync()
            await self._disk.sync_directory(DIRECTORY)
        except DiskFailed:
            await file.close()
            raise
        await self._close_file()
        self._file, self._segment = file, segment
        self._tail = self._zeroed = SEGMENT_HEADER_BYTES

    # -- reading ----------------------------------------------------------------------------------------------------

    def cached(self, first: int, last: int) -> list[bytes] | None:
        """The payloads of first..last if all are in memory."""
        if first < self._cache_first or last >= self._cache_first + len(self._cache):
            return None
        return [self._cache[index] for index in range(first, last + 1)]

    async def read(self, first: int, last: int) -> list[bytes]:
        """The payloads of first..last, from memory or disk. The caller bounds the bytes.

        May be called during a flush. Raises Corrupt, and NotFound when the log was cut meanwhile.
        """
        payloads: list[bytes] = []
        index = first
        while index <= last:
            if index <= self._base:
                raise NotFound(f"entry {index} is not in the log any more, a snapshot took its place")
            if index >= self._cache_first + len(self._cache):
                raise NotFound(f"entry {index} is not in the log (any more)")
            if index >= self._cache_first:
                payloads.append(self._cache[index])
                index += 1
                continue
            run = self._run(index, last)
            payloads += await self._read_run(index, run)
            index += len(run)
        return payloads

    def _run(self, first: int, last: int) -> list[int]:
        """Places of the entries from `first` that are not in memory and lie in one segment, at most a record or 1 MiB long."""
        run = [self._where[first - 1 - self._base]]
        for index in range(first + 1, min(last, self._cache_first - 1) + 1):
            at = self._where[index - 1 - self._base]
            if at >> 32 != run[0] >> 32 or at - run[0] > 2 * RECORD_BYTES_MAX:
                break
            run.append(at)
        return run

    async def _read_run(self, first: int, run: list[int]) -> list[bytes]:
        segment, start = run[0] >> 32, run[0] & 0xFFFFFFFF
        length = (run[-1] & 0xFFFFFFFF) - start + RECORD_HEADER_BYTES + self.terms.size(first + len(run) - 1)
        file = await self._disk.open(segment_path(segment))
        try:
            data = await file.read(start, length)
        finally:
            await file.close()
        payloads: list[bytes] = []
        for index, at in enumerate(run, first):
            offset = at & 0xFFFFFFFF
            record = decode_record(data, offset - start, segment, offset)
            if record is None or record.index != index:
                raise Corrupt(f"{segment_path(segment)}: entry {index} at offset {offset} is damaged; {REJOIN}")
            payloads.append(record.payload)
        return payloads

    def _evict(self) -> None:
        """Oldest first; what is not on disk yet stays."""
        if self._cache_bytes <= self._cache_bytes_max:
            return
        keep = min(self._staged_first, self._cache_first + len(self._cache))
        while self._cache_bytes > self._cache_bytes_max and self._cache_first < keep:
            self._cache_bytes -= len(self._cache.pop(self._cache_first))
            self._cache_first += 1


async def _state(disk: Disk) -> tuple[HardState, int] | None:
    try:
        data = await disk.read_all(STATE_PATH, bytes_max=STATE_BYTES_MAX)
    except NotFound:
        return None
    return decode_state(data, STATE_PATH)

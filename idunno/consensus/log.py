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
from __future__ import annotations

from array import array
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

DIRECTORY: Final = "log"
STATE_PATH: Final = "log/state"
SEGMENT_BYTES: Final = RaftConfig().segment_bytes
CACHE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Payloads kept in memory: four seconds of a busy cluster (1,000 small files of 4 KiB a second)."""
FLUSH_BYTES_MAX: Final = 4 * 1024 * 1024
"""One write. Past it, the next sync is due anyway: 4 MiB take a disk of 400 MB/s 10 ms."""
_NOTHING: Final = 1 << 63


def segment_path(segment: int) -> str:
    return f"{DIRECTORY}/{segment:08d}.seg"


class Log:
    """The entries 1..last with their payloads, and the hard state. One flush at a time; `stage` and `cached` any time."""

    def __init__(self, disk: Disk, hard: HardState, found: Recovered, segment_bytes: int, cache_bytes_max: int) -> None:
        self.hard = hard  # as it is on disk
        self.terms = found.terms  # as found at open; kept up to date by the core, not here
        self._disk, self._segment_bytes, self._cache_bytes_max = disk, segment_bytes, cache_bytes_max
        self._where: array[int] = found.where  # segment << 32 | offset of each entry on disk, from index 1
        self._segment, self._tail, self._previous = found.segment, found.tail, found.previous
        self._file: File | None = None
        self._staged: deque[tuple[Index, Entry]] = deque()
        self._staged_first = _NOTHING  # the lowest index among them
        self._staged_hard: HardState | None = None
        self._cache: dict[int, bytes] = {}  # contiguous, up to the last entry
        self._cache_first, self._cache_bytes = len(self._where) + 1, 0

    # -- making and opening -----------------------------------------------------------------------------------------

    @classmethod
    async def create(cls, disk: Disk, first_payload: bytes | None, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Make a log with the entry (index 1, term 1, `first_payload`), or an empty one for a node that joins (None).

        Raises Conflict when there is one already. A creation that was interrupted is begun again.
        """
        await disk.make_directory(DIRECTORY)
        if await _state(disk) is not None:
            raise Conflict(f"{STATE_PATH} exists: this node has a log already")
        log = cls(disk, HardState(Term(0)), Recovered(), segment_bytes, 0)
        await log._begin_segment(1)
        if first_payload is not None:
            log.stage(Index(1), [Entry(Term(1), first_payload)])
        await log.flush()
        log.hard = HardState(Term(0 if first_payload is None else 1))
        await log.close()  # the state file comes last: it says that the log is whole

    @classmethod
    async def open(
        cls, disk: Disk, *, segment_bytes: int = SEGMENT_BYTES, cache_bytes_max: int = CACHE_BYTES_MAX
    ) -> Log:
        """Read and validate everything. Raises NotFound (never created), Corrupt, Incompatible, DiskFailed."""
        state = await _state(disk)
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
        return cls(disk, hard, found, segment_bytes, cache_bytes_max)

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

    # -- writing ----------------------------------------------------------------------------------------------------

    def stage(self, first: Index, entries: Sequence[Entry]) -> None:
        """Take entries in for the next flush; they replace whatever stands at `first` and behind."""
        for index in range(first, self._cache_first + len(self._cache)):  # a suffix that is replaced
            self._cache_bytes -= len(self._cache.pop(index, b""))
        self._cache_first = min(self._cache_first, first)
        self._staged_first = min(self._staged_first, first)
        for index, entry in enumerate(entries, first):
            assert len(entry.payload) <= PAYLOAD_BYTES_MAX
            self._staged.append((Index(index), entry))
            self._cache[index] = entry.payload
            self._cache_bytes += len(entry.payload)
        self._evict()

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
            buffers, taken, tail, previous, where = self._encode(count)
            if not taken:
                assert self._tail > SEGMENT_HEADER_BYTES, "an entry larger than a segment"
                await self._begin_segment(self._segment + 1)
                continue
            file = self._file or await self._open_segment()
            await file.write(self._tail, [b"".join(buffers)], sync=True)
            self._tail, self._previous = tail, previous
            for index, at in where:
                del self._where[index - 1 :]
                self._where.append(at)
            for _ in range(taken):
                self._staged.popleft()
            count -= taken
            self._staged_first = min((index for index, _ in self._staged), default=_NOTHING)
            self._evict()

    def _encode(self, count: int) -> tuple[list[bytes], int, int, int, list[tuple[int, int]]]:
        """As much of the first `count` staged entries as fits this segment and one write."""
        buffers: list[bytes] = []
        where: list[tuple[int, int]] = []
        at, previous = self._tail, self._previous
        for index, entry in self._staged:
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

    async def _begin_segment(self, segment: int) -> None:
        """Reserve the next file, durably, before anything in it is promised."""
        file = await self._disk.open(segment_path(segment), create=True)
        try:
            await file.truncate(0)  # what an interrupted attempt left
            await file.allocate(self._segment_bytes)
            header = SegmentHeader(segment, Index(len(self._where) + 1), self._previous)
            await file.write(0, [encode_segment_header(header)], sync=True)
            await file.sync()
            await self._disk.sync_directory(DIRECTORY)
        except DiskFailed:
            await file.close()
            raise
        await self._close_file()
        self._file, self._segment, self._tail = file, segment, SEGMENT_HEADER_BYTES

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
        run = [self._where[first - 1]]
        for index in range(first + 1, min(last, self._cache_first - 1) + 1):
            at = self._where[index - 1]
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

# idunno/grep/engine.py: the search itself, over the bytes of log files (a core).
#
# Rule 1: it is given files as iterables of bytes and yields lines in their order; it opens nothing and reads no clock.
# Rule 2: memory is bounded: a line is looked at up to LINE_BYTES_MAX, a batch holds about BATCH_BYTES_MAX, a query is checked.
# Rule 3: expressions are Python's `re` on bytes, one line at a time. They backtrack, so this never runs inside a node's
#         process: child.py runs it in one that is killed at the deadline.
from __future__ import annotations

import re
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from idunno.base.errors import InvalidArgument
from idunno.grep.messages import Line, Query

PATTERN_CHARS_MAX: Final = 1_024
CONTEXT_LINES_MAX: Final = 100
LIMIT_MAX: Final = 100_000
NODES_MAX: Final = 1_000
LINE_BYTES_MAX: Final = 64 * 1024
"""Four times the longest line a node writes; the rest of a longer one is neither searched nor delivered."""
BATCH_BYTES_MAX: Final = 128 * 1024
"""Half a frame: the notes around it fit as well, and two batches keep a link busy."""
LINE_OVERHEAD_BYTES: Final = 64
"""What a delivered line costs beside its text; so many short lines are bounded too."""

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "warn": 30, "error": 40, "critical": 50}
_META: Final = re.compile(r"[\\.^$*+?{}\[\]|()]")


class _Head(msgspec.Struct):
    """The two fields of a log line that a query may filter by."""

    time: str = ""
    level: str = ""


_HEAD: Final = msgspec.json.Decoder(_Head)


class Found(msgspec.Struct):
    """What a search has come to so far."""

    count: int = 0
    lines_skipped: int = 0
    truncated: bool = False
    problems: list[str] = msgspec.field(default_factory=list)


def check(query: Query) -> None:
    """Raises InvalidArgument for a query that no node should be asked, with the place of a mistake in the pattern."""
    if not 0 < len(query.pattern) <= PATTERN_CHARS_MAX:
        raise InvalidArgument(f"a pattern has 1 to {PATTERN_CHARS_MAX} characters, this one {len(query.pattern)}")
    if not (0 <= query.before <= CONTEXT_LINES_MAX and 0 <= query.after <= CONTEXT_LINES_MAX):
        raise InvalidArgument(
            f"context of {query.before} and {query.after} lines: 0 to {CONTEXT_LINES_MAX} are possible"
        )
    if not 0 < query.limit <= LIMIT_MAX:
        raise InvalidArgument(f"a limit of {query.limit} lines from each node: 1 to {LIMIT_MAX} are possible")
    if len(query.nodes) > NODES_MAX:
        raise InvalidArgument(f"{len(query.nodes)} nodes are named, at most {NODES_MAX} can be")
    if query.level and query.level.lower() not in LEVELS:
        raise InvalidArgument(f"{query.level[:40]!r} is no level: use debug, info, warning, error or critical")
    if query.since_ms is not None and query.until_ms is not None and query.since_ms > query.until_ms:
        raise InvalidArgument("the time range is empty: --since is after --until")
    for time_ms in (query.since_ms, query.until_ms):
        if time_ms is not None and not 0 <= time_ms < 253_402_300_800_000:  # the end of the year 9999
            raise InvalidArgument(f"{time_ms} ms since 1970 is no time of this era")
    _compile(query)


def _compile(query: Query) -> re.Pattern[bytes]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a future Python may read differently: not the asker's concern
            re.compile(query.pattern)  # as text first: so that the position in an error counts characters
            return re.compile(query.pattern.encode(), re.IGNORECASE if query.ignore_case else 0)
    except re.error as error:
        where = f" at character {error.pos + 1}" if error.pos is not None else ""
        raise InvalidArgument(
            f"pattern {query.pattern[:80]!r}: {error.msg}{where}; see `idunno grep --help`"
        ) from error
    except (RecursionError, OverflowError, UnicodeEncodeError) as error:
        raise InvalidArgument(f"pattern {query.pattern[:80]!r} cannot be compiled: {type(error).__name__}") from error


def is_literal(pattern: str) -> bool:
    """Whether the pattern holds nothing but text to be found: then whole blocks are searched at once."""
    return _META.search(pattern) is None and pattern.isprintable()


class Filter:
    """The time range and the level of a query."""

    def __init__(self, query: Query) -> None:
        self._since, self._until = _iso(query.since_ms), _iso(query.until_ms)
        self._level = LEVELS.get(query.level.lower(), 0)
        self.any = bool(self._since or self._until or self._level)

    def passes(self, line: bytes) -> bool:
        """A line that is no log line of ours (no JSON) has neither time nor level, and passes no filter."""
        try:
            head = _HEAD.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        time = head.time.removesuffix("Z")  # "2026-01-01T12:00:00.123": sorts as text as it does in time
        if (self._since or self._until) and not time:
            return False
        if self._since and time < self._since:
            return False
        if self._until and time > self._until:
            return False
        return LEVELS.get(head.level.lower(), 0) >= self._level


def _iso(time_ms: int | None) -> str:
    """A time as it stands in log lines, without its Z; "" for None. Days to date after Howard Hinnant's civil_from_days."""
    if time_ms is None:
        return ""
    days, rest = divmod(time_ms, 86_400_000)
    era, day_of_era = divmod(days + 719_468, 146_097)
    year_of_era = (day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * day_of_year + 2) // 153
    day, month = day_of_year - (153 * shifted + 2) // 5 + 1, shifted + 3 if shifted < 10 else shifted - 9
    year = year_of_era + era * 400 + (month <= 2)
    seconds, ms = divmod(rest, 1_000)
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{ms:03d}"
    return f"{year:04d}-{month:02d}-{day:02d}T{clock}"


def whole_lines(chunks: Iterable[bytes], found: Found) -> Iterator[bytes]:
    """The same bytes, cut behind line ends. Of a line above LINE_BYTES_MAX only that much is kept, and it is counted."""
    carry, dropping = b"", False
    for chunk in chunks:
        if dropping:
            end = chunk.find(b"\n")
            if end < 0:
                continue
            chunk, dropping = chunk[end + 1 :], False
        last = chunk.rfind(b"\n") + 1
        if last:
            yield carry + chunk[:last]
            carry = chunk[last:]
        else:
            carry += chunk
        if len(carry) > LINE_BYTES_MAX:
            yield carry[: LINE_BYTES_MAX + 1] + b"\n"  # one byte too long: so that it is counted where it is looked at
            carry, dropping = b"", True
    if carry:
        yield carry + b"\n"


class Search:
    """One query over one node's files. Feed `file` with each file, oldest first; stop when `found.truncated`."""

    def __init__(self, query: Query, node: str) -> None:
        self.found = Found()
        self._query, self._node = query, node
        self._search = _compile(query).search
        self._filter = Filter(query)
        self._batch: list[Line] = []
        self._batch_bytes = 0

    def file(self, name: str, chunks: Iterable[bytes]) -> Iterator[list[Line]]:
        """Batches of lines of one file. A file that cannot be read to its end is named in `found.problems`."""
        query = self._query
        fast = is_literal(query.pattern) and not (query.invert or query.before or query.after)
        blocks = whole_lines(chunks, self.found)
        try:
            yield from self._blocks(name, blocks) if fast else self._lines(name, blocks)
        except (OSError, EOFError, zlib.error) as error:  # gzip's own errors are of these three
            self.found.problems.append(f"{name}: {error}")
        if self._batch:
            yield self._flush()

    def _blocks(self, name: str, blocks: Iterable[bytes]) -> Iterator[list[Line]]:
        """For plain text: find it in a whole block, and look at lines only where it stands."""
        found, number = self.found, 0
        for block in blocks:
            at = counted = 0  # number is that of the last line that ends before `counted`
            while (match := self._search(block, at)) is not None:
                start = block.rfind(b"\n", 0, match.start()) + 1
                at = block.index(b"\n", match.start()) + 1
                if match.end() - start > LINE_BYTES_MAX:
                    continue  # beyond the bound of its line
                line = block[start : min(at - 1, start + LINE_BYTES_MAX)]
                if self._filter.any and not self._filter.passes(line):
                    continue
                found.count += 1
                if self._query.count_only:
                    continue
                number += block.count(b"\n", counted, start)
                counted = start
                self._add(name, number + 1, line, context=False)
                if self._batch_bytes >= BATCH_BYTES_MAX:
                    yield self._flush()
                if found.count >= self._query.limit:
                    found.truncated = True
                    return
            number += block.count(b"\n", counted)
            found.lines_skipped += _too_long(block)
            if self._batch:
                yield self._flush()

    def _lines(self, name: str, blocks: Iterable[bytes]) -> Iterator[list[Line]]:
        query, found, search = self._query, self.found, self._search
        before: deque[tuple[int, bytes]] = deque(maxlen=query.before)
        number, after = 0, 0
        for block in blocks:
            for line in block[:-1].split(b"\n"):
                number += 1
                if len(line) > LINE_BYTES_MAX:
                    found.lines_skipped += 1
                    line = line[:LINE_BYTES_MAX]
                if ((search(line) is None) != query.invert) or (self._filter.any and not self._filter.passes(line)):
                    if after:
                        after -= 1
                        self._add(name, number, line, context=True)
                        if self._batch_bytes >= BATCH_BYTES_MAX:
                            yield self._flush()
                    elif query.before and not query.count_only:
                        before.append((number, line))
                    continue
                found.count += 1
                if query.count_only:
                    continue
                for earlier, text in before:
                    self._add(name, earlier, text, context=True)
                    if self._batch_bytes >= BATCH_BYTES_MAX:
                        yield self._flush()
                before.clear()
                self._add(name, number, line, context=False)
                after = query.after
                if self._batch_bytes >= BATCH_BYTES_MAX:
                    yield self._flush()
                if found.count >= query.limit:
                    found.truncated = True
                    return
            if self._batch:
                yield self._flush()

    def _add(self, name: str, number: int, line: bytes, *, context: bool) -> None:
        self._batch.append(Line(self._node, name, number, line.decode(errors="replace"), context))
        self._batch_bytes += len(line) + LINE_OVERHEAD_BYTES

    def _flush(self) -> list[Line]:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        return batch


def _too_long(block: bytes) -> int:
    """How many lines of the block are above the bound. Cheap: most blocks are asked once for a line end in reach."""
    count, start = 0, 0
    while len(block) - start > LINE_BYTES_MAX + 1:
        end = block.rfind(b"\n", start, start + LINE_BYTES_MAX + 1)
        if end >= 0:
            start = end + 1
            continue
        count += 1
        start = block.index(b"\n", start) + 1
    return count


_LOG: Final = re.compile(r"(.+\.jsonl)(?:\.(\d{1,6}))?(\.gz)?")


def log_order(name: str) -> tuple[str, int] | None:
    """A key that sorts log files oldest first ("node.jsonl.2", "node.jsonl.1.gz", "node.jsonl"); None: not a log file."""
    match = _LOG.fullmatch(name)
    return (match[1], -int(match[2] or 0)) if match is not None else None

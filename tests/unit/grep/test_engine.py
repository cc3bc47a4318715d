# tests/unit/grep/test_engine.py: what is found in bytes, against the plainest way to find it.
from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.errors import InvalidArgument
from idunno.grep import engine
from idunno.grep.engine import LINE_BYTES_MAX, Search, check, is_literal, log_order, whole_lines
from idunno.grep.messages import Line, LineBatch, Query
from idunno.wire.calls import HEADER_BYTES_MAX


def find(query: Query, data: bytes, chunk: int = 7) -> tuple[list[Line], engine.Found]:
    search = Search(query, "n1")
    pieces = [data[at : at + chunk] for at in range(0, len(data), chunk)]
    return [line for batch in search.file("node.jsonl", pieces) for line in batch], search.found


def numbers(query: Query, data: bytes) -> list[int]:
    return [line.line for line in find(query, data)[0] if not line.context]


def log_line(second: int, level: str, text: str) -> bytes:
    return json.dumps({"time": f"2026-01-01T12:00:{second:02d}.500Z", "level": level, "text": text}).encode() + b"\n"


LOG = b"".join(
    log_line(second, level, text)
    for second, level, text in [
        (0, "info", "node started"),
        (1, "debug", "tick"),
        (2, "warning", "disk slow"),
        (3, "error", "disk failed"),
        (4, "info", "disk fine"),
    ]
)
T0 = int(datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp() * 1000)


@settings(max_examples=300)
@given(
    st.text(alphabet="ab\n\xe9", max_size=60),
    st.sampled_from(["a", "ab", "b", "é", "a.b", "^a", "b$", "[^a]", "a|b", "(?!a)b"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 9),
)
def test_lines_found_are_those_that_match_one_by_one(
    text: str, pattern: str, invert: bool, ignore_case: bool, chunk: int
) -> None:
    lines = text.encode().removesuffix(b"\n").split(b"\n") if text else []
    compiled = re.compile(pattern.encode(), re.IGNORECASE if ignore_case else 0)
    wanted = [(n, line.decode()) for n, line in enumerate(lines, 1) if (compiled.search(line) is None) == invert]
    found, result = find(Query(pattern, ignore_case, invert), text.encode(), chunk)
    assert [(line.line, line.text) for line in found] == wanted
    assert result.count == len(wanted)


@settings(max_examples=200)
@given(st.lists(st.booleans(), max_size=30), st.integers(0, 3), st.integers(0, 3))
def test_context_is_the_neighbours_once_and_in_order(hits: list[bool], before: int, after: int) -> None:
    data = b"".join(b"hit\n" if hit else b"miss\n" for hit in hits)
    found, _ = find(Query("hit", before=before, after=after), data)
    near = [
        (n + 1, not hits[n])
        for n in range(len(hits))
        if any(hits[m] for m in range(max(0, n - after), min(len(hits), n + before + 1)))
    ]
    assert [(line.line, line.context) for line in found] == near


def test_time_range_and_level_filter_the_lines_of_our_format() -> None:
    assert numbers(Query("disk"), LOG) == [3, 4, 5]
    assert numbers(Query("disk", since_ms=T0 + 3_500), LOG) == [4, 5]  # both ends belong to the range
    assert numbers(Query("disk", since_ms=T0 + 3_501), LOG) == [5]
    assert numbers(Query("disk", until_ms=T0 + 3_500), LOG) == [3, 4]
    assert numbers(Query(".", level="WARNING"), LOG) == [3, 4]
    assert numbers(Query("disk", level="error"), LOG) == [4]
    assert numbers(Query("disk", invert=True, level="info"), LOG) == [1]
    assert numbers(Query("x", level="debug"), b"x, not a log line\n") == []


@given(st.integers(0, 253_402_300_799_999))
def test_times_are_written_as_in_log_lines(time_ms: int) -> None:
    seconds, ms = divmod(time_ms, 1000)
    day = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    assert engine._iso(time_ms) == f"{day.isoformat()}.{ms:03d}"


def test_the_limit_stops_the_search_and_says_so_but_counting_has_none() -> None:
    data = b"x1\nx2\nx3\n"
    for pattern in ("x", "x."):  # by block, by line
        lines, found = find(Query(pattern, limit=2), data)
        assert ([line.text for line in lines], found.count, found.truncated) == (["x1", "x2"], 2, True)
        lines, found = find(Query(pattern, limit=2, count_only=True), data)
        assert (lines, found.count, found.truncated) == ([], 3, False)


def test_a_line_above_the_bound_is_searched_up_to_it_and_counted() -> None:
    inside, beyond = b"near" + b"." * LINE_BYTES_MAX, b"." * LINE_BYTES_MAX + b"far"
    data = inside + b"\n" + beyond + b"\nnear far\n"
    for chunk in (1_000, 1 << 20):
        for pattern, lines in (("near", [1, 3]), ("far", [3]), ("near|x", [1, 3]), ("fa[r]", [3])):
            found, result = find(Query(pattern), data, chunk)
            assert ([line.line for line in found], result.lines_skipped) == (lines, 2), (chunk, pattern)
            assert all(len(line.text) <= LINE_BYTES_MAX for line in found)


def test_an_endless_line_needs_no_more_memory_than_the_bound() -> None:
    found = engine.Found()
    longest = max(len(block) for block in whole_lines((b"x" * 10_000 for _ in range(1_000)), found))
    assert longest <= LINE_BYTES_MAX + 2


def test_batches_are_bounded() -> None:
    search = Search(Query("x", limit=100_000), "n1")
    batches = list(search.file("f", [b"x" * 1_000 + b"\n"] * 1_000 + [b"x\n" * 100_000]))
    size = [sum(len(line.text) + engine.LINE_OVERHEAD_BYTES for line in batch) for batch in batches]
    assert sum(map(len, batches)) == search.found.count == 100_000
    assert max(size) <= engine.BATCH_BYTES_MAX + LINE_BYTES_MAX


@pytest.mark.parametrize(
    "query", [Query("hit", before=100), Query("hit", after=100), Query("hit", before=1, invert=True)]
)
def test_batches_with_context_are_bounded_too(query: Query) -> None:
    line = b"\xff" * 16_000 + b"\n"
    lines = line * 100 + b"hit\n" + line * 100
    search = Search(query, "n1")
    batches = list(search.file("f", [lines[at : at + (1 << 20)] for at in range(0, len(lines), 1 << 20)]))
    assert sum(map(len, batches)) >= 101
    assert max(len(msgspec.msgpack.encode(LineBatch(batch))) for batch in batches) < HEADER_BYTES_MAX


def test_bytes_that_are_no_text_are_searched_too() -> None:
    lines, _ = find(Query("key"), b"\xff\xfe key \x00\n")
    assert [line.text for line in lines] == ["�� key \x00"]


@pytest.mark.parametrize("error", [OSError("bad sector"), EOFError("cut off"), zlib.error("damaged")])
def test_a_file_that_breaks_is_named_and_what_was_read_is_kept(error: Exception) -> None:
    def broken() -> Iterable[bytes]:
        yield b"hit\n"
        raise error

    search = Search(Query("hit"), "n1")
    lines = [line for batch in search.file("node.jsonl.1.gz", broken()) for line in batch]
    assert len(lines) == 1
    assert search.found.problems == [f"node.jsonl.1.gz: {error}"]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (Query(""), "1 to 1024 characters"),
        (Query("x" * 1_025), "this one 1025"),
        (Query("a(b"), "at character 2"),
        (Query("ä["), "at character 2"),
        (Query("*"), "nothing to repeat at character 1"),
        (Query("(" * 1_000), "pattern"),
        (Query("a{99999999999999999999}"), "pattern"),
        (Query("\ud800"), "cannot be compiled"),
        (Query("x", before=101), "101 and 0"),
        (Query("x", after=-1), "0 and -1"),
        (Query("x", limit=0), "limit of 0"),
        (Query("x", limit=100_001), "limit of 100001"),
        (Query("x", level="loud"), "'loud' is no level"),
        (Query("x", since_ms=2, until_ms=1), "--since is after --until"),
        (Query("x", since_ms=-1), "no time"),
        (Query("x", until_ms=10**18), "no time"),
        (Query("x", nodes=["n"] * 1_001), "1001 nodes"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused_with_the_reason(query: Query, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(query)
    assert says in str(caught.value)


@given(st.text(max_size=50))
def test_any_pattern_is_taken_or_refused(pattern: str) -> None:
    try:
        check(Query(pattern))
    except InvalidArgument:
        return
    Search(Query(pattern), "n1")


def test_what_is_plain_text() -> None:
    assert is_literal('disk failed, "é"')
    assert not any(is_literal(f"a{char}b") for char in "\\.^$*+?{}[]|()\n")


def test_log_files_in_the_order_of_time() -> None:
    names = ["node.jsonl", "node.jsonl.1", "node.jsonl.10.gz", "node.jsonl.2", "node.pid", "x.jsonl.tmp", ".jsonl"]

    def keys() -> Iterator[tuple[tuple[str, int], str]]:
        for name in names:
            key = log_order(name)
            if key is not None:
                yield key, name

    assert [name for _, name in sorted(keys())] == ["node.jsonl.10.gz", "node.jsonl.2", "node.jsonl.1", "node.jsonl"]

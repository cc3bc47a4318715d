# idunno/grep/messages.py: one query over the whole ring, and its part on one node. Both stream items of LineBatch.
from __future__ import annotations

from typing import Final

import msgspec

from idunno.wire.calls import Method, Role


class Query(msgspec.Struct, frozen=True):
    pattern: str
    ignore_case: bool = False
    invert: bool = False
    count_only: bool = False
    before: int = 0  # context lines
    after: int = 0
    since_ms: int | None = None
    until_ms: int | None = None
    level: str = ""  # this level and above
    nodes: list[str] = []  # names or ids; [] all
    limit: int = 10_000  # lines from each node


class Order(msgspec.Struct, frozen=True):
    """What a node has its child do (child.py)."""

    query: Query
    node: str  # name, for the lines
    directory: str  # absolute path of the node's logs
    seconds_max: int  # processor time


class Line(msgspec.Struct, frozen=True, array_like=True):
    node: str
    file: str
    line: int
    text: str
    context: bool = False  # a neighbour of a match, not one itself


class LineBatch(msgspec.Struct, frozen=True, array_like=True):
    """A stream item's note."""

    lines: list[Line]


class NodeResult(msgspec.Struct, frozen=True):
    count: int
    seconds: float
    truncated: bool
    lines_skipped: int = 0  # longer than the bound: searched up to it
    problem: str = ""  # files that could not be read to their end, and why


class QueryAnswer(msgspec.Struct, frozen=True):
    counts: dict[str, int]
    node_seconds: dict[str, float]
    unreachable: dict[str, str]  # node name -> why
    seconds: float
    truncated: bool


SEARCH: Final = Method("grep.search", Query, NodeResult, Role.NODE)
QUERY: Final = Method("grep.query", Query, QueryAnswer, Role.READER)

# idunno/coordinator/snapshot.py: the whole machine as a stream of bytes, and back.
#
# Rule 1: equal machines give equal bytes: each part gives its rows in an order that is part of its state, never a set's, and
#         pages are cut by what rows weigh, never by time.
# Rule 2: a snapshot carries its format, the machine's version, and a checksum a page and one over all. What this version does
#         not know to the last field is refused: a node must not go on with half a machine.
# Rule 3: nothing is long: a page is a few ms of work; a file with many versions or a job with many tasks is cut into several
#         rows of the same name, which follow each other.
#
# Layout: magic; then pages: length (u32, big-endian), CRC-32 of the rest (u32), a MessagePack list [kind, [row, ...]]. The first
# is the "head", the last the "end": rows before it, and the BLAKE3 of all bytes before it.
from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import Any, Final, TypeVar

import msgspec
from blake3 import blake3

from idunno.base.errors import Corrupt, DecodeError, Incompatible
from idunno.coordinator.ledger import JobState, LedgerState
from idunno.coordinator.namespace import FileState, NamespaceState
from idunno.coordinator.recent import RecentState
from idunno.coordinator.records import (
    MACHINE_VERSION,
    NodeRecord,
    OpenPut,
    Record,
    TokenRecord,
    UserRecord,
)
from idunno.coordinator.registry import ModelState, RegistryState
from idunno.coordinator.roster import RosterState
from idunno.coordinator.rows import PAGE_WEIGHT, Row
from idunno.coordinator.steps import free
from idunno.coordinator.trash import RetentionRule, TrashEntry

FORMAT: Final = 2
MAGIC: Final = b"idunno-machine\n"
PAGE_BYTES_MAX: Final = 64 * 1024 * 1024
"""A page of the heaviest rows: a model with a thousand files."""

_PAGE: Final = struct.Struct(">II")
_ENCODER: Final = msgspec.msgpack.Encoder()

S = TypeVar("S", bound=Record)


class Head(Record, frozen=True):
    format: int
    machine_version: int
    index: int  # the last entry in it
    now_ms: int


class End(Record, frozen=True):
    rows: int
    checksum: bytes


KINDS: Final[dict[str, type[Any]]] = {
    "head": Head,
    "roster": RosterState,  # without what has rows of its own, like those of the other parts
    "node": NodeRecord,
    "user": UserRecord,
    "token": TokenRecord,
    "namespace": NamespaceState,
    "file": FileState,
    "tombstone": FileState,
    "put": OpenPut,
    "trash": TrashEntry,
    "retention": RetentionRule,
    "registry": RegistryState,
    "model": ModelState,
    "ledger": LedgerState,
    "job": JobState,
    "recent": RecentState,
    "answered": str,
    "end": End,
}
_DECODERS: Final = {kind: msgspec.msgpack.Decoder(list[row]) for kind, row in KINDS.items()}  # type: ignore[valid-type]
_PAGES: Final = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])


def encode(head: Head, rows: Iterable[Row], seen: Callable[[str, Any], None] | None = None) -> Iterator[bytes]:
    """The stream, page by page; `seen` is told every row's kind and record."""
    hasher, count = blake3(MAGIC), 1
    first = _page("head", [head])
    hasher.update(first)
    yield MAGIC + first
    kind, waiting, weight = "", list[Any](), 0
    for row_kind, record, row_weight in rows:
        if waiting and (row_kind != kind or weight + row_weight > PAGE_WEIGHT):
            page = _page(kind, waiting)
            hasher.update(page)
            yield page
            waiting, weight = [], 0
        kind = row_kind
        if seen is not None:
            seen(kind, record)
        waiting.append(record)
        weight += row_weight
        count += 1
    if waiting:
        page = _page(kind, waiting)
        hasher.update(page)
        yield page
    yield _page("end", [End(count, hasher.digest())])


def _page(kind: str, rows: list[Any]) -> bytes:
    body = _ENCODER.encode((kind, rows))
    return _PAGE.pack(len(body), zlib.crc32(body)) + body


class Reader:
    """Takes the stream in pieces of any size. `rows` holds what came, by kind; complete after `finish`."""

    def __init__(self) -> None:
        self.head = Head(0, 0, 0, 0)
        self.rows: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        self._waiting = bytearray()
        self._hasher = blake3()
        self._count, self._begun, self._ended = 0, False, False

    def feed(self, piece: bytes | memoryview) -> list[tuple[str, list[Any]]]:
        """The pages that are whole with this piece. Raises Corrupt, DecodeError, Incompatible."""
        self._waiting += piece
        if not self._begun:
            if bytes(self._waiting[: len(MAGIC)]) != MAGIC[: len(self._waiting)]:
                raise DecodeError(f"{len(self._waiting)} bytes begin no snapshot of a machine")
            if len(self._waiting) < len(MAGIC):
                return []
            self._hasher.update(MAGIC)
            del self._waiting[: len(MAGIC)]
            self._begun = True
        pages, at = [], 0
        while len(self._waiting) - at >= _PAGE.size:
            length, checksum = _PAGE.unpack_from(self._waiting, at)
            if length > PAGE_BYTES_MAX:
                raise Corrupt(f"page of {length} bytes in a snapshot: it is damaged")
            end = at + _PAGE.size + length
            if end > len(self._waiting):
                break
            whole = bytes(self._waiting[at:end])
            if zlib.crc32(memoryview(whole)[_PAGE.size :]) != checksum:
                raise Corrupt(f"page of {length} bytes in a snapshot does not match its checksum")
            pages.append(self._take(whole))
            at = end
        del self._waiting[:at]
        return pages

    def _take(self, whole: bytes) -> tuple[str, list[Any]]:
        if self._ended:
            raise Corrupt("a snapshot goes on behind its end")
        try:
            kind, raw = _PAGES.decode(memoryview(whole)[_PAGE.size :])
            if self._count == 0 and kind == "head":
                self._check_format(raw)
            rows: list[Any] = _DECODERS[kind].decode(raw)
        except KeyError:
            raise Incompatible(f"a snapshot holds rows of kind {kind[:40]!r}: upgrade this idunno") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(f"page of a snapshot is not one this version knows: {error}") from error
        if (self._count == 0) != (kind == "head"):
            raise DecodeError(f"a snapshot begins with its head, not with rows of kind {kind[:40]!r}")
        if kind == "end":
            if len(rows) != 1 or rows[0] != End(self._count, self._hasher.digest()):
                raise Corrupt(f"a snapshot of {self._count} rows does not match its checksum")
            self._ended = True
        else:
            self._count += len(rows)
            self._hasher.update(whole)
            self.rows[kind] += rows
        return kind, rows

    def _check_format(self, raw: msgspec.Raw) -> None:
        plain = msgspec.msgpack.decode(raw, type=list[dict[str, Any]])
        formats = [(row.get("format"), row.get("machine_version")) for row in plain]
        if (
            len(formats) != 1
            or formats[0][0] != FORMAT
            or not isinstance(formats[0][1], int)
            or formats[0][1] > MACHINE_VERSION
        ):
            raise Incompatible(
                f"snapshot has (format, machine version) {formats}; this idunno reads format {FORMAT}, machine version up to "
                f"{MACHINE_VERSION}: upgrade it"
            )
        self.head = msgspec.msgpack.decode(raw, type=list[Head])[0]

    def finish(self) -> None:
        """Raises Corrupt when something is missing, DecodeError when all is."""
        if not self._begun:
            raise DecodeError(f"{len(self._waiting)} bytes are no snapshot of a machine")
        if not self._ended or self._waiting:
            raise Corrupt(f"a snapshot ends after {self._count} rows, without its end")

    def free(self) -> None:
        """Let go of the rows, in steps."""
        for rows in self.rows.values():
            free(rows)

    # -- the parts' states --------------------------------------------------------------------------------------------

    def roster(self) -> RosterState:
        rows = self.rows
        return msgspec.structs.replace(
            self._one("roster", RosterState),
            nodes=tuple(rows["node"]),
            users=tuple(rows["user"]),
            tokens=tuple(rows["token"]),
        )

    def namespace(self) -> NamespaceState:
        rows = self.rows
        return msgspec.structs.replace(
            self._one("namespace", NamespaceState),
            files=tuple(_joined(rows["file"], attrgetter("name"), "versions")),
            tombstones=tuple(rows["tombstone"]),
            puts=tuple(rows["put"]),
            trash=tuple(_joined(rows["trash"], attrgetter("entry"), "versions")),
            retention=tuple(rows["retention"]),
        )

    def registry(self) -> RegistryState:
        return msgspec.structs.replace(self._one("registry", RegistryState), models=tuple(self.rows["model"]))

    def ledger(self) -> LedgerState:
        jobs = _joined(self.rows["job"], attrgetter("record.job"), "tasks")
        return msgspec.structs.replace(self._one("ledger", LedgerState), jobs=tuple(jobs))

    def recent(self) -> RecentState:
        return msgspec.structs.replace(self._one("recent", RecentState), answered=tuple(self.rows["answered"]))

    def _one(self, kind: str, state: type[S]) -> S:
        rows = self.rows[kind]
        if len(rows) != 1 or not isinstance(rows[0], state):
            raise DecodeError(f"a snapshot has {len(rows)} rows of kind {kind}, not one")
        return rows[0]


def _joined(rows: list[Any], key: Callable[[Any], object], many: str) -> Iterator[Any]:
    """Rows that were cut from one record, put together."""
    for _, group in groupby(rows, key):
        parts = list(group)
        if len(parts) == 1:
            yield parts[0]
        else:
            yield msgspec.structs.replace(
                parts[0], **{many: tuple(item for part in parts for item in getattr(part, many))}
            )

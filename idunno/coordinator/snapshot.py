# idunno/coordinator/snapshot.py: the whole machine as bytes, and back.
#
# Rule 1: equal machines give equal bytes: each part writes its records in an order that is part of its state, never a set's.
# Rule 2: a snapshot carries its format, the machine's version and a checksum. What this version does not know to the last
#         field is refused: a node must not go on with half a machine.
# Rule 3: parts are cut apart, so that a part may change its own format with its own number.
from __future__ import annotations

from typing import Final, TypeVar

import msgspec
from blake3 import blake3

from idunno.base.errors import Corrupt, DecodeError, Incompatible
from idunno.coordinator.records import MACHINE_VERSION, Record

FORMAT: Final = 1
MAGIC: Final = b"idunno-machine\n"
_CHECKSUM_BYTES: Final = 32
PARTS: Final = ("roster", "namespace", "registry", "ledger", "recent")

S = TypeVar("S", bound=Record)


class Part(Record, frozen=True):
    name: str
    format: int
    content: bytes  # MessagePack of the part's state


class Snapshot(Record, frozen=True):
    format: int
    machine_version: int
    index: int  # the last entry in it
    now_ms: int
    parts: tuple[Part, ...]


def part(name: str, state: Record) -> Part:
    return Part(name, 1, msgspec.msgpack.encode(state))


def encode(snapshot: Snapshot) -> bytes:
    body = msgspec.msgpack.encode(snapshot)
    return MAGIC + blake3(body).digest() + body


def decode(data: bytes | memoryview) -> Snapshot:
    """Raises Corrupt (not what was written), Incompatible (a newer one), DecodeError (not one at all)."""
    view = memoryview(data)
    begin = len(MAGIC) + _CHECKSUM_BYTES
    if len(view) < begin or bytes(view[: len(MAGIC)]) != MAGIC:
        raise DecodeError(f"{len(view)} bytes are no snapshot of a machine")
    if blake3(view[begin:]).digest() != bytes(view[len(MAGIC) : begin]):
        raise Corrupt(f"snapshot of {len(view)} bytes does not match its checksum")
    try:
        snapshot = msgspec.msgpack.decode(view[begin:], type=Snapshot)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"snapshot of {len(view)} bytes is not one this version knows: {error}") from error
    names = tuple(part.name for part in snapshot.parts)
    formats = [part.format for part in snapshot.parts]
    if snapshot.format != FORMAT or snapshot.machine_version > MACHINE_VERSION or names != PARTS or set(formats) != {1}:
        raise Incompatible(
            f"snapshot has format {snapshot.format}, machine version {snapshot.machine_version} and parts {', '.join(names)}; "
            f"this idunno reads format {FORMAT}, machine version up to {MACHINE_VERSION}: upgrade it"
        )
    return snapshot


def state_of(snapshot: Snapshot, name: str, kind: type[S]) -> S:
    """The state of one part. Raises DecodeError."""
    content = snapshot.parts[PARTS.index(name)].content
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"part {name} of the snapshot is not one this version knows: {error}") from error

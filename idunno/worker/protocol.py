# idunno/worker/protocol.py: what the agent and a model's child process say to each other, over the child's stdin and stdout.
#
# Rule 1: a frame is a length (4 bytes, little-endian) and that many bytes of MessagePack, at most FRAME_BYTES_MAX.
# Rule 2: one request at a time; each has exactly one answer. The child speaks first, once: Ready.
# Rule 3: bulk never passes here: inputs and outputs are files, named by path.
# Rule 4: the agent believes nothing that a child says: what does not decode is the child's end.
from __future__ import annotations

import struct
from typing import Final, TypeAlias

import msgspec

from idunno.base.errors import DecodeError
from idunno.coordinator.records import Timing

FRAME_BYTES_MAX: Final = 1024 * 1024
"""The largest is an answer's error text or timing: both far below."""
LENGTH: Final = struct.Struct("<I")


class Load(msgspec.Struct, frozen=True, tag="load"):
    folder: str  # absolute; holds the model's files and nothing else
    runtime: str
    threads: int


class Count(msgspec.Struct, frozen=True, tag="count"):
    path: str
    kind: str


class Run(msgspec.Struct, frozen=True, tag="run"):
    path: str
    kind: str
    first: int  # queries [first, last) of the input
    last: int
    out_path: str  # where the child writes the output's JSON lines


Request: TypeAlias = Load | Count | Run


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The child has started and imported its runtimes."""


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    signature: str  # for people: inputs and outputs of the model


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    queries: int


class Ran(msgspec.Struct, frozen=True, tag="ran"):
    done: int  # queries answered with an output
    errors: int  # queries answered with an error of their own
    size: int  # bytes written
    timing: Timing


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request failed, the child lives on. `code` is one of base/errors.py."""

    code: str
    text: str


Answer: TypeAlias = Ready | Loaded | Counted | Ran | Refused

_ENCODER: Final = msgspec.msgpack.Encoder()
_REQUESTS: Final[msgspec.msgpack.Decoder[Request]] = msgspec.msgpack.Decoder(Request)
_ANSWERS: Final[msgspec.msgpack.Decoder[Answer]] = msgspec.msgpack.Decoder(Answer)


def encode(message: Request | Answer) -> bytes:
    """The message as a frame, its length included."""
    payload = _ENCODER.encode(message)
    return LENGTH.pack(len(payload)) + payload


def frame_length(head: bytes) -> int:
    """How many bytes follow the 4 of `head`. Raises DecodeError when they are none or too many."""
    length: int = LENGTH.unpack(head)[0]
    if not 1 <= length <= FRAME_BYTES_MAX:
        raise DecodeError(f"a frame has 1 to {FRAME_BYTES_MAX} bytes, this one says {length}")
    return length


def decode_request(payload: bytes) -> Request:
    try:
        return _REQUESTS.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"{len(payload)} bytes are no request to a child: {error}") from error


def decode_answer(payload: bytes) -> Answer:
    try:
        return _ANSWERS.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"{len(payload)} bytes are no answer of a child: {error}") from error


def one_line(text: str, *, characters_max: int = 500) -> str:
    """`text` as one printable line of bounded length, for errors that carry somebody else's words."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * characters_max]).split())
    return line if len(line) <= characters_max else line[: characters_max - 3] + "..."

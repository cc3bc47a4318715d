# idunno/wire/frames.py: where one message ends and the next begins on a connection.
#
# Rule 1: a frame is a fixed head of HEAD_BYTES, a MessagePack header, a raw body; nothing else is ever sent.
# Rule 2: every length is checked against its bound before memory for it is allocated.
# Rule 3: the decoder is total: any bytes, cut anywhere, give frames or a DecodeError; after one it stays failed.
# Rule 4: request 0 is the connection itself: NOTIFY 0 is a greeting, ERROR 0 says why the connection is being closed.
from __future__ import annotations

import enum
import struct
from typing import Final

import msgspec

from idunno.base.disk import Buffer
from idunno.base.errors import DecodeError
from idunno.wire.calls import BODY_BYTES_MAX, HEADER_BYTES_MAX
from idunno.wire.rooms import room

MAGIC: Final = b"iD"
VERSION: Final = 1
_HEAD: Final = struct.Struct(">2sBBIII")  # magic, version, kind, request, header length, body length; big-endian
HEAD_BYTES: Final = _HEAD.size

RECEIVE_BYTES: Final = 32 * 1024
"""What one read may bring. With 1,024 connections this is 32 MiB; larger reads save little, large bodies bypass it."""
_DIRECT_BYTES: Final = 8 * 1024
"""An unfinished frame of more than this is read straight into memory of its own: one copy less."""


class Kind(enum.IntEnum):
    """What a frame is for. The caller sends REQUEST, CANCEL, NOTIFY; the handler's side ANSWER, ERROR; both the others."""

    REQUEST = 1
    ANSWER = 2
    ERROR = 3
    CANCEL = 4
    ITEM = 5
    END = 6
    CREDIT = 7
    NOTIFY = 8


_KINDS: Final = {int(kind): kind for kind in Kind}


class Frame(msgspec.Struct, frozen=True, gc=False):
    kind: Kind
    request: int  # chosen by the caller, unique among its requests under way; 0 the connection itself
    header: bytes = b""
    body: bytes | memoryview = b""  # a view is read-only, and its memory belongs to this frame alone


def frame_head(kind: Kind, request: int, header_bytes: int, body_bytes: int) -> bytes:
    """The HEAD_BYTES bytes in front of a frame's header and body. The lengths must be within their bounds."""
    return _HEAD.pack(MAGIC, VERSION, kind, request, header_bytes, body_bytes)


def encode_frame(frame: Frame) -> bytes:
    """A whole frame as bytes."""
    return b"".join(
        (frame_head(frame.kind, frame.request, len(frame.header), len(frame.body)), frame.header, frame.body)
    )


def frozen(body: Buffer) -> bytes | memoryview:
    """`body` as bytes that nobody writes to: itself when it is bytes or a read-only view, else a copy.

    What is sent may wait in a buffer after the send returned, so a writable body could change under way.
    """
    if isinstance(body, bytes):
        return body
    view = memoryview(body)
    if view.readonly and view.c_contiguous:
        return view.cast("B") if view.format != "B" or view.ndim != 1 else view
    return view.tobytes()


class FrameDecoder:
    """Bytes in, frames out. Write at most len(buffer()) bytes into buffer(), say received(count), take next() until None."""

    def __init__(self, header_bytes_max: int = HEADER_BYTES_MAX, body_bytes_max: int = BODY_BYTES_MAX) -> None:
        self.header_bytes_max, self.body_bytes_max = header_bytes_max, body_bytes_max
        self._room = memoryview(bytearray(RECEIVE_BYTES))
        self._start = self._end = 0  # what is received and not yet taken lies in _room[_start:_end]
        self._large: memoryview | None = None  # header and body of an unfinished large frame, received in place
        self._large_head = (Kind.REQUEST, 0, 0)  # its kind, request, header length
        self._filled = 0

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty once next() has said None."""
        if self._large is not None:
            return self._large[self._filled :]
        if self._start:
            rest = self._end - self._start
            self._room[:rest] = bytes(self._room[self._start : self._end])
            self._start, self._end = 0, rest
        return self._room[self._end :]

    def drop(self) -> None:
        """Nothing more comes: give back the memory of a frame that is not whole."""
        self._large = None

    def received(self, count: int) -> None:
        """`count` bytes were written into what buffer() gave."""
        if self._large is not None:
            self._filled += count
        else:
            self._end += count

    def next(self) -> Frame | None:
        """The next whole frame, None when more bytes are needed. Raises DecodeError."""
        if self._large is not None:
            return self._finish_large(self._large)
        received, start = self._room, self._start
        have = self._end - start
        if have < HEAD_BYTES:
            return None
        kind, request, header_bytes, body_bytes = self._check_head()  # a bad head stays there: it fails every time
        at = start + HEAD_BYTES
        middle = at + header_bytes
        end = middle + body_bytes
        if end <= self._end:
            header, body = received[at:middle].tobytes(), received[middle:end].tobytes() if body_bytes else b""
            if end == self._end:
                self._start = self._end = 0
            else:
                self._start = end
            return Frame(kind, request, header, body)
        if end - start > _DIRECT_BYTES:
            self._large, self._large_head = room(header_bytes + body_bytes), (kind, request, header_bytes)
            self._filled = have - HEAD_BYTES
            self._large[: self._filled] = received[at : self._end]
            self._start = self._end = 0
        return None

    def _check_head(self) -> tuple[Kind, int, int, int]:
        magic, version, number, request, header_bytes, body_bytes = _HEAD.unpack_from(self._room, self._start)
        if magic != MAGIC:
            raise DecodeError(f"frame begins with {magic.hex()}, not {MAGIC.hex()}: the other side is no idunno")
        if version != VERSION:
            raise DecodeError(f"the other side speaks wire version {version}, this one {VERSION}: run the same release")
        kind = _KINDS.get(number)
        if kind is None:
            raise DecodeError(f"frame of unknown kind {number}")
        if header_bytes > self.header_bytes_max or body_bytes > self.body_bytes_max:
            raise DecodeError(
                f"{kind.name} frame of {header_bytes} + {body_bytes} bytes: "
                f"at most {self.header_bytes_max} + {self.body_bytes_max} are taken here"
            )
        return kind, request, header_bytes, body_bytes

    def _finish_large(self, large: memoryview) -> Frame | None:
        if self._filled < len(large):
            return None
        kind, request, header_bytes = self._large_head
        self._large, self._filled = None, 0
        view = large.toreadonly()
        return Frame(kind, request, bytes(view[:header_bytes]), view[header_bytes:])

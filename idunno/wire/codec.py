# idunno/wire/codec.py: typed messages as MessagePack and back, and the headers of the frames.
#
# Rule 1: `decode` is total: any bytes give a message of the asked type or a DecodeError.
# Rule 2: unknown fields are ignored (a newer peer's); what must not be ignored never comes through here (log, snapshots).
from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

import msgspec

from idunno.base.errors import DecodeError, IdunnoError, from_code
from idunno.wire.calls import BODY_BYTES_ASSUMED, BODY_BYTES_MAX, Role
from idunno.wire.frames import VERSION

T = TypeVar("T")

DEADLINE_MS_MAX: Final = 7 * 24 * 3600 * 1000
"""The longest a call may be under way: a week, longer than any long poll or transfer, short enough for any timer."""
_ERROR_TEXT_MAX: Final = 4096  # characters; an error is a line or a few

_encoder: Final = msgspec.msgpack.Encoder()
_decoders: Final[dict[Any, msgspec.msgpack.Decoder[Any]]] = {}  # one a message type: bounded by the code


class RequestHead(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Header of REQUEST and NOTIFY: an array, so that the method name stands first and costs no keys."""

    method: str
    left_ms: Annotated[int, msgspec.Meta(ge=0, le=DEADLINE_MS_MAX)]  # to the caller's deadline
    request: msgspec.Raw  # the method's request message
    stream: bool = False  # items of the caller follow, up to its END
    actor: tuple[str, Role] | None = None  # on whose behalf a node asks


class ErrorHead(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Header of ERROR."""

    code: str
    text: str


class Greeting(msgspec.Struct, frozen=True):
    """Header of NOTIFY 0, the first frame of either side: who it is, for error messages and logs."""

    name: str = ""
    wire: int = VERSION
    body_bytes_max: int = BODY_BYTES_ASSUMED
    """The largest body of a frame that this side takes."""

    def takes_bytes(self) -> int:
        """What may be sent in one body to whoever greets so."""
        return min(BODY_BYTES_MAX, max(BODY_BYTES_ASSUMED, self.body_bytes_max))


def encode(message: object) -> bytes:
    """A message as MessagePack."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview | msgspec.Raw, kind: type[T]) -> T:
    """The message of type `kind` in `data`. Raises DecodeError for anything else."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        message: T = decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise DecodeError(f"no valid {kind.__name__}: {error or type(error).__name__}") from None
    return message


def encode_request(
    method: str,
    left_ms: int,
    request: msgspec.Struct | msgspec.Raw,
    stream: bool = False,
    actor: tuple[str, Role] | None = None,
) -> bytes:
    """What decodes to a RequestHead: the request is written in its place, not first into bytes of its own."""
    return encode((method, left_ms, request, stream, actor))


def encode_error(error: IdunnoError) -> bytes:
    text = str(error).encode("utf-8", "replace").decode()  # a lone surrogate in a name must not break the answer
    return encode(ErrorHead(error.code, text[:_ERROR_TEXT_MAX]))


def decode_error(data: bytes) -> IdunnoError:
    """The error that the other side raised. Raises DecodeError."""
    head = decode(data, ErrorHead)
    return from_code(head.code[:_ERROR_TEXT_MAX], head.text[:_ERROR_TEXT_MAX])

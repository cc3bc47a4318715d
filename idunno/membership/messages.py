# idunno/membership/messages.py: what travels in one datagram.
#
# Rule 1: a datagram is one MessagePack map of at most PAYLOAD_BYTES_MAX bytes; who sent it, and which boot of it, is known
#         from the seal, never from the map.
# Rule 2: every message introduces its sender: name, address, incarnation. What a member says of itself is first-hand;
#         rumors are hearsay.
# Rule 3: `decode` is total: DecodeError or a message whose every field is within its bound. Unknown fields are ignored, so
#         that a newer version may add some.
# Rule 4: a whole list travels over TCP only, between two nodes whose certificates were checked.
from __future__ import annotations

import enum
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from idunno.base.errors import DecodeError
from idunno.base.ids import NodeId
from idunno.wire.calls import BODY_BYTES_ASSUMED
from idunno.wire.sealed import PAYLOAD_BYTES_MAX

RUMORS_MAX: Final = 32
"""In one datagram. Never reached before the byte bound with honest names; a bound for hostile ones."""
NUMBER_MAX: Final = 2**48
"""Largest boot or incarnation that is read. Counting one a second it lasts nine million years."""
ACCUSERS_MAX: Final = 3
"""Told apart: as many as watch a member."""
LIST_MAX: Final = 4_096
"""Members in a whole list; more than any node keeps."""
LIST_BYTES_MAX: Final = BODY_BYTES_ASSUMED
"""One frame: 2,000 members with names and addresses of usual length are 130 KB."""
_HEADER_BYTES_MAX: Final = 300
"""A message without rumors: keys and numbers 80, name 63, address 128, with their MessagePack headers."""
RUMOR_BYTES_BUDGET: Final = PAYLOAD_BYTES_MAX - _HEADER_BYTES_MAX


class State(enum.Enum):
    """What a member is believed to be. `UNKNOWN` and `DELETED` are never spoken of: see swim.py."""

    UNKNOWN = "unknown"  # named by the roster, not heard from or about yet
    ACTIVE = "active"
    SUSPICIOUS = "suspicious"
    FAILED = "failed"
    DELETED = "deleted"  # failed, and out of the ring; the record stays as a tombstone against late rumours
    STOPPED = "stopped"  # on purpose, its data stays
    LEFT = "left"  # for good


class MemberView(msgspec.Struct, frozen=True):
    """What is known of one member, as others of this process may see it."""

    node: NodeId
    name: str
    address: str
    state: str  # active | suspicious | failed | stopped | left
    incarnation: int
    boot: int  # -1: never heard of
    since_ms: int  # when it came into this state; the detector's clock in the core, wall clock from the shell
    reason: str
    problem: str = ""  # what is wrong with it although it lives: UDP blocked, clock skewed


Id = Annotated[NodeId, msgspec.Meta(min_length=1, max_length=32)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Address = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:%\[\]-]{1,128}$")]
Number = Annotated[int, msgspec.Meta(ge=0, lt=NUMBER_MAX)]


class Rumor(msgspec.Struct, frozen=True, array_like=True):
    """What the sender believes of `node`; `accusers` (at most ACCUSERS_MAX) only while it is Suspicious."""

    node: Id
    boot: Number
    incarnation: Number
    state: State
    name: Name
    address: Address
    accusers: Annotated[tuple[Id, ...], msgspec.Meta(max_length=ACCUSERS_MAX)] = ()

    def __post_init__(self) -> None:
        if self.state in (State.UNKNOWN, State.DELETED):
            raise ValueError(f"{self.state.value} is no state to speak of")


Rumors = Annotated[tuple[Rumor, ...], msgspec.Meta(max_length=RUMORS_MAX)]


Digest = Annotated[int, msgspec.Meta(ge=0)]  # 63 bits, the widest that is checked
Clock = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]

_KEYS: Final = {
    "seq": "s",
    "name": "n",
    "address": "a",
    "incarnation": "i",
    "wants_list": "l",
    "rumors": "r",
    "digest": "d",
    "clock_ms": "c",
    "target": "t",
    "alive": "v",
}
"""Short names on the wire: a quiet ring sends nothing but these heads."""


class Ping(msgspec.Struct, frozen=True, tag_field="k", tag="p", omit_defaults=True, rename=_KEYS):
    """Ask for an Ack with the same `seq`; `wants_list` asks for the receiver's whole list too (a newcomer does)."""

    seq: Number
    name: Name
    address: Address
    incarnation: Number = 0
    wants_list: bool = False
    rumors: Rumors = ()
    digest: Digest = 0  # of the sender's whole list; 0: not told
    clock_ms: Clock = 0  # the sender's wall clock; 0: not told


class Ack(msgspec.Struct, frozen=True, tag_field="k", tag="a", omit_defaults=True, rename=_KEYS):
    seq: Number
    name: Name
    address: Address
    incarnation: Number = 0
    rumors: Rumors = ()
    digest: Digest = 0
    clock_ms: Clock = 0


class PingReq(msgspec.Struct, frozen=True, tag_field="k", tag="q", omit_defaults=True, rename=_KEYS):
    """Ask the receiver to ping `target` and to say with `seq` what came of it (SWIM, section 3.1)."""

    seq: Number
    target: Id
    name: Name
    address: Address
    incarnation: Number = 0
    rumors: Rumors = ()


class Relayed(msgspec.Struct, frozen=True, tag_field="k", tag="r", omit_defaults=True, rename=_KEYS):
    """What came of a PingReq: an answer of `target`, or (Lifeguard's nack) none so far, so that the asker knows itself well."""

    seq: Number
    target: Id
    name: Name
    address: Address
    incarnation: Number = 0
    alive: bool = False
    rumors: Rumors = ()


class Gossip(msgspec.Struct, frozen=True, tag_field="k", tag="g", omit_defaults=True, rename=_KEYS):
    """News without a question; also the pieces of a list."""

    name: Name
    address: Address
    incarnation: Number = 0
    rumors: Rumors = ()


class WholeList(msgspec.Struct, frozen=True, omit_defaults=True, rename=_KEYS):
    """Everything the sender believes, exchanged over TCP; there the connection says who it is, and it says its boot itself."""

    name: Name
    address: Address
    boot: Number
    incarnation: Number = 0
    rumors: Annotated[tuple[Rumor, ...], msgspec.Meta(max_length=LIST_MAX)] = ()


Message: TypeAlias = Ping | Ack | PingReq | Relayed | Gossip

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(Message)


_LIST_DECODER: Final = msgspec.msgpack.Decoder(WholeList)


def encode(message: Message | WholeList) -> bytes:
    return _ENCODER.encode(message)


def rumor_bytes(rumor: Rumor) -> int:
    """What `rumor` takes up in a datagram."""
    return len(_ENCODER.encode(rumor))


def decode(payload: bytes | memoryview) -> Message:
    """The message in `payload`. Raises DecodeError for every other bytes, and nothing else."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise DecodeError(f"a datagram's payload has at most {PAYLOAD_BYTES_MAX} bytes, this one {len(payload)}")
    try:
        message: Message = _DECODER.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"{len(payload)} bytes are no membership message: {error}") from error
    return message


def decode_list(payload: bytes | memoryview) -> WholeList:
    """The list in `payload`. Raises DecodeError for every other bytes, and nothing else."""
    if len(payload) > LIST_BYTES_MAX:
        raise DecodeError(f"a list of members has at most {LIST_BYTES_MAX} bytes, this one {len(payload)}")
    try:
        return _LIST_DECODER.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"{len(payload)} bytes are no list of members: {error}") from error

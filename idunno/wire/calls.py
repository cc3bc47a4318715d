# idunno/wire/calls.py: what a remote call looks like to the code on either side of it.
#
# Rule 1: everything above `wire` is written against this file alone; rpc.py carries it out. A test may hand in a fake.
# Rule 2: every call has a deadline, sent along as the time that is left; a lost connection fails its calls at once.
# Rule 3: bodies travel beside the MessagePack header, never in it, and are at most BODY_BYTES_MAX a frame.
from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec

from idunno.base.disk import Buffer
from idunno.base.ids import NodeId

BODY_BYTES_MAX: Final = 512 * 1024
"""One frame's body. A heartbeat waits behind at most one of these: 4 ms on a gigabit link (design.md, section 4). Each frame
costs both ends about 150 us, whatever its size: with half of this a put took a tenth more of processor time."""
BODY_BYTES_ASSUMED: Final = 256 * 1024
"""What the other side takes when its greeting does not say: earlier releases."""
HEADER_BYTES_MAX: Final = 1024 * 1024
"""One frame's MessagePack header, a batch of log entries or a page of a listing."""
STREAM_CREDIT_BYTES: Final = 2 * 1024 * 1024
"""What a sender may have under way on one stream before the reader has taken it: 16 ms at 1 Gbit/s, and the memory bound."""


class Role(enum.Enum):
    """What a certificate was issued for."""

    rank: int
    """reader < user < admin < node"""

    NODE, ADMIN, USER, READER, ANYONE = "node", "admin", "user", "reader", "anyone"


for _rank, _role in enumerate((Role.ANYONE, Role.READER, Role.USER, Role.ADMIN, Role.NODE)):
    _role.rank = _rank


@dataclass(frozen=True, slots=True)
class Actor:
    """On whose behalf something is done. A node that acts for a user says so; a node on its own is ("node id", NODE)."""

    name: str
    role: Role

    def may(self, access: Role) -> bool:
        """Whether this actor may call a method of that `access`: reader < user < admin < node."""
        return self.role.rank >= access.rank


@dataclass(frozen=True, slots=True)
class Peer:
    """Who holds the other end of a connection, as the roster (or the Unix socket's credentials) says."""

    actor: Actor
    node: NodeId | None = None  # set when the peer is a node
    local: bool = False  # came over the node's own Unix socket


Q = TypeVar("Q", bound=msgspec.Struct)
A = TypeVar("A", bound=msgspec.Struct)
Q_co = TypeVar("Q_co", bound=msgspec.Struct, covariant=True)
A_co = TypeVar("A_co", bound=msgspec.Struct, covariant=True)


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, A]):
    """A remote method: its name on the wire ("file.begin"), its message types, and the least role that may call it."""

    name: str
    request: type[Q]
    answer: type[A]
    access: Role
    also_changes: bool = False
    """Readers may call it, and in some cases it changes something all the same."""

    @property
    def changes(self) -> bool:
        """Whether an answer that was lost leaves it open what has happened."""
        return self.also_changes or self.access is not Role.READER


class Empty(msgspec.Struct, frozen=True):
    """Nothing to say."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a stream: a small `note` (MessagePack or empty) and a body of at most BODY_BYTES_MAX. One of more than the
    other side takes arrives as several."""

    note: bytes = b""
    body: bytes | memoryview = b""


@dataclass(frozen=True, slots=True)
class Reply(Generic[A]):
    """An answer with a body. A handler without a body returns the answer itself."""

    answer: A
    body: Buffer = b""


class Call(Protocol[Q_co]):
    """One request, as its handler sees it."""

    @property
    def request(self) -> Q_co: ...
    @property
    def body(self) -> bytes | memoryview: ...
    @property
    def peer(self) -> Peer: ...
    @property
    def actor(self) -> Actor:
        """Who asks: the peer itself, or, when the peer is a node that forwards, whom it names."""
        ...

    def remaining_s(self) -> float:
        """Time left to the caller's deadline. The handler is cancelled when it is over."""
        ...

    async def receive(self) -> Item | None:
        """The next item of the caller's stream; None after its end. Taking an item gives its credit back."""
        ...

    async def send(self, body: Buffer = b"", note: bytes = b"") -> None:
        """Send an item of the answer's stream; waits while the reader has not taken STREAM_CREDIT_BYTES yet."""
        ...


Handler = Callable[[Call[Q]], Awaitable["A | Reply[A]"]]
Listener = Callable[[Peer, Q], None]
"""Hears a notification in the very turn of the loop in which it arrived: it must not block."""


class Stream(Protocol[A_co]):
    """A call with items both ways. Use as `async with`; leaving without `answer()` cancels it at the other end."""

    async def send(self, body: Buffer = b"", note: bytes = b"") -> None: ...

    async def end(self) -> None:
        """No more items from this side."""
        ...

    async def receive(self) -> Item | None:
        """The next item from the other side; None after its end. Raises what the handler raised."""
        ...

    async def answer(self) -> A_co:
        """The handler's answer; items not yet received are dropped. Raises what the handler raised."""
        ...

    async def __aenter__(self) -> Stream[A_co]: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Caller(Protocol):
    """One place to send requests to: a node by its id (reconnecting as needed) or one connection."""

    async def call(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> A:
        """Send and wait. Raises what the handler raised, Unavailable (not sent), ConnectionLost, DeadlineExceeded."""
        ...

    async def call_with_body(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> tuple[A, bytes]: ...

    def open(self, method: Method[Q, A], request: Q, *, timeout_s: float, actor: Actor | None = None) -> Stream[A]: ...

    def notify(self, method: Method[Q, Empty], request: Q | msgspec.Raw, body: Buffer = b"") -> bool:
        """Send without an answer, now or never: False when there is no connection yet (one is begun) or it is full.

        What goes to several may come encoded (codec.encode), as Raw."""
        ...


class Lane(enum.StrEnum):  # its members hash as text, in C: whoever sends to a node looks its lane up
    """Connections of their own between two nodes, so that one kind of traffic never waits behind another."""

    CONSENSUS, CALLS, BULK = "consensus", "calls", "bulk"


class Peers(Protocol):
    """Callers to the other nodes of the cluster, by id."""

    def to(self, node: NodeId, lane: Lane = Lane.CALLS) -> Caller: ...


class Registrar(Protocol):
    """Where a part registers its handlers (the node's RPC server)."""

    def register(self, method: Method[Q, A], handler: Handler[Q, A]) -> None: ...


class Switchboard(Registrar, Protocol):
    """A registrar that also takes listeners."""

    def listen(self, method: Method[Q, Empty], listener: Listener[Q]) -> None:
        """For a method that is only ever notified, and often: no task, no deadline, no more than a decoded message."""
        ...


def pack(value: Any) -> bytes:
    """A value as MessagePack, for a stream item's note."""
    return msgspec.msgpack.encode(value)

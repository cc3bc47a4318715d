# idunno/wire/caller.py: the calling side of a connection.
#
# Rule 1: every call has a deadline and ends by it; when the connection is lost, all its calls end at once.
# Rule 2: Unavailable is raised only when certainly nothing was sent; after that it is ConnectionLost or DeadlineExceeded.
# Rule 3: a call that nobody waits for any more is cancelled at the other end.
from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final, Generic

import msgspec

from idunno.base.disk import Buffer
from idunno.base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    Exhausted,
    IdunnoError,
    InvalidArgument,
    Unavailable,
    Unconfirmed,
)
from idunno.wire.calls import BODY_BYTES_ASSUMED, BODY_BYTES_MAX, A, Actor, Empty, Item, Method, Q, Stream
from idunno.wire.codec import DEADLINE_MS_MAX, Greeting, decode, decode_error, encode, encode_request
from idunno.wire.connection import Link
from idunno.wire.deadlines import Deadlines
from idunno.wire.frames import Frame, Kind
from idunno.wire.streams import Inbox, Outbox, cost, framed, parts

CALLS_MAX: Final = 1024
"""Calls under way on one connection; the serving side has the same bound."""
NOTIFY_BYTES_MAX: Final = 4 * 1024 * 1024
"""Notifications are refused while this much is unsent: 32 ms at 1 Gbit/s, after which they would be stale anyway."""
NAME_MAX: Final = 80  # characters of the other side's name that messages show
_REQUESTS: Final = 2**32


class _Pending:
    """A call under way, as the connection sees it."""

    __slots__ = ("deadline", "number", "what")
    is_stream = False

    def __init__(self, what: str, deadline: float) -> None:
        self.what, self.deadline = what, deadline  # the method's name; loop time
        self.number = 0

    def answered(self, frame: Frame) -> None:
        raise NotImplementedError

    def failed(self, error: IdunnoError) -> None:
        raise NotImplementedError


class _Unary(_Pending):
    """A call that waits for its answer only; items that the handler sends are dropped."""

    __slots__ = ("future",)

    def __init__(self, what: str, deadline: float, future: asyncio.Future[Frame]) -> None:
        super().__init__(what, deadline)
        self.future = future

    def answered(self, frame: Frame) -> None:
        if not self.future.done():
            self.future.set_result(frame)

    def failed(self, error: IdunnoError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Connection:
    """calls.Caller over one connection; `rpc.connect_tcp` and `rpc.connect_unix` make them."""

    def __init__(self, label: str, *, admit: Callable[[asyncio.BaseTransport], None] | None = None) -> None:
        self.label = label  # for messages: who is at the other end
        self.closed = False
        self.fingerprint: bytes | None = None  # SHA-256 of the other side's certificate
        self.on_lost: list[Callable[[], None]] = []  # called once, however it ends
        self.loop = asyncio.get_running_loop()
        self._admit = admit  # raises IdunnoError when the other end is not who it should be
        self._link: Link | None = None
        self._pending: dict[int, _Pending] = {}
        self._deadlines = Deadlines(self._pending, self._expire)
        self._last = 0  # the newest request number
        self._greeted = False
        self.body_bytes_max = BODY_BYTES_ASSUMED  # until the other side greets
        self._ready: asyncio.Future[None] | None = None
        self._why: IdunnoError | None = None  # why it was closed

    # -- calls.Caller ---------------------------------------------------------------------------------------------------

    async def call(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> A:
        frame = await self._exchange(method, request, timeout_s, body, actor)
        return self.read_answer(method, frame)

    async def call_with_body(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> tuple[A, bytes]:
        frame = await self._exchange(method, request, timeout_s, body, actor)
        return self.read_answer(method, frame), bytes(frame.body)

    def open(self, method: Method[Q, A], request: Q, *, timeout_s: float, actor: Actor | None = None) -> Stream[A]:
        return ClientStream(self, method, request, timeout_s, actor)

    def notify(self, method: Method[Q, Empty], request: Q | msgspec.Raw, body: Buffer = b"") -> bool:
        link = self._link
        if link is None or self.closed or link.buffered() > NOTIFY_BYTES_MAX:
            return False
        header = encode_request(method.name, 0, request)
        link.send(Kind.NOTIFY, self._next_number(), header, framed(method.name, header, body))
        return True

    async def close(self) -> None:
        """Close; calls under way raise ConnectionLost. Returns when what was sent has left, within 2 s."""
        if self._link is not None:
            self._link.close()
            await self._link.gone()

    async def ready(self) -> None:
        """Until the other side has admitted us. Raises the reason when it did not."""
        if not self._greeted and not self.closed:
            self._ready = self.loop.create_future()
            await self._ready
        if self.closed:
            if isinstance(self._why, ConnectionLost):
                # No call was sent yet. TLS gives no reason when the other side does not accept our certificate's CA.
                raise Unavailable(
                    f"{self.label} closed the connection before admitting us: it is stopping, or of another cluster"
                )
            raise self._why or Unavailable(f"{self.label}: the connection is closed")

    # -- connection.Session ---------------------------------------------------------------------------------------------

    def opened(self, link: Link, transport: asyncio.BaseTransport | None) -> None:
        self._link = link
        try:
            if self._admit is not None and transport is not None:
                self._admit(transport)
        except IdunnoError as error:
            self._why = error
            link.close()
            return
        link.send(Kind.NOTIFY, 0, encode(Greeting(body_bytes_max=BODY_BYTES_MAX)))

    def received(self, frame: Frame) -> None:
        kind, number = frame.kind, frame.request
        if kind is Kind.ANSWER or (kind is Kind.ERROR and number):
            error = decode_error(frame.header) if kind is Kind.ERROR else None  # first: `lost` ends what is pending
            pending = self._pending.pop(number, None)
            if pending is None:
                return  # it was cancelled here while the answer was on its way
            if error is None:
                pending.answered(frame)
            else:
                pending.failed(error)
        elif kind is Kind.ITEM or kind is Kind.END or kind is Kind.CREDIT:
            self._stream_frame(frame)
        elif kind is Kind.ERROR:
            self._why = decode_error(frame.header)  # and the other side closes
        elif kind is Kind.NOTIFY and number == 0:
            self._greeting(decode(frame.header, Greeting))
        else:
            raise DecodeError(f"{kind.name} frame from the serving side")

    def lost(self, error: IdunnoError) -> None:
        self.closed = True
        self._why = self._why or error
        self._deadlines.stop()
        pending = list(self._pending.values())
        self._pending.clear()
        for call in pending:
            call.failed(ConnectionLost(f"{self.label}: {self._why}"))
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
        for callback in self.on_lost:
            callback()

    # -- for the calls themselves ---------------------------------------------------------------------------------------

    async def begin(self, pending: _Pending, request: msgspec.Struct, body: Buffer, actor: Actor | None) -> None:
        """Send a REQUEST as soon as the link takes it; `pending` hears of its end.

        Raises Unavailable when it could not be sent by its deadline, Exhausted, and InvalidArgument.
        """
        await self.until_writable(pending)
        link, what = self._link, pending.what
        if link is None or self.closed:
            raise Unavailable(f"{self.label}: the connection is closed: {self._why or 'it was never opened'}")
        if len(self._pending) >= CALLS_MAX:
            raise Exhausted(f"{what}: {CALLS_MAX} calls are under way to {self.label}; let some of them end first")
        left_ms = int((pending.deadline - self.loop.time()) * 1000)
        if left_ms <= 0:
            raise Unavailable(f"{what} was not sent to {self.label}: no time was left")
        on_behalf = None if actor is None else (actor.name, actor.role)
        try:
            header = encode_request(what, min(left_ms, DEADLINE_MS_MAX), request, pending.is_stream, on_behalf)
        except (ValueError, OverflowError) as error:  # text that is no Unicode, a number of more than 64 bits
            raise InvalidArgument(f"{what} cannot be sent: {error}") from None
        content = framed(what, header, body)
        pending.number = number = self._next_number()
        self._pending[number] = pending
        self._deadlines.added(pending.deadline)
        link.send(Kind.REQUEST, number, header, content)

    def read_answer(self, method: Method[Q, A], frame: Frame) -> A:
        """Raises Unconfirmed for an answer that cannot be read: the request was carried out all the same."""
        try:
            return decode(frame.header, method.answer)
        except DecodeError as error:
            raise Unconfirmed(f"{method.name}: the answer of {self.label} cannot be read: {error}") from None

    def abandon(self, pending: _Pending) -> None:
        """Nobody waits for this call any more: cancel it at the other end, unless it has ended."""
        if self._pending.pop(pending.number, None) is not None and self._link is not None:
            self._link.send(Kind.CANCEL, pending.number)

    def send(self, pending: _Pending, kind: Kind, header: bytes = b"", body: bytes | memoryview = b"") -> None:
        """A frame of a call, unless the call has ended."""
        if pending.number in self._pending and self._link is not None:
            self._link.send(kind, pending.number, header, body)

    async def until_writable(self, pending: _Pending) -> None:
        """Raises Unavailable at its deadline, or when the connection is lost."""
        link = self._link
        if link is None or not link.paused or self.closed:
            return
        try:
            async with asyncio.timeout_at(pending.deadline):
                await link.writable()
        except (TimeoutError, ConnectionLost) as error:
            why = (
                "does not read: no room to send in time" if isinstance(error, TimeoutError) else str(self._why or error)
            )
            raise Unavailable(f"{pending.what} was not sent: {self.label}: {why}") from None

    # -------------------------------------------------------------------------------------------------------------------

    async def _exchange(
        self, method: Method[Q, A], request: Q, timeout_s: float, body: Buffer, actor: Actor | None
    ) -> Frame:
        pending = _Unary(method.name, self.loop.time() + timeout_s, self.loop.create_future())
        await self.begin(pending, request, body, actor)
        try:
            return await pending.future
        finally:
            self.abandon(pending)

    def _expire(self, pending: _Pending) -> None:
        self.abandon(pending)
        pending.failed(DeadlineExceeded(f"{pending.what}: no answer from {self.label} in the time given"))

    def _next_number(self) -> int:
        number = (self._last + 1) % _REQUESTS
        while number == 0 or number in self._pending:
            number = (number + 1) % _REQUESTS
        self._last = number
        return number

    def _greeting(self, greeting: Greeting) -> None:
        if greeting.name and not self._greeted:
            self.label = f"{greeting.name[:NAME_MAX]} at {self.label}"
        self._greeted = True
        self.body_bytes_max = greeting.takes_bytes()
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _stream_frame(self, frame: Frame) -> None:
        pending = self._pending.get(frame.request)
        if isinstance(pending, ClientStream):
            pending.heard(frame)
        elif pending is not None and frame.kind is Kind.ITEM:
            self.send(pending, Kind.CREDIT, encode(cost(frame.header, frame.body)))


class ClientStream(_Pending, Generic[A]):
    """calls.Stream over a connection. The deadline runs from `async with` on."""

    is_stream = True

    def __init__(
        self, connection: Connection, method: Method[Q, A], request: Q, timeout_s: float, actor: Actor | None
    ) -> None:
        super().__init__(method.name, 0.0)  # until it is entered
        self._connection, self._method, self._request = connection, method, request
        self._timeout_s, self._actor = timeout_s, actor
        self._inbox = Inbox(lambda size: connection.send(self, Kind.CREDIT, encode(size)))
        self._outbox = Outbox()
        self._ended = False
        self._answer: Frame | None = None
        self._error: IdunnoError | None = None
        self._over: asyncio.Future[None] | None = None  # done when the answer or an error is there

    async def __aenter__(self) -> Stream[A]:
        loop = self._connection.loop
        assert self._over is None, "a stream is entered once"
        self._over = loop.create_future()
        self.deadline = loop.time() + self._timeout_s
        await self._connection.begin(self, self._request, b"", self._actor)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.abandon(self)
        self._outbox.close(None)
        self._inbox.end()

    async def send(self, body: Buffer = b"", note: bytes = b"") -> None:
        """Send an item, waiting for credit. Raises what the handler raised; once it has answered, items are dropped."""
        content = framed(self.what, note, body)
        assert not self._ended, "item after end()"
        for part in parts(content, self._connection.body_bytes_max):
            if not await self._outbox.reserve(cost(note, part)):
                return
            try:
                await self._connection.until_writable(self)
            except Unavailable as error:  # the request itself was sent long ago
                raise self._error or DeadlineExceeded(str(error)) from None
            self._connection.send(self, Kind.ITEM, note, part)

    async def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._connection.send(self, Kind.END)

    async def receive(self) -> Item | None:
        return await self._inbox.receive()

    async def answer(self) -> A:
        self._inbox.drop()
        assert self._over is not None, "answer() outside `async with`"
        await asyncio.shield(self._over)
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._connection.read_answer(self._method, self._answer)

    # -- what the connection calls --------------------------------------------------------------------------------------

    def heard(self, frame: Frame) -> None:
        """An ITEM, END or CREDIT of the other side. Raises DecodeError."""
        if frame.kind is Kind.ITEM:
            self._inbox.put(frame.header, frame.body)
        elif frame.kind is Kind.END:
            self._inbox.end()
        else:
            self._outbox.grant(decode(frame.header, int))

    def answered(self, frame: Frame) -> None:
        self._answer = frame
        self._inbox.end()
        self._finish(None)

    def failed(self, error: IdunnoError) -> None:
        self._error = error
        self._inbox.fail(error)
        self._finish(error)

    def _finish(self, error: IdunnoError | None) -> None:
        self._outbox.close(error)
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

# idunno/wire/handling.py: the serving side of one connection: requests in, handlers run, answers out.
#
# Rule 1: a request is answered exactly once: by its handler, by the deadline, or not at all when the connection is gone.
# Rule 2: who may call what is decided here, from the peer's certificate and the method's access, before anything else.
# Rule 3: what a peer makes this side hold (requests, items not taken) is bounded by HELD_BYTES_MAX for all its calls.
# Rule 4: handlers start in the order in which their requests arrived.
from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field
from typing import Any, Final, Generic

from idunno.base.disk import Buffer
from idunno.base.errors import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    Exhausted,
    IdunnoError,
    Incompatible,
    InternalError,
    PermissionDenied,
    Unavailable,
)
from idunno.wire.calls import BODY_BYTES_ASSUMED, Actor, Empty, Handler, Item, Listener, Method, Peer, Q_co, Reply, Role
from idunno.wire.codec import Greeting, RequestHead, decode, encode, encode_error
from idunno.wire.connection import Link
from idunno.wire.deadlines import Deadlines
from idunno.wire.frames import Frame, Kind, frozen
from idunno.wire.streams import Inbox, Outbox, cost, frame_fits, framed, parts

log = logging.getLogger("idunno.wire")

CALLS_MAX: Final = 1024
"""Requests under way on one connection."""
CALLS_ANONYMOUS_MAX: Final = 4
"""The same for a peer without a certificate, who has two methods to call, one after the other."""
ANONYMOUS_S: Final = 60.0
"""The longest deadline of a peer without a certificate: joining takes a second, or an election."""
HELD_BYTES_MAX: Final = 64 * 1024 * 1024
"""Request bytes and untaken items of one connection: 32 streams that stand still at their full window."""
NOTIFY_S: Final = 10.0
"""How long the handler of a notification may take: nobody waits for it, so nobody would stop it."""


@dataclass(slots=True)
class Dispatch:
    """What the connections of one server share."""

    name: str  # of this node, for error messages
    handlers: dict[str, tuple[Method[Any, Any], Handler[Any, Any]]] = field(default_factory=dict)
    listeners: dict[str, tuple[Method[Any, Empty], Listener[Any]]] = field(default_factory=dict)
    stopping: bool = False


@dataclass(slots=True, eq=False)
class ServerCall(Generic[Q_co]):
    """calls.Call: one request, as its handler sees it."""

    session: Serving
    number: int
    method: Method[Any, Any]
    request: Q_co
    body: bytes | memoryview
    peer: Peer
    actor: Actor
    deadline: float  # loop time
    size: int  # bytes of the request
    is_stream: bool  # items of the caller come
    silent: bool  # a notification: nobody hears of its end
    answered: bool = False  # nothing more is sent for it
    stopped: IdunnoError | None = None  # why its handler was cancelled
    ended: bool = False  # its handler is done
    task: asyncio.Task[None] | None = None
    begun: bool = False  # the task has made its first step
    _inbox: Inbox | None = None  # both made when first used: most calls send no items, either way
    _outbox: Outbox | None = None

    @property
    def inbox(self) -> Inbox:
        if self._inbox is None:
            self._inbox = Inbox(self._give_credit)
            if not self.is_stream:
                self._inbox.end()
            elif (over := self._over()) is not None:
                self._inbox.fail(over)
        return self._inbox

    @property
    def outbox(self) -> Outbox:
        if self._outbox is None:
            self._outbox = Outbox()
            if (over := self._over()) is not None:
                self._outbox.close(over)
        return self._outbox

    @property
    def outstanding(self) -> int:
        """Bytes of items that wait in the inbox."""
        return self._inbox.outstanding if self._inbox is not None else 0

    def end_items(self) -> None:
        """It was stopped or has ended: no more items, either way; who waits for some hears why."""
        if self._inbox is None and self._outbox is None:
            return
        over = self._over()
        assert over is not None
        if self._inbox is not None:
            self._inbox.fail(over)
        if self._outbox is not None:
            self._outbox.close(over)

    def remaining_s(self) -> float:
        return max(0.0, self.deadline - self.session.loop.time())

    async def receive(self) -> Item | None:
        return await self.inbox.receive()

    async def send(self, body: Buffer = b"", note: bytes = b"") -> None:
        content, link = framed(self.method.name, note, body), self.session.link
        for part in parts(content, self.session.body_bytes_max):
            if not await self.outbox.reserve(cost(note, part)):
                return
            if link.paused:
                await link.writable()
            if not self.answered:
                link.send(Kind.ITEM, self.number, note, part)

    def _over(self) -> IdunnoError | None:
        """Why there are no more items; None while there may be some."""
        return self.stopped or (Cancelled(f"{self.method.name} has ended") if self.ended else None)

    def _give_credit(self, size: int) -> None:
        self.session.held -= size
        if not self.answered:
            self.session.link.send(Kind.CREDIT, self.number, encode(size))


class Serving:
    """connection.Session of the serving side, once it is known who the peer is."""

    def __init__(self, dispatch: Dispatch, link: Link, peer: Peer) -> None:
        self.link, self.peer = link, peer
        self.body_bytes_max = BODY_BYTES_ASSUMED  # until the other side greets
        self.held = 0  # bytes, see HELD_BYTES_MAX
        self.loop = asyncio.get_running_loop()
        self.calls: dict[int, ServerCall[Any]] = {}
        self._deadlines = Deadlines(self.calls, self._expire)
        self._dispatch = dispatch
        self._anonymous = peer.actor.role is Role.ANYONE
        self._calls_max = CALLS_ANONYMOUS_MAX if self._anonymous else CALLS_MAX

    def opened(self, link: Link, transport: asyncio.BaseTransport | None) -> None:
        """Nothing to do: the peer was known before this was made."""

    def received(self, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.REQUEST:
            self._asked(frame)
            return
        if kind is Kind.NOTIFY:
            self._told(frame)
            return
        if kind is Kind.ANSWER or kind is Kind.ERROR:
            raise DecodeError(f"{kind.name} frame from the calling side")
        call = self.calls.get(frame.request)
        if call is None or call.answered:
            return  # it ended while this was on its way
        if kind is Kind.ITEM:
            self._item(call, frame)
        elif kind is Kind.END:
            call.inbox.end()
        elif kind is Kind.CREDIT:
            call.outbox.grant(decode(frame.header, int))
        else:
            self._stop(call, Cancelled(f"{call.method.name} was cancelled by its caller"))

    def lost(self, error: IdunnoError) -> None:
        """The connection is gone: nobody waits for its handlers."""
        self._deadlines.stop()
        for call in list(self.calls.values()):
            call.answered = True
            self._stop(call, ConnectionLost(f"{call.method.name}: the caller is gone: {error}"))

    def stop(self, error: IdunnoError) -> None:
        """Cancel all handlers; their callers are told `error`."""
        for call in list(self.calls.values()):
            self._stop(call, error)

    # -- a request begins -----------------------------------------------------------------------------------------------

    def _asked(self, frame: Frame) -> None:
        self._check_number(frame.request)
        try:
            self._begin(frame, silent=False)
        except IdunnoError as error:
            self.link.send(Kind.ERROR, frame.request, encode_error(error))

    def _told(self, frame: Frame) -> None:
        if not frame.request:
            self.body_bytes_max = decode(frame.header, Greeting).takes_bytes()
            return
        self._check_number(frame.request)
        try:
            if not self._heard(frame):
                self._begin(frame, silent=True)
        except IdunnoError as error:
            if self._anonymous:  # nor shall a stranger fill the log
                raise DecodeError(f"a notification without a certificate: {error}") from None
            log.warning("notification refused", extra={"peer": self.peer.actor.name, "error": str(error)})

    def _check_number(self, number: int) -> None:
        if not number:
            raise DecodeError("request number 0 is the connection's own")
        if number in self.calls:
            raise DecodeError(f"request number {number} is under way already")

    def _heard(self, frame: Frame) -> bool:
        """Whether a listener took this notification. Raises IdunnoError when it is not to be heard."""
        head = decode(frame.header, RequestHead)
        known = self._dispatch.listeners.get(head.method)
        if known is None:
            return False
        method, listener = known
        actor = self.peer.actor if head.actor is None else acting(self.peer, head.actor)
        if not actor.may(method.access):
            raise _denied(method, actor)
        if not self._dispatch.stopping:
            request = decode(head.request, method.request)
            try:
                listener(self.peer, request)
            except IdunnoError:
                raise
            except Exception:
                log.exception("listener failed", extra={"method": method.name, "peer": self.peer.actor.name})
        return True

    def _begin(self, frame: Frame, *, silent: bool) -> None:
        """Raises IdunnoError when the request is not to be run."""
        dispatch, number, size = self._dispatch, frame.request, len(frame.header) + len(frame.body)
        if dispatch.stopping:
            raise Unavailable(f"node {dispatch.name} is stopping: ask another node")
        if len(self.calls) >= self._calls_max:
            raise Exhausted(f"node {dispatch.name} has {self._calls_max} requests of this connection under way")
        if self.held + size > HELD_BYTES_MAX:
            raise Exhausted(
                f"node {dispatch.name} holds {self.held} bytes of this connection, at most {HELD_BYTES_MAX}"
            )
        head = decode(frame.header, RequestHead)
        known = dispatch.handlers.get(head.method)
        if known is None:
            raise Incompatible(f"node {dispatch.name} has no method {head.method[:64]!r}: it may run an older release")
        method, handler = known
        actor = self.peer.actor if head.actor is None else acting(self.peer, head.actor)
        if not actor.may(method.access):
            raise _denied(method, actor)
        request = decode(head.request, method.request)
        left_s = NOTIFY_S if silent else head.left_ms / 1000
        if self._anonymous:
            left_s = min(left_s, ANONYMOUS_S)
        self.calls[number] = call = ServerCall(
            self,
            number,
            method,
            request,
            frame.body,
            self.peer,
            actor,
            deadline=self.loop.time() + left_s,
            size=size,
            is_stream=head.stream,
            silent=silent,
            answered=silent,
        )
        self.held += size
        self._deadlines.added(call.deadline)
        call.task = self.loop.create_task(self._run(call, handler))

    def _item(self, call: ServerCall[Any], frame: Frame) -> None:
        size = cost(frame.header, frame.body)
        if self.held + size > HELD_BYTES_MAX:
            error = Exhausted(
                f"{call.method.name}: {self.held} bytes of this connection wait, at most {HELD_BYTES_MAX}"
            )
            self._stop(call, error)
            return
        self.held += size
        call.inbox.put(frame.header, frame.body)

    # -- and ends -------------------------------------------------------------------------------------------------------

    async def _run(self, call: ServerCall[Any], handler: Handler[Any, Any]) -> None:
        call.begun = True
        try:
            if call.stopped is None:
                result = await handler(call)
                if not call.answered:
                    header, body = self._encoded(call.method, result)
                    while self.link.paused:
                        await self.link.writable()
                    self._answer(call, Kind.ANSWER, header, body)
        except asyncio.CancelledError:
            self._fail(call, call.stopped or Cancelled(f"{call.method.name} was stopped on node {self._dispatch.name}"))
        except IdunnoError as error:
            if call.silent:
                log.warning("notification failed", extra={"method": call.method.name, "error": str(error)})
            self._fail(call, error)
        except Exception:
            story = secrets.token_hex(4)
            log.exception(
                "handler failed", extra={"method": call.method.name, "story": story, "actor": call.actor.name}
            )
            self._fail(call, InternalError(f"internal error {story}; see the log of node {self._dispatch.name}"))
        finally:
            self._end(call)

    def _encoded(self, method: Method[Any, Any], result: Any) -> tuple[bytes, bytes | memoryview]:
        answer, body = (result.answer, frozen(result.body)) if isinstance(result, Reply) else (result, b"")
        assert isinstance(answer, method.answer), f"{method.name} answered with {type(answer).__name__}"
        header = encode(answer)
        assert frame_fits(header, body), f"{method.name}: {len(header)} + {len(body)} bytes; answer with a stream"
        return header, body

    def _answer(self, call: ServerCall[Any], kind: Kind, header: bytes, body: bytes | memoryview = b"") -> None:
        if not call.answered:
            call.answered = True
            self.link.send(kind, call.number, header, body)

    def _fail(self, call: ServerCall[Any], error: IdunnoError) -> None:
        self._answer(call, Kind.ERROR, encode_error(error))

    def _stop(self, call: ServerCall[Any], error: IdunnoError) -> None:
        """Cancel the handler; its caller hears at once, however long the handler takes to clean up."""
        if call.stopped is None:
            call.stopped = error
            self._fail(call, error)
            call.end_items()
            # A task that is cancelled before its first step makes none: not even the call's end would be noted.
            if call.task is not None and call.begun:
                call.task.cancel()

    def _expire(self, call: ServerCall[Any]) -> None:
        self._stop(
            call, DeadlineExceeded(f"{call.method.name}: node {self._dispatch.name} was not done in the time given")
        )

    def _end(self, call: ServerCall[Any]) -> None:
        """Its handler is done, however it ended."""
        call.ended = True
        del self.calls[call.number]
        self.held -= call.size + call.outstanding
        call.end_items()


def acting(peer: Peer, named: tuple[str, Role]) -> Actor:
    """On whose behalf `peer` asks that names somebody. Raises PermissionDenied.

    Only nodes act for others, and none of them as another node: a node that was taken over must not speak for the rest.
    """
    if named == (peer.actor.name, peer.actor.role):
        return peer.actor
    if peer.node is None:
        raise PermissionDenied(f"{peer.actor.name!r} may not act for {named[0]!r}: only nodes act for others")
    if named[1] is Role.NODE:
        raise PermissionDenied(f"node {peer.actor.name} may not act as node {named[0]}")
    return Actor(*named)


def _denied(method: Method[Any, Any], actor: Actor) -> PermissionDenied:
    needed = method.access.value
    text = f"{method.name} needs the role {needed}, {actor.name or 'you'!r} has {actor.role.value}"
    if method.access is not Role.NODE:  # nobody is given that one for a command
        text += f"; an admin gives it: log in with a token of `idunno token new --role {needed}`"
    return PermissionDenied(text)

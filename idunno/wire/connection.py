# idunno/wire/connection.py: frames over one transport (TLS, Unix socket), either side.
#
# Rule 1: a session decides; this file moves bytes. Frames of one turn of the loop leave in one write.
# Rule 2: over the high-water mark senders of bodies wait (`writable`); small frames never wait, and a connection whose other
#         side does not read them is cut at WRITE_BYTES_MAX.
# Rule 3: after `close` or a loss the session hears `lost` once, and nothing more is delivered or sent.
from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final, Protocol, cast

from idunno.base.errors import ConnectionLost, DecodeError, IdunnoError, Unauthenticated
from idunno.wire.codec import encode_error
from idunno.wire.frames import HEAD_BYTES, Frame, FrameDecoder, Kind, frame_head

WRITE_HIGH_BYTES: Final = 1024 * 1024
"""Four bulk frames: 8 ms at 1 Gbit/s, so the link never idles, and cheap for 1,024 connections of which few are slow."""
WRITE_BYTES_MAX: Final = 16 * 1024 * 1024
"""What may wait unsent in the worst case: far over what waiting senders leave behind, so only a stuck reader meets it."""
_FLUSH_BYTES: Final = 64 * 1024  # past this there is nothing to gain from waiting for the end of the turn
_JOIN_BYTES: Final = 16 * 1024  # smaller pieces are joined into one, larger ones handed over as they are
CLOSE_S: Final = 2.0
"""What is still unsent when a connection is closed has this long to leave."""
DEAD_S: Final = 30
"""A machine that says nothing at all for this long is gone. Membership notices in seconds and drops the connection itself;
this is for clients, whom nobody watches."""


class Link(Protocol):
    """Carries frames to the other side, in order."""

    @property
    def paused(self) -> bool:
        """Over the high-water mark: wait for `writable` before sending a body."""
        ...

    def send(self, kind: Kind, request: int, header: bytes = b"", body: bytes | memoryview = b"") -> None:
        """Without effect once the link is closed. The lengths must be within their bounds, the body unchanging."""
        ...

    async def writable(self) -> None:
        """Until not paused. Raises ConnectionLost."""
        ...

    def buffered(self) -> int:
        """Bytes not yet handed to the system."""
        ...

    def close(self, error: IdunnoError | None = None) -> None:
        """Send what is waiting, then close; `error` is told to the other side."""
        ...

    async def gone(self) -> None:
        """Until it is closed to the last byte; at most CLOSE_S after `close`."""
        ...


class Session(Protocol):
    """One side's state of a connection."""

    def opened(self, link: Link, transport: asyncio.BaseTransport | None) -> None:
        """`transport` tells who is at the other end; None within one process."""
        ...

    def received(self, frame: Frame) -> None:
        """Raises DecodeError when the other side broke the protocol: the connection is then closed."""
        ...

    def lost(self, error: IdunnoError) -> None: ...


class Wire(asyncio.BufferedProtocol):
    """The Link over a transport.

    With `hold_reading` it reads nothing while its own writes are held up: a peer that asks and never reads the answers
    must not fill memory. Only one side of a connection may do so (the server), or both could wait for each other.
    """

    def __init__(self, session: Session, decoder: FrameDecoder, *, hold_reading: bool) -> None:
        self.paused = False
        self.decoder = decoder
        self._session = session
        self._hold_reading = hold_reading
        self._transport: asyncio.Transport | None = None
        self._closed = False
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._flush_due = False
        self._abort: asyncio.TimerHandle | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[None] = self._loop.create_future()

    # -- what asyncio calls ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        _notice_dead_peers(transport)
        self._session.opened(self, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.decoder.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        decoder, received = self.decoder, self._session.received
        try:
            decoder.received(nbytes)
            while (frame := decoder.next()) is not None:
                if self._closed:
                    return
                received(frame)
        except DecodeError as error:
            self.close(error)

    def pause_writing(self) -> None:
        self.paused = True
        if self._hold_reading and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.paused = False
        if self._hold_reading and self._transport is not None and not self._closed:
            self._transport.resume_reading()
        self._wake()

    def eof_received(self) -> bool:
        return False  # half-open connections are of no use here: close

    def connection_lost(self, exc: Exception | None) -> None:
        if self._abort is not None:
            self._abort.cancel()
        if not self._gone.done():
            self._gone.set_result(None)
        self._out.clear()
        self._out_bytes = 0
        self.decoder.drop()
        if isinstance(exc, ssl.SSLError):
            self._end(Unauthenticated(f"TLS ended the connection: {exc.reason or exc}"))
        else:
            self._end(ConnectionLost(f"connection lost: {exc or 'closed by the other side'}"))

    # -- what sessions call ---------------------------------------------------------------------------------------------

    def send(self, kind: Kind, request: int, header: bytes = b"", body: bytes | memoryview = b"") -> None:
        if self._closed:
            return
        header_bytes, body_bytes = len(header), len(body)
        self._out += (frame_head(kind, request, header_bytes, body_bytes), header, body)
        self._out_bytes += HEAD_BYTES + header_bytes + body_bytes
        if self._out_bytes >= _FLUSH_BYTES:
            self.flush()
        elif not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand what has gathered to the transport now."""
        self._flush_due = False
        if not self._out or self._transport is None:
            return
        if self._transport.is_closing():  # `lost` comes soon; until then nothing may gather
            self._out.clear()
            self._out_bytes = 0
            return
        if self._out_bytes < _JOIN_BYTES:
            self._transport.write(b"".join(self._out))
        else:
            self._transport.writelines(_grouped(self._out))
        self._out.clear()
        self._out_bytes = 0
        if self._transport.get_write_buffer_size() > WRITE_BYTES_MAX:
            self._transport.abort()
            self._end(ConnectionLost(f"connection cut: {WRITE_BYTES_MAX} bytes wait and the other side does not read"))

    async def writable(self) -> None:
        while self.paused and not self._closed:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)
        if self._closed:
            raise ConnectionLost("connection lost before this could be sent")

    def buffered(self) -> int:
        return self._out_bytes + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    def close(self, error: IdunnoError | None = None) -> None:
        if self._closed:
            return
        if error is not None:
            self.send(Kind.ERROR, 0, encode_error(error))
        self.flush()
        if self._transport is not None and not self._closed:
            self._transport.close()
            if not self._gone.done():
                self._abort = self._loop.call_later(CLOSE_S, self._transport.abort)
        self._end(error or ConnectionLost("connection closed"))

    def abort(self) -> None:
        """Close at once; what is unsent is lost."""
        if self._transport is not None:
            self._transport.abort()
        self._end(ConnectionLost("connection closed"))

    async def gone(self) -> None:
        await asyncio.shield(self._gone)

    # -------------------------------------------------------------------------------------------------------------------

    def _end(self, error: IdunnoError) -> None:
        if self._closed:
            return
        self._closed = True
        self._wake()
        self._session.lost(error)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


def _notice_dead_peers(transport: asyncio.BaseTransport) -> None:
    """Let TCP find out within DEAD_S when the other machine is gone without a word (Unix sockets know by themselves)."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    third_s = DEAD_S // 3
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", third_s), ("KEEPINTVL", third_s), ("KEEPCNT", 2), ("USER_TIMEOUT", DEAD_S * 1000)):
        option = getattr(socket, f"TCP_{name}", None)  # not every system has each of them
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _grouped(pieces: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """The same bytes with neighbouring small pieces joined: few buffers for the system, large ones not copied."""
    groups: list[bytes | memoryview] = []
    small: list[bytes | memoryview] = []
    for piece in pieces:
        if len(piece) < _JOIN_BYTES:
            small.append(piece)
            continue
        if small:
            groups.append(b"".join(small))
            small = []
        groups.append(piece)
    if small:
        groups.append(b"".join(small))
    return groups

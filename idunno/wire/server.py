# idunno/wire/server.py: listens, finds out who connects, and lets them in or not.
#
# Rule 1: who a peer is comes from its certificate through `identify` (TLS), or from the kernel (Unix socket): never from
#         what it says.
# Rule 2: connections are counted and bounded; one that says nothing, or is anonymous and idle, is cut.
# Rule 3: a peer that is refused is told why (ERROR 0), so that its error names the next step.
from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import pwd
import socket
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any, Final

from idunno.base.errors import ConnectionLost, DecodeError, Exhausted, IdunnoError, Unauthenticated, Unavailable
from idunno.wire.calls import BODY_BYTES_MAX, A, Actor, Empty, Handler, Listener, Method, Peer, Q, Role
from idunno.wire.codec import Greeting, encode
from idunno.wire.connection import CLOSE_S, Link, Wire
from idunno.wire.frames import Frame, FrameDecoder, Kind
from idunno.wire.handling import Dispatch, Serving

log = logging.getLogger("idunno.wire")

_ANONYMOUS: Final = Peer(Actor("", Role.ANYONE))
_ANONYMOUS_HEADER_BYTES_MAX: Final = 64 * 1024
"""A certificate request has 1 KiB; strangers get no body and no megabytes."""
_BACKLOG: Final = 256  # connections that the kernel holds until they are accepted: a cluster's restart at once


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes."""

    connections_max: int = 1024
    clients_max: int = 768  # of these, who is no node: people must not shut nodes out
    anonymous_max: int = 64
    first_frame_s: float = 10.0  # handshake and first frame
    anonymous_idle_s: float = 30.0


class Server:
    """calls.Registrar: runs the handlers of a node for all who connect to it."""

    def __init__(
        self, identify: Callable[[bytes | None], Peer | None], *, name: str, limits: Limits | None = None
    ) -> None:
        """`identify` tells the peer of a certificate by the SHA-256 of its DER; None: nobody we know.

        It is asked for None too, and may give anonymous peers a Peer of role ANYONE; what it gives them beyond is ignored.
        What it raises (an IdunnoError) is told to the peer, which is not let in.
        """
        self.name = name
        self.counters: Counter[str] = Counter()  # accepted, refused, cut: closed set of words
        self._identify = identify
        self._limits = limits or Limits()
        self._dispatch = Dispatch(name)
        self._doors: dict[_Door, None] = {}  # in the order in which they came: they are closed in it too
        self._local: list[Serving] = []
        self._listening: list[asyncio.AbstractServer] = []
        self._unix_paths: list[str] = []

    def register(self, method: Method[Q, A], handler: Handler[Q, A]) -> None:
        assert method.name not in self._dispatch.handlers, f"two handlers for {method.name}"
        self._dispatch.handlers[method.name] = (method, handler)

    def listen(self, method: Method[Q, Empty], listener: Listener[Q]) -> None:
        """For a method that is only ever notified, and often: no task, no deadline, no more than a decoded message."""
        assert method.name not in self._dispatch.listeners, f"two listeners for {method.name}"
        self._dispatch.listeners[method.name] = (method, listener)

    @property
    def connections(self) -> int:
        return len(self._doors)

    async def listen_tcp(self, host: str, port: int, ssl_context: SSLContext | None) -> int:
        """Serve on a TCP port; 0 takes a free one. Returns the port. Raises Unavailable.

        Without `ssl_context` every peer is anonymous: of use only to measure, and inside a simulated network.
        """
        loop = asyncio.get_running_loop()
        times: dict[str, Any] = {}
        if ssl_context is not None:
            times = {"ssl_handshake_timeout": self._limits.first_frame_s, "ssl_shutdown_timeout": CLOSE_S}
        try:
            listening = await loop.create_server(
                lambda: self._accept(unix=False), host, port, ssl=ssl_context, backlog=_BACKLOG, **times
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                text = f"port {port} of {host} is in use by another process: stop that one or choose another port"
            else:
                text = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise Unavailable(text) from None
        self._listening.append(listening)
        return int(listening.sockets[0].getsockname()[1])

    async def listen_unix(self, path: str) -> None:
        """Serve on a Unix socket, for processes of the same user and of root. Raises Unavailable."""
        loop = asyncio.get_running_loop()
        try:
            with short_path(path) as short:
                _remove_stale_socket(short)
                self._listening.append(
                    await loop.create_unix_server(lambda: self._accept(unix=True), short, backlog=_BACKLOG)
                )
                os.chmod(short, 0o600)
        except OSError as error:
            raise Unavailable(f"cannot listen on {path}: {error.strerror or error}") from None
        self._unix_paths.append(path)

    def attach(self, link: Link, peer: Peer) -> Serving:
        """Serve a caller within this process (local.py)."""
        serving = Serving(self._dispatch, link, peer)
        self._local.append(serving)
        return serving

    def recheck(self) -> None:
        """The roster has changed: cut whom `identify` no longer knows; roles that changed hold from the next call."""
        for door in list(self._doors):
            if door.serving is not None and door.fingerprint is not None:
                try:
                    peer = self._identify(door.fingerprint)
                except IdunnoError as error:
                    door.refuse(error)
                    continue
                if peer is None:
                    door.refuse(self._unknown())
                else:
                    door.serving.peer = peer

    async def close(self, grace_s: float) -> None:
        """Take no more requests, let those under way end for `grace_s`, cancel the rest, close all connections."""
        self._dispatch.stopping = True
        for listening in self._listening:
            listening.close()
        for path in self._unix_paths:
            with contextlib.suppress(OSError), short_path(path) as short:
                os.unlink(short)
        self._unix_paths.clear()
        serving = [door.serving for door in self._doors if door.serving is not None] + self._local
        tasks = [call.task for one in serving for call in one.calls.values() if call.task is not None]
        tasks = [task for task in tasks if task is not asyncio.current_task()]
        if tasks and grace_s > 0:
            await asyncio.wait(tasks, timeout=grace_s)
        for one in serving:
            # Not `Cancelled`, which says that somebody wanted the end of it: these callers are to ask another node.
            one.stop(ConnectionLost(f"node {self.name} is stopping: ask another node"))
        doors = list(self._doors)
        for door in doors:
            if door.link is not None:
                door.link.close()
        for one in self._local:
            one.link.close()
        waiting = [asyncio.ensure_future(door.link.gone()) for door in doors if door.link is not None]
        waiting += [asyncio.ensure_future(_ended(task)) for task in tasks if not task.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=CLOSE_S + 1)
        for future in waiting:
            future.cancel()

    # -- who connects ---------------------------------------------------------------------------------------------------

    def _accept(self, *, unix: bool) -> Wire:
        door = _Door(self, self._limits, unix=unix)
        wire = Wire(door, FrameDecoder(_ANONYMOUS_HEADER_BYTES_MAX, 0), hold_reading=True)
        door.decoder = wire.decoder
        return wire

    def admit(self, door: _Door, link: Link, transport: asyncio.BaseTransport) -> Serving:
        """Raises IdunnoError with what the peer is to be told."""
        if self._dispatch.stopping:
            raise Unavailable(f"node {self.name} is stopping: ask another node")
        if len(self._doors) >= self._limits.connections_max:
            raise Exhausted(f"node {self.name} has {len(self._doors)} connections, its bound: ask another node")
        if door.unix:
            peer = unix_peer(transport)
        else:
            door.fingerprint = peer_fingerprint(transport)
            known = self._identify(door.fingerprint)
            if door.fingerprint is None:
                peer = _ANONYMOUS
            elif known is None:
                raise self._unknown()
            else:
                peer = known
        if peer.actor.role is Role.ANYONE:
            strangers = sum(1 for other in self._doors if other.anonymous)
            if strangers >= self._limits.anonymous_max:
                raise Exhausted(f"node {self.name} has {strangers} connections without a certificate: try again later")
            door.anonymous = True
        if peer.node is None:
            clients = sum(1 for other in self._doors if other.client)
            if clients >= self._limits.clients_max:
                raise Exhausted(f"node {self.name} has {clients} connections of clients, its bound: ask another node")
            door.client = True
        self._doors[door] = None
        self.counters["accepted"] += 1
        return Serving(self._dispatch, link, peer)

    def left(self, door: _Door) -> None:
        self._doors.pop(door, None)

    def _unknown(self) -> Unauthenticated:
        return Unauthenticated(
            f"node {self.name} does not know this certificate: it was removed or revoked, or is of another cluster; "
            "join or log in again with a new token"
        )


class _Door:
    """connection.Session of an accepted connection: admits the peer, then hands everything to its Serving."""

    def __init__(self, server: Server, limits: Limits, *, unix: bool) -> None:
        self.unix = unix
        self.anonymous = self.client = False
        self.fingerprint: bytes | None = None
        self.serving: Serving | None = None
        self.link: Link | None = None
        self.decoder: FrameDecoder | None = None
        self._server, self._limits = server, limits
        self._since = self._heard = asyncio.get_running_loop().time()  # before the handshake
        self._said_something = False
        self._timer: asyncio.TimerHandle | None = None

    def opened(self, link: Link, transport: asyncio.BaseTransport | None) -> None:
        assert transport is not None
        self.link = link
        try:
            self.serving = self._server.admit(self, link, transport)
        except IdunnoError as error:
            self._server.counters["refused"] += 1
            log.info("connection refused", extra={"error": str(error), "code": error.code})
            link.close(error)
            return
        if not self.anonymous and self.decoder is not None:
            whole = FrameDecoder()
            self.decoder.header_bytes_max, self.decoder.body_bytes_max = whole.header_bytes_max, whole.body_bytes_max
        link.send(Kind.NOTIFY, 0, encode(Greeting(self._server.name, body_bytes_max=BODY_BYTES_MAX)))
        self._timer = asyncio.get_running_loop().call_at(self._since + self._limits.first_frame_s, self._check)

    def received(self, frame: Frame) -> None:
        if self.serving is not None:
            self._said_something = True
            if self.anonymous:
                self._heard = asyncio.get_running_loop().time()
            self.serving.received(frame)

    def lost(self, error: IdunnoError) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._server.left(self)
        if self.serving is not None:
            if isinstance(error, DecodeError):
                self._server.counters["cut"] += 1
                log.info("connection cut", extra={"peer": self.serving.peer.actor.name, "error": str(error)})
            self.serving.lost(error)

    def refuse(self, error: IdunnoError) -> None:
        self._server.counters["cut"] += 1
        log.info("connection cut", extra={"error": str(error)})
        if self.link is not None:
            self.link.close(error)

    def _check(self) -> None:
        """Cut a connection that says nothing; come again for an anonymous one."""
        assert self.serving is not None
        loop = asyncio.get_running_loop()
        if not self._said_something:
            self.refuse(DecodeError(f"nothing was said for {self._limits.first_frame_s:g} s"))
            return
        if self.anonymous:
            if not self.serving.calls and loop.time() - self._heard >= self._limits.anonymous_idle_s:
                self.refuse(Unauthenticated(f"idle for {self._limits.anonymous_idle_s:g} s without a certificate"))
                return
            self._timer = loop.call_at(max(self._heard, loop.time()) + self._limits.anonymous_idle_s, self._check)


def _remove_stale_socket(path: str) -> None:
    """Remove the socket of a process that died: the data directory has one owner at a time, and that is us."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])


def peer_fingerprint(transport: asyncio.BaseTransport) -> bytes | None:
    """SHA-256 of the other side's certificate, which TLS has verified under the CA; None when it showed none."""
    tls = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True) if tls is not None else None
    return hashlib.sha256(certificate).digest() if certificate else None


def unix_peer(transport: asyncio.BaseTransport) -> Peer:
    """Who holds the other end of a Unix socket: this process's user or root. Raises Unauthenticated for all others.

    As NAME@local, which nobody can log in as: what somebody owns here is not for whoever chooses the same name elsewhere.
    """
    sock = transport.get_extra_info("socket")
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid not in (0, os.getuid()):
        raise Unauthenticated(f"user id {uid} may not use this node's socket: run as user id {os.getuid()}, or log in")
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid-{uid}"  # a container without that user
    return Peer(Actor(f"{name}@local", Role.ADMIN), local=True)


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """A name of `path` that fits into a socket address (108 bytes on Linux) as long as its last part does."""
    if len(os.fsencode(path)) <= 100:
        yield path
        return
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)

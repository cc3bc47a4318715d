# tests/simulation/network.py: the wires between simulated machines: datagrams, byte streams, and what goes wrong with them.
#
# Rule 1: the network decides by its own chance alone when, how often and whether a packet arrives; it never looks into one.
# Rule 2: datagrams are lost, doubled and overtaken. A stream is what TCP makes of the same wire: bytes arrive once and in
#         order, a loss costs a retransmission delay, a broken link stalls it, a dead end resets it or times out.
# Rule 3: a stream has a window: what its reader has not taken is bounded, and then the writer's buffer fills.
# Rule 4: who is at the other end is told by `ssl_object`, as TLS would: that machine's certificate.
from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any, Final

from tests.simulation.loop import Scheduler, SimLoop, State

if TYPE_CHECKING:
    from tests.simulation.trace import Trace

WINDOW_BYTES: Final = 256 * 1024
"""Sent and not yet taken by the reader: the kernels' buffers of both ends together."""
RTO_FIRST_S: Final = 0.2
RTO_MAX_S: Final = 5.0
GIVE_UP_S: Final = 30.0
"""TCP_USER_TIMEOUT as wire/connection.py sets it: bytes that are unacknowledged for so long end the connection."""
SYN_RETRY_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0)

Address = tuple[str, int]


def _lognormal(rng: random.Random) -> float:
    return rng.lognormvariate(-0.72, 1.2)  # a mean of 1: a hundredth takes eight times as long


def _pareto(rng: random.Random) -> float:
    return min(20.0, (rng.paretovariate(1.5) - 1.0) / 2.0)  # a mean of about 1, and a heavy tail


def _two_ways(rng: random.Random) -> float:
    return 9.0 if rng.random() < 0.1 else 0.11  # most take the short way


SPREADS: Final[dict[str, Callable[[random.Random], float]]] = {
    "constant": lambda rng: 1.0,
    "uniform": lambda rng: 2.0 * rng.random(),
    "exponential": lambda rng: rng.expovariate(1.0),
    "lognormal": _lognormal,
    "pareto": _pareto,
    "two ways": _two_ways,
}
"""How delays are distributed; each has a mean of about 1."""


@dataclass(slots=True)
class Quality:
    """How good the wires are now."""

    delay_s: float = 0.000_2
    """The shortest time between two machines of one room."""
    jitter_s: float = 0.000_3
    """The mean of what is added by chance, as `spread` says."""
    spread: str = "exponential"
    """A name of SPREADS."""
    loss: float = 0.0
    """Of each datagram and of each TCP segment."""
    duplicate: float = 0.0
    reorder: float = 0.0
    """The share of datagrams that take up to `reorder_s` longer, and so are overtaken."""
    reorder_s: float = 0.05
    bytes_per_s: float = 125e6


class Network:
    def __init__(self, scheduler: Scheduler, rng: random.Random, trace: Trace) -> None:
        self.scheduler, self.rng, self.trace = scheduler, rng, trace
        self.quality = Quality()
        self.slow: dict[tuple[str, str], Quality] = {}
        """Wires from one address to another that differ."""
        self.hosts: dict[str, Host] = {}
        self.names: dict[str, str] = {}
        self.blocked: Counter[tuple[str, str, str]] = Counter()
        """(from, to, "udp" or "tcp"): how many faults forbid it now."""
        self.counts: Counter[str] = Counter()

    def block(self, source: str, target: str, *kinds: str) -> None:
        for kind in kinds or ("udp", "tcp"):
            self.blocked[source, target, kind] += 1

    def unblock(self, source: str, target: str, *kinds: str) -> None:
        for kind in kinds or ("udp", "tcp"):
            self.blocked[source, target, kind] -= 1
            if self.blocked[source, target, kind] <= 0:
                del self.blocked[source, target, kind]

    def delay_s(self, quality: Quality, size: int) -> float:
        exponential = quality.spread == "exponential"  # nearly always
        by_chance = -log(1.0 - self.rng.random()) if exponential else SPREADS[quality.spread](self.rng)
        return quality.delay_s + by_chance * quality.jitter_s + size / quality.bytes_per_s

    def wire(self, source: str, target: str) -> Quality:
        return self.slow.get((source, target), self.quality) if self.slow else self.quality

    def passes(self, source: str, target: str, kind: str) -> bool:
        """Whether a packet sent now arrives."""
        if self.blocked and (source, target, kind) in self.blocked:
            self.counts[f"{kind} blocked"] += 1
            return False
        loss = self.wire(source, target).loss
        if loss and self.rng.random() < loss:
            self.counts[f"{kind} lost"] += 1
            return False
        return True

    def datagram(self, source: Address, target: Address, data: bytes) -> None:
        host = self.hosts.get(target[0])
        if host is None or not self.passes(source[0], target[0], "udp"):
            return
        quality, rng = self.wire(source[0], target[0]), self.rng
        delay = self.delay_s(quality, len(data))
        if quality.reorder and rng.random() < quality.reorder:
            self.counts["udp reordered"] += 1
            delay += rng.random() * quality.reorder_s
        host.datagram_at(delay, data, source, target[1])
        if quality.duplicate and rng.random() < quality.duplicate:
            self.counts["udp duplicated"] += 1
            host.datagram_at(delay + rng.random() * 0.01, data, source, target[1])


class Host:
    """One machine on the network: an address, and what listens there at the moment."""

    def __init__(self, network: Network, address: str, certificate: bytes | None) -> None:
        self.network, self.address, self.certificate = network, address, certificate
        self.loop: SimLoop | None = None
        """Of the process that runs here now."""
        self.up = True
        """Whether the machine itself has power: without, nobody even refuses a connection."""
        self._listening: dict[int, Listener] = {}
        self._sockets: dict[int, Datagrams] = {}
        self.streams: dict[Stream, None] = {}
        self._next_port = 40_000
        self._reads_from = 0.0
        network.hosts[address] = self

    # -- what the loop asks ---------------------------------------------------------------------------------------

    def listen(self, loop: SimLoop, factory: Callable[[], Any], port: int, *, tls: bool) -> Listener:
        port = port or self._port()
        if port in self._listening:
            raise OSError(errno.EADDRINUSE, "address already in use")
        self._listening[port] = listener = Listener(self, loop, factory, port, tls)  # type: ignore[abstract]
        return listener

    def bind(
        self, loop: SimLoop, factory: Callable[[], Any], local_addr: Address | None, remote_addr: Address | None = None
    ) -> tuple[Datagrams, Any]:
        port = (local_addr[1] if local_addr is not None else 0) or self._port()
        if port in self._sockets:
            raise OSError(errno.EADDRINUSE, "address already in use")
        protocol = factory()
        self._sockets[port] = transport = Datagrams(self, loop, protocol, port, remote_addr)
        loop.call_soon(protocol.connection_made, transport)
        return transport, protocol

    def look_up(self, name: str, port: int) -> list[tuple[Any, ...]]:
        address = self.network.names.get(name, name)
        if address not in self.network.hosts:
            raise OSError(errno.ENOENT, f"name not known: {name}")
        return [(2, 1, 6, "", (address, port))]

    async def connect(
        self, loop: SimLoop, factory: Callable[[], Any], name: str, port: int, *, tls: bool
    ) -> tuple[Stream, Any]:
        network = self.network
        address = network.names.get(name, name)
        done: asyncio.Future[None] = loop.create_future()
        for wait in (*SYN_RETRY_S, None):
            target = network.hosts.get(address)
            if target is not None and target.up:
                there = network.passes(self.address, address, "tcp")
                if there and network.passes(address, self.address, "tcp"):
                    break
            if wait is None:
                raise OSError(errno.ETIMEDOUT, "connection timed out")
            await asyncio.sleep(wait)
        # One round trip for TCP, one for TLS 1.3.
        there_s = network.delay_s(network.wire(self.address, address), 60)
        back_s = network.delay_s(network.wire(address, self.address), 60) * (3 if tls else 1)
        assert target is not None
        listener = target._listening.get(port)
        loop.deliver_at(loop.scheduler.now + there_s + back_s, _wake, done)
        await done
        if listener is None or listener.closed or target._listening.get(port) is not listener:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")
        shown = tls and listener.tls
        here = Stream(self, loop, (address, port), self._port(), _Certificate(target.certificate) if shown else None)
        there_end = Stream(
            target,
            listener.loop,
            (self.address, here.port),
            port,
            _Certificate(self.certificate) if shown else None,
        )
        here.peer, there_end.peer = there_end, here
        protocol = factory()
        listener.loop.deliver_at(loop.scheduler.now, listener.accept, there_end)
        here.attach(protocol)
        protocol.connection_made(here)
        return here, protocol

    # -- what the network brings ----------------------------------------------------------------------------------

    def datagram_at(self, delay: float, data: bytes, source: Address, port: int) -> None:
        loop = self.loop
        if loop is not None:
            # Bound to the process that runs now: one that starts within the delay has not opened its socket yet.
            loop.deliver_at(loop.scheduler.now + delay, self._datagram, data, source, port)

    def _datagram(self, data: bytes, source: Address, port: int) -> None:
        transport = self._sockets.get(port)
        if transport is not None and not transport.is_closing():
            self.network.trace.note("datagram", source[0], self.address, len(data))
            transport.protocol.datagram_received(data, source)

    def _port(self) -> int:
        self._next_port += 1
        return self._next_port

    def read_nothing_until(self, when: float) -> None:
        """Nothing is taken from its connections before; what arrives fills the windows."""
        self._reads_from = max(self._reads_from, when)

    def may_read(self, stream: Stream) -> bool:
        if self._reads_from <= self.network.scheduler.now:
            return True
        if not stream.waits_to_read:
            stream.waits_to_read = True
            stream.loop.deliver_at(self._reads_from, stream.feed)
        return False

    # -- how a process ends ---------------------------------------------------------------------------------------

    def process_ends(self, *, power_lost: bool) -> None:
        """A killed process's kernel closes its sockets; a machine without power says nothing."""
        self.up = not power_lost
        self._listening.clear()
        self._sockets.clear()
        streams, self.streams = list(self.streams), {}
        for stream in streams:
            stream.vanish(silently=power_lost)

    def released(self, port: int, *, udp: bool) -> None:
        (self._sockets if udp else self._listening).pop(port, None)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Listener(asyncio.AbstractServer):
    def __init__(self, host: Host, loop: SimLoop, factory: Callable[[], Any], port: int, tls: bool) -> None:
        self.host, self.loop, self.factory, self.port, self.tls, self.closed = host, loop, factory, port, tls, False

    @property
    def sockets(self) -> list[Listener]:
        return [self]

    def getsockname(self) -> Address:
        return self.host.address, self.port

    def accept(self, stream: Stream) -> None:
        if self.closed:
            stream.reset()
            return
        protocol = self.factory()
        stream.attach(protocol)
        protocol.connection_made(stream)
        stream.feed()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.host.released(self.port, udp=False)

    async def wait_closed(self) -> None:
        return


class Datagrams(asyncio.DatagramTransport):
    def __init__(self, host: Host, loop: SimLoop, protocol: Any, port: int, remote: Address | None) -> None:
        self.host, self.loop, self.protocol, self.port, self._closing = host, loop, protocol, port, False
        self._remote = remote

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sockname":
            return self.host.address, self.port
        return _Family if name == "socket" else default

    def sendto(self, data: Any, addr: Any = None) -> None:
        addr = addr or self._remote
        if not self._closing and addr is not None and self.loop.state is State.RUNNING:
            self.host.network.datagram((self.host.address, self.port), addr, bytes(data))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.host.released(self.port, udp=True)
            self.loop.call_soon(self.protocol.connection_lost, None)

    abort = close


class _Family:
    family = 2  # AF_INET


class _Certificate:
    """What TLS would tell of the other side; a newcomer shows no certificate."""

    def __init__(self, certificate: bytes | None) -> None:
        self._certificate = certificate

    def getpeercert(self, binary_form: bool = False) -> bytes | None:
        return self._certificate


class Stream(asyncio.Transport):
    """One end of a TCP connection."""

    def __init__(self, host: Host, loop: SimLoop, remote: Address, port: int, tls: _Certificate | None) -> None:
        self.host, self.loop, self.remote, self.port = host, loop, remote, port
        self.peer: Stream
        self._serial = loop.scheduler.next_serial()
        self._tls = tls
        self._protocol: Any = None
        self._buffered = True
        # Sending.
        self._out: deque[bytes] = deque()
        self._out_bytes = self._flying_bytes = 0
        self._high, self._low = 64 * 1024, 16 * 1024
        self._paused_writing = self._closing = self._lost = self._fin_sent = False
        self._arrives = 0.0  # when the last segment under way arrives: none overtakes it
        self._retry = False
        self._rto, self._stalled_since = RTO_FIRST_S, 0.0
        # Receiving.
        self._in: deque[bytes | None] = deque()  # None: the other side's end
        self._paused_reading = self.waits_to_read = False
        host.streams[self] = None

    def __hash__(self) -> int:
        return self._serial

    def attach(self, protocol: Any) -> None:
        self._protocol, self._buffered = protocol, hasattr(protocol, "get_buffer")

    # -- asyncio.Transport ----------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        match name:
            case "peername":
                return self.remote
            case "sockname":
                return self.host.address, self.port
            case "ssl_object":
                return self._tls
            case _:
                return default

    def get_protocol(self) -> Any:
        return self._protocol

    def set_protocol(self, protocol: Any) -> None:
        self.attach(protocol)

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def is_reading(self) -> bool:
        return not self._paused_reading

    def pause_reading(self) -> None:
        self._paused_reading = True

    def resume_reading(self) -> None:
        if self._paused_reading:
            self._paused_reading = False
            self.loop.call_soon(self.feed)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 * 1024 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._out_bytes

    def write(self, data: Any) -> None:
        if self._closing or self._lost or self.loop.state is State.DEAD or not data:
            return
        self._out.append(bytes(data))
        self._out_bytes += len(data)
        self._pump()
        if self._out_bytes > self._high and not self._paused_writing:
            self._paused_writing = True
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        if not self._closing and not self._lost and self.loop.state is not State.DEAD:
            self._closing = True
            self._pump()

    def abort(self) -> None:
        if not self._lost and self.loop.state is not State.DEAD:
            self._send_reset()
            self._end(None)

    # -- sending --------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send what the window lets through, at most one segment waiting for its retransmission."""
        network, now = self.host.network, self.loop.scheduler.now
        while not self._retry and not self._lost:
            if not self._out:
                if self._closing and not self._fin_sent:
                    self._fin_sent = True
                    self._send(None)
                    self.loop.call_soon(self._end, None)
                break
            if self._flying_bytes >= WINDOW_BYTES:
                break
            if self.peer.loop.state is State.DEAD and self.peer.host.up:
                # Nobody holds the other end any more: its machine says so as soon as something reaches it.
                self.loop.deliver_at(now + network.delay_s(network.quality, 60), self.reset)
                break
            if (
                not self.peer.host.up
                or not network.passes(self.host.address, self.remote[0], "tcp")
                or (network.blocked and (self.remote[0], self.host.address, "tcp") in network.blocked)
            ):
                self._stall(now)
                break
            self._rto, self._stalled_since = RTO_FIRST_S, 0.0
            data = self._out.popleft()
            self._out_bytes -= len(data)
            self._flying_bytes += len(data)
            self._send(data)
        if self._paused_writing and self._out_bytes <= self._low and not self._lost:
            self._paused_writing = False
            self._protocol.resume_writing()

    def _stall(self, now: float) -> None:
        if self._stalled_since == 0.0:
            self._stalled_since = now
        elif now - self._stalled_since >= GIVE_UP_S:
            self._end(TimeoutError(errno.ETIMEDOUT, "connection timed out"))
            return
        self._retry = True
        self.loop.deliver_at(now + self._rto, self._again)
        self._rto = min(2 * self._rto, RTO_MAX_S)

    def _again(self) -> None:
        self._retry = False
        if not self._lost:
            self._pump()

    def _send(self, data: bytes | None) -> None:
        network, scheduler = self.host.network, self.loop.scheduler
        quality = network.wire(self.host.address, self.remote[0])
        self._arrives = max(self._arrives, scheduler.now + network.delay_s(quality, len(data or b"")))
        self.peer.loop.deliver_at(self._arrives, self.peer.arrived, data)

    def _send_reset(self, not_before: float = 0.0) -> None:
        network = self.host.network
        if network.passes(self.host.address, self.remote[0], "tcp"):
            delay = network.delay_s(network.wire(self.host.address, self.remote[0]), 60)
            at = max(self._arrives, self.loop.scheduler.now + delay, not_before)
            self.peer.loop.deliver_at(at, self.peer.reset)

    # -- receiving ------------------------------------------------------------------------------------------------

    def arrived(self, data: bytes | None) -> None:
        if self._lost or self._closing:
            if data is not None and self._lost:
                self._send_reset()  # nobody reads here any more
            return
        self._in.append(data)
        if not self._paused_reading and self._protocol is not None:
            self.feed()

    def feed(self) -> None:
        """Hand what has arrived to the protocol, as long as it reads."""
        self.waits_to_read = False
        if not self.host.may_read(self):
            return
        while self._in and not self._paused_reading and not self._lost and not self._closing:
            data = self._in.popleft()
            if data is None:
                if not self._protocol.eof_received():
                    self.close()
                return
            self.host.network.trace.note("stream", self.remote[0], self.host.address, len(data))
            self._taken(len(data))
            protocol = self._protocol
            if not self._buffered:
                protocol.data_received(data)
                continue
            at, end = 0, len(data)
            while at < end and not self._lost:
                room = protocol.get_buffer(-1)
                count = min(len(room), end - at)
                room[:count] = data[at : at + count] if at or count < end else data
                at += count
                protocol.buffer_updated(count)

    def _taken(self, size: int) -> None:
        """The reader took so much: the sender's window opens again."""
        peer = self.peer
        peer._flying_bytes -= size
        if (peer._out or peer._paused_writing) and not peer._retry:
            network = self.host.network
            delay = network.delay_s(network.wire(self.host.address, self.remote[0]), 60)
            peer.loop.deliver_at(self.loop.scheduler.now + delay, peer._pump)

    # -- ends -----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """The other side refuses to go on."""
        self._end(ConnectionResetError(errno.ECONNRESET, "connection reset by peer"))

    def cut(self) -> None:
        """A fault: both ends are reset, as by a firewall that lost its state."""
        self.loop.call_soon(self.reset)
        self.peer.loop.call_soon(self.peer.reset)

    def vanish(self, *, silently: bool) -> None:
        """The process that held this end is gone."""
        if self._lost:
            return
        self._lost = True
        if silently:
            # Nobody acknowledges any more: the other end finds out when TCP gives up.
            scheduler = self.loop.scheduler
            self.peer.loop.deliver_at(scheduler.now + GIVE_UP_S, self.peer.reset)
        else:
            self._send_reset()

    def _end(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        if error is None and self.peer._flying_bytes:
            # What is still under way to here finds nobody. Its machine says so, also when the process is gone by then.
            self._send_reset(not_before=self.peer._arrives)
        self._out.clear()
        self._out_bytes = 0
        self._in.clear()
        self.host.streams.pop(self, None)
        if self._protocol is not None:
            self.loop.call_soon(self._protocol.connection_lost, error)

# idunno/membership/transport.py: the detector on a UDP socket.
#
# Rule 1: it moves datagrams and sets one timer, and decides nothing: swim.py does. What goes over TCP is in talks.py.
# Rule 2: what does not open, decode or fit, or comes too fast from one source, is counted and dropped. Nothing a datagram
#         holds can raise out of here, and no datagram is answered before its seal was opened.
# Rule 3: sending never waits. A host name is looked up beside the loop and remembered; what cannot be sent is counted.
from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Protocol

from msgspec.structs import replace

from idunno.base.errors import DecodeError, Unavailable
from idunno.base.ids import NodeId
from idunno.membership.config import SwimConfig
from idunno.membership.events import (
    Announce,
    Announced,
    Changed,
    Doubt,
    Event,
    Exchange,
    Forget,
    Input,
    MemberView,
    NotExchanged,
    ProbeTcp,
    Received,
    Seed,
    Seeds,
    Self,
    Send,
    TcpProbed,
    Tick,
)
from idunno.membership.messages import State, WholeList, decode, decode_list, encode
from idunno.membership.swim import Swim
from idunno.membership.talks import ExchangeBytes, Talks, TcpProbe
from idunno.wire.sealed import DATAGRAM_BYTES_MAX

log = logging.getLogger("idunno.membership")

SOURCE_RATE_MAX: Final = 500
"""Datagrams per second from one source, as many at once. A member in a stormy ring of 100 sends one 60."""
SOURCES_MAX: Final = 4_096
"""Sources whose rate is kept; beyond, all are forgotten at once and begin anew."""
IP_UDP_BYTES: Final = 28
"""Heads of IPv4 and UDP, so that `sent-bytes` is what the network carries."""
LOOKUPS_MAX: Final = 1_024
LOOKUP_AGAIN_S: Final = 5.0
"""A name that was not found is looked up again after this."""
LOOKUP_TTL_S: Final = 60.0
"""How long a host name's address is used: a machine that moved is found again within a minute."""

EVENTS_MAX: Final = 1_024
"""Kept for `idunno members --events`; the log has all of them."""


class MemberAddress(Protocol):
    """A member as the roster or an introducer's answer names it."""

    @property
    def node(self) -> NodeId: ...
    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str: ...


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" cut in two, brackets of an IPv6 host removed. Raises DecodeError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise DecodeError(f"{address!r} is no HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class SourceRates:
    """How much each source may send: a bucket of one second's worth."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, int], tuple[float, float]] = {}  # source -> (left, when it was)

    def take(self, source: tuple[str, int], now_s: float) -> bool:
        left, then_s = self._buckets.get(source, (float(SOURCE_RATE_MAX), now_s))
        left = min(float(SOURCE_RATE_MAX), left + (now_s - then_s) * SOURCE_RATE_MAX)
        if source not in self._buckets and len(self._buckets) >= SOURCES_MAX:
            self._buckets.clear()
        self._buckets[source] = (left - 1.0 if left >= 1.0 else left, now_s)
        return left >= 1.0


class Membership:
    """One node's view of who is alive.

    `seal` and `open` are wire/sealed.py's; `open` returns (sender, boot, payload) or raises DecodeError. `allowed` says who
    is in the roster. `now_ms` is the wall clock, for people only (`since_ms`, skew); all decisions use the loop's own time.
    `tcp_probe` and `exchange` carry the two things that go over TCP (talks.py); without them the detector does without.
    """

    def __init__(
        self,
        me: Self,
        config: SwimConfig,
        rng: random.Random,
        seal: Callable[[bytes], bytes],
        open: Callable[[bytes], tuple[NodeId, int, bytes]],
        allowed: Callable[[NodeId], bool],
        now_ms: Callable[[], int],
        *,
        tcp_probe: TcpProbe | None = None,
        exchange: ExchangeBytes | None = None,
    ) -> None:
        self.me = me
        self._core = Swim(me, config, rng, allowed)
        self._seal, self._open, self._wall_ms = seal, open, now_ms
        self._counts: Counter[str] = Counter()
        self._rates = SourceRates()
        self._talks = Talks(tcp_probe, exchange)
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._subscribers: list[Callable[[Changed], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport: asyncio.DatagramTransport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms: int | None = None
        self._closed: asyncio.Future[None]  # set by start()
        self._announced: asyncio.Future[Announced] | None = None
        # "host:port" -> (where to send, or None: its name was not found; until when that counts)
        self._addresses: dict[str, tuple[tuple[str, int] | None, float]] = {}
        self._lookups: dict[str, asyncio.Task[None]] = {}
        self._waiting_seeds: tuple[Seed, ...] = ()
        self.paused = False  # the transport's write buffer is full

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self, host: str, port: int) -> None:
        """Listen on `host`:`port` and begin. Raises Unavailable when the port cannot be had."""
        loop = self._loop = asyncio.get_running_loop()
        self._closed = loop.create_future()
        try:
            transport, _ = await loop.create_datagram_endpoint(lambda: _Endpoint(self), local_addr=(host, port))
        except OSError as error:
            raise Unavailable(
                f"cannot listen on UDP {join_address(host, port)}: {error.strerror or error}; "
                "another node may run there: choose another port with --listen"
            ) from error
        self._transport = transport
        log.info("membership started", extra={"address": self.me.address, "boot": self.me.boot})
        self._feed(Seeds(self._waiting_seeds))
        self._waiting_seeds = ()

    async def stop(self) -> None:
        """Close the socket. Says nothing to the others: see announce_stopped."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lookups = list(self._lookups.values())
        for task in lookups:
            task.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
        await self._talks.stop()
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()
            await self._closed  # the port is free when stop() returns
        if self._announced is not None and not self._announced.done():
            self._announced.set_result(Announced(0, 0))

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._transport is not None, "membership is not started"
        return int(self._transport.get_extra_info("sockname")[1])

    # -- what the node says ---------------------------------------------------------------------------------------

    def seeds(self, members: Iterable[MemberAddress]) -> None:
        """Members to know of: the whole roster at start and after each change of it, or an introducer's answer."""
        seeds = tuple(Seed(member.node, member.name, member.address) for member in members)
        if self._transport is None:
            self._waiting_seeds = seeds
        else:
            self._feed(Seeds(seeds))

    def forget(self, node: NodeId) -> None:
        """It was removed from the roster."""
        self._waiting_seeds = tuple(seed for seed in self._waiting_seeds if seed.node != node)
        if self._transport is not None:
            self._feed(Forget(node))

    def doubt(self, node: NodeId) -> None:
        """A connection to it was lost, or it does not answer: it is probed now instead of at its turn."""
        if self._transport is not None:
            self._feed(Doubt(node))

    def exchanged(self, sender: NodeId, payload: bytes) -> bytes:
        """The other side of `exchange`: takes the list of `sender`, as its certificate names it, and returns ours.

        Raises DecodeError for what is no list, Unavailable when not started.
        """
        theirs = decode_list(payload)
        if self._transport is None:
            raise Unavailable(f"membership of {self.me.name} does not run: try again")
        self._hear_list(sender, theirs)
        return encode(self._core.whole_list())

    async def announce_stopped(self) -> None:
        """Tell some members that this one stops on purpose; returns when they have answered, after 1 s at most."""
        await self._announce(State.STOPPED)

    async def announce_left(self) -> None:
        await self._announce(State.LEFT)

    def subscribe(self, callback: Callable[[Changed], None]) -> None:
        """Have every change of a member's state told, in order. An exception of a callback is logged."""
        self._subscribers.append(callback)

    def view(self) -> list[MemberView]:
        """All members, this one included, sorted by id; `since_ms` by the wall clock."""
        if self._loop is None:
            return self._core.view()
        ahead_ms = self._wall_ms() - self._now_ms()
        return [replace(view, since_ms=view.since_ms + ahead_ms) for view in self._core.view()]

    def events(self) -> list[Event]:
        """The last changes of members' states, the oldest first, at most EVENTS_MAX."""
        return list(self._events)

    def skew(self) -> dict[NodeId, int]:
        """Each member's wall clock minus this node's, in ms, as estimated from its answers; only those probed by this node."""
        return self._core.skew()

    @property
    def counters(self) -> dict[str, int]:
        """What happened so far, by fixed names: dropped datagrams by cause, events by kind, refutations, late timers."""
        return dict(self._counts + self._core.counters)

    # -- driving the core -----------------------------------------------------------------------------------------

    def _now_ms(self) -> int:
        assert self._loop is not None
        return int(self._loop.time() * 1000)

    def _feed(self, event: Input) -> None:
        for output in self._core.handle(event, self._now_ms(), self._wall_ms()):
            match output:
                case Send(address, message):
                    self._send(address, encode(message))
                case Changed():
                    self._tell(output)
                case ProbeTcp(node, _, seq, timeout_ms):
                    self._talks.probe(node, timeout_ms, partial(self._feed_if_open, TcpProbed(node, seq)))
                case Exchange(node):
                    failed = partial(self._feed_if_open, NotExchanged(node))
                    self._talks.exchange(node, self._core.whole_list(), partial(self._hear_list, node), failed)
                case Announced():
                    if self._announced is not None and not self._announced.done():
                        self._announced.set_result(output)
        self._set_timer()

    def _feed_if_open(self, event: Input) -> None:
        if self._transport is not None:
            self._feed(event)

    def _hear_list(self, sender: NodeId, theirs: WholeList) -> None:
        self._feed_if_open(Received(sender, theirs.boot, theirs.address, theirs))

    def _set_timer(self) -> None:
        due_ms = self._core.due_ms()
        if due_ms == self._timer_ms or self._loop is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ms = due_ms
        # One millisecond more, so that the loop's rounding never wakes us just before the time.
        self._timer = None if due_ms is None else self._loop.call_at((due_ms + 1) / 1000, self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_ms = None
        self._feed(Tick())

    async def _announce(self, state: State) -> None:
        if self._transport is None:
            return
        assert self._loop is not None
        self._announced = self._loop.create_future()
        self._feed(Announce(state))
        done = await self._announced  # at most announce_ms: the core's own timer ends it, and so does stop()
        log.info("announced own end", extra={"state": state.value, "told": done.told, "answered": done.answered})

    def _tell(self, change: Changed) -> None:
        accuser = self._core.book.name(change.accuser) if change.accuser else ""
        fields = {
            "member": change.member.name,
            "node_id": change.member.node,
            "event": change.kind,
            "old": change.old.value,
            "new": change.new.value,
            "reason": change.reason,
            "accuser": accuser,
        }
        log.log(logging.WARNING if change.new in _BAD else logging.INFO, "member changed", extra=fields)
        wall_ms = self._wall_ms()
        since_ms = change.member.since_ms + wall_ms - self._now_ms()
        member = change.member
        self._events.append(Event(wall_ms, change.kind, member.node, member.name, change.reason, accuser))
        self._counts[f"event-{change.kind}"] += 1
        told = replace(change, member=replace(member, since_ms=since_ms))
        for callback in self._subscribers:
            try:
                callback(told)
            except Exception:  # a subscriber's bug must not stop the detector
                log.exception("a subscriber of membership failed", extra=fields)

    # -- datagrams ------------------------------------------------------------------------------------------------

    def closed(self, error: Exception | None) -> None:
        if error is not None:
            log.error("membership socket lost", extra={"error": str(error)})
        if not self._closed.done():
            self._closed.set_result(None)

    def received(self, datagram: bytes, source: tuple[str, int]) -> None:
        """One datagram from the socket."""
        assert self._loop is not None
        if self._transport is None:
            return
        if not self._rates.take(source, self._loop.time()):
            self._counts["dropped-too-fast"] += 1
            return
        if len(datagram) > DATAGRAM_BYTES_MAX:
            self._counts["dropped-too-long"] += 1
            return
        try:
            sender, boot, payload = self._open(datagram)
        except DecodeError:
            self._counts["dropped-not-opened"] += 1
            return
        try:
            message = decode(payload)
        except DecodeError:
            self._counts["dropped-not-decoded"] += 1
            return
        self._counts["received"] += 1
        self._feed(Received(sender, boot, join_address(*source), message))

    def _send(self, address: str, payload: bytes) -> None:
        where = self._where(address, payload)
        if where is not None:
            self._write(payload, where)

    def _write(self, payload: bytes, where: tuple[str, int]) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self.paused:  # the socket takes nothing; older news than what the loop holds already is worthless
            self._counts["dropped-not-sent"] += 1
            return
        datagram = self._seal(payload)
        self._counts["sent"] += 1
        self._counts["sent-bytes"] += len(datagram) + IP_UDP_BYTES
        try:
            self._transport.sendto(datagram, where)
        except (OSError, ValueError) as error:  # ValueError: an address of another family than the socket's
            self._counts["dropped-not-sent"] += 1
            log.debug("datagram not sent", extra={"to": where[0], "error": str(error)})

    def _where(self, address: str, payload: bytes) -> tuple[str, int] | None:
        """Where to send; None while a host name is looked up, after which the datagram is sent."""
        assert self._loop is not None
        known = self._addresses.get(address)
        if known is not None and (known[1] == float("inf") or known[1] > self._loop.time()):
            if known[0] is None:
                self._counts["dropped-no-address"] += 1
            return known[0]
        try:
            host, port = split_address(address)
        except DecodeError:
            self._counts["dropped-no-address"] += 1
            return None
        if len(self._addresses) >= LOOKUPS_MAX:
            self._addresses.clear()
        if _is_numeric(host):
            self._addresses[address] = ((host, port), float("inf"))
            return host, port
        if address not in self._lookups and len(self._lookups) < LOOKUPS_MAX:
            self._lookups[address] = self._loop.create_task(self._look_up(address, host, port, payload))
        # While a name is looked up again, the old address still serves.
        return known[0] if known is not None else None

    async def _look_up(self, address: str, host: str, port: int, payload: bytes) -> None:
        loop = asyncio.get_running_loop()
        assert self._transport is not None
        family = self._transport.get_extra_info("socket").family
        before = self._addresses[address][0] if address in self._addresses else None
        try:
            async with asyncio.timeout(5.0):  # the resolver's own time limit is 5 s a server
                found = await loop.getaddrinfo(host, port, family=family)
            where = (str(found[0][4][0]), port)
            self._addresses[address] = (where, loop.time() + LOOKUP_TTL_S)
            if before is None:
                self._write(payload, where)
        except (OSError, TimeoutError, UnicodeError) as error:  # UnicodeError: no name at all
            self._counts["dropped-no-address"] += 1
            # News go out ten times a second: without a pause each would look it up, and log that, again.
            self._addresses[address] = (before, loop.time() + LOOKUP_AGAIN_S)
            log.warning("host name not found", extra={"address": address, "error": str(error) or "timed out"})
        finally:
            del self._lookups[address]


_BAD: Final = frozenset({State.SUSPICIOUS, State.FAILED})


def _is_numeric(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


class _Endpoint(asyncio.DatagramProtocol):
    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._membership.received(data, addr[:2])  # IPv6 adds flow and scope

    def connection_lost(self, exc: Exception | None) -> None:
        self._membership.closed(exc)

    def pause_writing(self) -> None:
        self._membership.paused = True

    def resume_writing(self) -> None:
        self._membership.paused = False

    def error_received(self, exc: Exception) -> None:
        # "Connection refused" for an earlier datagram: its receiver is gone, which its silence says as well.
        log.debug("socket reported an error", extra={"error": str(exc)})

# tests/unit/membership/net.py: many cores on one virtual clock. Two runs with the same arguments are the same run.
#
# Rule 1: datagrams take 1 to 20 ms and get lost with probability `loss`. A segment of TCP that gets lost is sent again after
#         0.2 s, 0.4 s, ...; so loss delays TCP, it does not stop it.
# Rule 2: who is frozen takes nothing until it thaws; then all that waited comes in the order in which it came.
from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from idunno.base.ids import NodeId
from idunno.membership.config import SwimConfig
from idunno.membership.events import (
    Announce,
    Announced,
    Changed,
    Doubt,
    Exchange,
    Forget,
    Input,
    MemberView,
    NotExchanged,
    Output,
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
from idunno.wire.sealed import DATAGRAM_BYTES_MAX, PAYLOAD_BYTES_MAX

IP_BYTES = 28 + DATAGRAM_BYTES_MAX - PAYLOAD_BYTES_MAX
"""What IP, UDP and the seal add to a payload."""
RTO_MS = 200
"""TCP's first retransmission on a connection that is open (RFC 6298 allows no less in practice)."""


def node_id(number: int) -> NodeId:
    return NodeId(f"{number:016x}")


def seed_of(number: int) -> Seed:
    return Seed(node_id(number), f"n{number}", f"10.0.0.{number}:7400")


@dataclass(frozen=True, slots=True)
class Call:
    """Something that a node does when it is scheduled."""

    do: Callable[[], None]


class SimNet:
    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        loss: float = 0.0,
        settle: bool = True,
        tcp: bool = True,
        config: SwimConfig | None = None,
    ) -> None:
        self.rng, self.loss, self.now_ms, self.size, self.tcp = random.Random(seed), loss, 0, size, tcp
        self.config = config or SwimConfig()
        self.cores: dict[int, Swim] = {}
        self.boots: dict[int, int] = {}
        self.cut: set[frozenset[int]] = set()  # pairs that cannot talk
        self.udp_cut: set[frozenset[int]] = set()  # pairs that cannot talk but over TCP
        self.deaf: set[int] = set()  # hear nothing, still talk
        self.frozen: set[int] = set()  # alive, but not scheduled
        self.skew_ms: dict[int, int] = {}
        self.log: list[tuple[int, int, Changed]] = []
        self.announced: list[tuple[int, int, Announced]] = []
        self.datagrams = self.exchanges = 0
        self.bytes: Counter[int] = Counter()  # IP length, by sender
        self.allowed = {node_id(number) for number in range(1, size + 1)}
        self._queue: list[tuple[int, int, int, int, Input | Call]] = []
        self._waiting: dict[int, list[tuple[int, Input | Call]]] = {}  # for the frozen
        self._ticks: dict[int, int] = {}
        self._serial = 0
        if settle:
            for number in range(1, size + 1):
                self.start(number)
            self.run(3_000)
            assert all(set(self.states(number).values()) == {"active"} for number in self.cores)
            self.log.clear()

    # -- what happens to nodes ------------------------------------------------------------------------------------

    def start(self, number: int, seeds: Iterable[int] | None = None) -> None:
        """Start (or start again, with a higher boot) one node that knows the roster."""
        self._ticks.pop(number, None)
        boot = self.boots[number] = self.boots.get(number, 0) + 1
        me = Self(node_id(number), f"n{number}", f"10.0.0.{number}:7400", boot)
        self.cores[number] = Swim(me, self.config, random.Random(self.rng.random()), self.allowed.__contains__)
        known = range(1, self.size + 1) if seeds is None else seeds
        self.feed(number, Seeds(tuple(seed_of(other) for other in known)))

    def know_all(self) -> None:
        """Start all, each with the whole list: a large cluster that has long been up, without the hours of its history."""
        for number in range(1, self.size + 1):
            self.start(number, seeds=())
        lists = [core.whole_list().rumors[0] for core in self.cores.values()]
        for number, core in self.cores.items():
            teller = self.cores[number % self.size + 1].me
            whole = WholeList(teller.name, teller.address, teller.boot, 0, tuple(lists))
            core.handle(Received(teller.node, teller.boot, teller.address, whole), self.now_ms)
        self.run(2_000)

    def crash(self, *numbers: int) -> None:
        for number in numbers:
            del self.cores[number]

    def thaw(self, *numbers: int) -> None:
        for number in numbers:
            self.frozen.discard(number)
            for boot, event in self._waiting.pop(number, []):
                self._push(self.now_ms, number, event, boot)

    def forget(self, number: int) -> None:
        self.allowed.discard(node_id(number))
        for other in list(self.cores):
            self.feed(other, Forget(node_id(number)))

    def announce(self, number: int, state: State) -> None:
        self.feed(number, Announce(state))

    def doubt(self, number: int) -> None:
        """Every other node loses a connection to it, as when its process is killed."""
        for other in list(self.cores):
            self.feed(other, Doubt(node_id(number)))

    def partition(self, left: Iterable[int], right: Iterable[int]) -> None:
        rights = list(right)
        self.cut |= {frozenset((a, b)) for a in left for b in rights}

    # -- how it runs ----------------------------------------------------------------------------------------------

    def feed(self, number: int, event: Input) -> None:
        core = self.cores[number]
        wall_ms = 1_800_000_000_000 + self.now_ms + self.skew_ms.get(number, 0)
        self._do(number, core.handle(event, self.now_ms, wall_ms))
        due = core.due_ms()
        if due is not None and due != self._ticks.get(number):
            self._ticks[number] = due
            self._push(due, number, Tick(), self.boots[number])

    def _push(self, at_ms: int, number: int, event: Input | Call, boot: int) -> None:
        self._serial += 1  # equal times are ordered by creation; events are never compared
        heapq.heappush(self._queue, (max(at_ms, self.now_ms), self._serial, number, boot, event))

    def _do(self, number: int, outputs: list[Output]) -> None:
        for out in outputs:
            match out:
                case Changed():
                    self.log.append((self.now_ms, number, out))
                case Announced():
                    self.announced.append((self.now_ms, number, out))
                case Send():
                    self._send(number, out)
                case ProbeTcp(node, _, seq, timeout_ms):
                    self._probe_tcp(number, int(node, 16), seq, self.now_ms + timeout_ms)
                case Exchange(node):
                    self._exchange(number, int(node, 16))

    def _send(self, number: int, out: Send) -> None:
        payload = encode(out.message)
        self.datagrams += 1
        self.bytes[number] += len(payload) + IP_BYTES
        to = int(out.address.split(":")[0].rsplit(".", 1)[1])
        pair = frozenset((number, to))
        gone = self.rng.random() < self.loss or pair in self.cut or pair in self.udp_cut or to in self.deaf
        delay_ms = self.rng.randint(1, 20)
        if gone or to not in self.cores:
            return
        # As the wire carries it, bounds included; in large worlds the decoding is left out.
        wire = decode(payload) if self.size <= 100 else out.message
        core = self.cores[number]
        arrived = Received(core.me.node, core.me.boot, core.me.address, wire)
        self._push(self.now_ms + delay_ms, to, arrived, self.boots[to])

    def _over_tcp(self, a: int, b: int) -> int | None:
        """How long a message from a to b takes, retransmissions included; None: there is no way."""
        if not self.tcp or b not in self.cores or frozenset((a, b)) in self.cut:
            return None
        delay_ms, rto_ms = self.rng.randint(1, 20), RTO_MS
        while self.rng.random() < self.loss:
            delay_ms += rto_ms
            rto_ms *= 2
        return delay_ms

    def _probe_tcp(self, a: int, b: int, seq: int, until_ms: int) -> None:
        there, back = self._over_tcp(a, b), self._over_tcp(b, a)
        if there is None or back is None:
            return
        boot = self.boots[a]

        def answer() -> None:
            if self.now_ms + back <= until_ms:
                self._push(self.now_ms + back, a, TcpProbed(node_id(b), seq), boot)

        self._push(self.now_ms + there, b, Call(answer), self.boots[b])

    def _exchange(self, a: int, b: int) -> None:
        there, back = self._over_tcp(a, b), self._over_tcp(b, a)
        boot, me = self.boots[a], self.cores[a].me
        if there is None or back is None:
            self._push(self.now_ms + 50, a, NotExchanged(node_id(b)), boot)
            return
        self.exchanges += 1
        told = self.cores[a].whole_list()
        if self.size <= 100:
            told = decode_list(encode(told))

        def answer() -> None:
            self.feed(b, Received(me.node, boot, me.address, told))
            other = self.cores[b]
            whole = Received(other.me.node, other.me.boot, other.me.address, other.whole_list())
            self._push(self.now_ms + back, a, whole, boot)

        self._push(self.now_ms + there, b, Call(answer), self.boots[b])

    def run(self, ms: int) -> None:
        end = self.now_ms + ms
        while self._queue and self._queue[0][0] <= end:
            self.now_ms, _, number, boot, event = heapq.heappop(self._queue)
            if number in self.frozen:
                self._waiting.setdefault(number, []).append((boot, event))
            elif number in self.cores and self.boots[number] == boot:
                if isinstance(event, Call):
                    event.do()
                    continue
                if isinstance(event, Tick):
                    if self._ticks.get(number, 0) > self.now_ms:
                        continue  # it was put off
                    self._ticks.pop(number, None)
                self.feed(number, event)
        self.now_ms = end

    # -- looking --------------------------------------------------------------------------------------------------

    def view(self, number: int, of: int) -> MemberView:
        return next(view for view in self.cores[number].view() if view.node == node_id(of))

    def states(self, number: int) -> dict[int, str]:
        return {int(view.node, 16): view.state for view in self.cores[number].view()}

    def seen(self, of: int) -> set[str]:
        """In which states the living others see a member."""
        return {self.cores[number].members[node_id(of)].view().state for number in self.cores if number != of}

    def failures(self) -> list[tuple[int, int, int]]:
        """(when, seen by, who) of everything that was declared failed."""
        return [(at, by, int(c.member.node, 16)) for at, by, c in self.log if c.new is State.FAILED]

    def until(self, condition: Callable[[], bool], limit_ms: int, step_ms: int = 10) -> int:
        """Run until `condition` holds; returns after how long. Raises AssertionError after `limit_ms`."""
        began = self.now_ms
        while not condition():
            self.run(step_ms)
            assert self.now_ms - began <= limit_ms, f"not within {limit_ms} ms"
        return self.now_ms - began

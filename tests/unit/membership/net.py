# tests/unit/membership/net.py: many cores on one virtual clock. Two runs with the same arguments are the same run.
from __future__ import annotations

import heapq
import random
from collections.abc import Iterable

from idunno.base.ids import NodeId
from idunno.membership.config import SwimConfig
from idunno.membership.events import (
    Announce,
    Announced,
    Changed,
    Forget,
    Input,
    MemberView,
    Output,
    Received,
    Seed,
    Seeds,
    Self,
    Send,
    Tick,
)
from idunno.membership.messages import State, decode, encode
from idunno.membership.swim import Swim


def node_id(number: int) -> NodeId:
    return NodeId(f"{number:016x}")


def seed_of(number: int) -> Seed:
    return Seed(node_id(number), f"n{number}", f"10.0.0.{number}:7400")


class SimNet:
    def __init__(self, size: int, *, seed: int = 0, loss: float = 0.0, settle: bool = True) -> None:
        self.rng, self.loss, self.now_ms, self.size = random.Random(seed), loss, 0, size
        self.cores: dict[int, Swim] = {}
        self.boots: dict[int, int] = {}
        self.cut: set[frozenset[int]] = set()  # pairs that cannot talk
        self.deaf: set[int] = set()  # hear nothing, still talk
        self.frozen: set[int] = set()  # alive, but not scheduled
        self.log: list[tuple[int, int, Changed]] = []
        self.announced: list[tuple[int, int, Announced]] = []
        self.datagrams = 0
        self.allowed = {node_id(number) for number in range(1, size + 1)}
        self._queue: list[tuple[int, int, int, int, Input]] = []
        self._ticks: dict[int, int] = {}
        self._serial = 0
        if settle:
            for number in range(1, size + 1):
                self.start(number)
            self.run(3_000)
            assert all(set(self.states(number).values()) == {"active"} for number in self.cores)
            self.log.clear()

    def start(self, number: int, seeds: Iterable[int] | None = None) -> None:
        """Start (or start again, with a higher boot) one node that knows the roster."""
        self._ticks.pop(number, None)
        boot = self.boots[number] = self.boots.get(number, 0) + 1
        me = Self(node_id(number), f"n{number}", f"10.0.0.{number}:7400", boot)
        self.cores[number] = Swim(me, SwimConfig(), random.Random(self.rng.random()), self.allowed.__contains__)
        known = range(1, self.size + 1) if seeds is None else seeds
        self.feed(number, Seeds(tuple(seed_of(other) for other in known)))

    def crash(self, *numbers: int) -> None:
        for number in numbers:
            del self.cores[number]

    def forget(self, number: int) -> None:
        self.allowed.discard(node_id(number))
        for other in list(self.cores):
            self.feed(other, Forget(node_id(number)))

    def announce(self, number: int, state: State) -> None:
        self.feed(number, Announce(state))

    def partition(self, left: Iterable[int], right: Iterable[int]) -> None:
        rights = list(right)
        self.cut |= {frozenset((a, b)) for a in left for b in rights}

    def feed(self, number: int, event: Input) -> None:
        core = self.cores[number]
        self._do(number, core.handle(event, self.now_ms))
        due = core.due_ms()
        if due is not None and due != self._ticks.get(number):
            self._ticks[number] = due
            self._push(due, number, Tick())

    def _push(self, at_ms: int, number: int, event: Input) -> None:
        self._serial += 1  # equal times are ordered by creation; events are never compared
        heapq.heappush(self._queue, (max(at_ms, self.now_ms), self._serial, number, self.boots[number], event))

    def _do(self, number: int, outputs: list[Output]) -> None:
        for out in outputs:
            match out:
                case Changed():
                    self.log.append((self.now_ms, number, out))
                case Announced():
                    self.announced.append((self.now_ms, number, out))
                case Send(address, message):
                    self.datagrams += 1
                    to = int(address.split(":")[0].rsplit(".", 1)[1])
                    wire = decode(encode(message))  # as the wire carries it, bounds included
                    gone = self.rng.random() < self.loss or frozenset((number, to)) in self.cut or to in self.deaf
                    delay_ms = self.rng.randint(1, 20)
                    if gone or to not in self.boots:
                        continue
                    core = self.cores[number]
                    arrived = Received(core.me.node, core.me.boot, core.me.address, wire)
                    self._push(self.now_ms + delay_ms, to, arrived)

    def run(self, ms: int) -> None:
        end = self.now_ms + ms
        while self._queue and self._queue[0][0] <= end:
            at, serial, number, boot, event = heapq.heappop(self._queue)
            self.now_ms = at
            if number in self.frozen:
                heapq.heappush(self._queue, (at + 50, serial, number, boot, event))  # looked at again until it thaws
                continue
            if number in self.cores and (self.boots[number] == boot or isinstance(event, Received)):
                if isinstance(event, Tick):
                    self._ticks.pop(number, None)
                self.feed(number, event)
        self.now_ms = end

    def view(self, number: int, of: int) -> MemberView:
        return next(view for view in self.cores[number].view() if view.node == node_id(of))

    def states(self, number: int) -> dict[int, str]:
        return {int(view.node, 16): view.state for view in self.cores[number].view()}

    def seen(self, of: int) -> set[str]:
        """In which states the living others see a member."""
        return {self.states(number)[of] for number in self.cores if number != of}

    def failures(self) -> list[tuple[int, int, int]]:
        """(when, seen by, who) of everything that was declared failed."""
        return [(at, by, int(c.member.node, 16)) for at, by, c in self.log if c.new is State.FAILED]

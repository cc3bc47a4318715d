# idunno/membership/probes.py: how a member is asked whether it lives, directly, through others, and over TCP.
#
# Rule 1: a probe goes through STEPS: pinged; after retry_ms pinged again and `helpers` members asked to ping it; after tcp_ms
#         asked over TCP; after probe_ms it has failed, and look_ms later that is said. Any answer on any way ends it at once.
# Rule 2: each step waits its whole time after the one before was really taken, times the health's stretch: a process that
#         was held up does not take the verdict for granted.
# Rule 3: there is at most one probe of a member at a time, so a stretched probe also comes round less often.
# Rule 4: a helper answers in any case: with the target's answer, or with a nack at 80 % of the time it has.
from __future__ import annotations

import random
from collections import OrderedDict
from typing import Final

import msgspec

from idunno.base.ids import NodeId
from idunno.membership.book import Book
from idunno.membership.config import SwimConfig
from idunno.membership.events import Output, ProbeTcp
from idunno.membership.health import LocalHealth
from idunno.membership.records import Member
from idunno.membership.voice import Voice

PROBES_MAX: Final = 64
"""Open at once; the ring needs about five, and eight suspects may be watched besides."""
RELAYS_MAX: Final = 256
"""Pings sent for others and not yet answered."""


class Probe(msgspec.Struct):
    seq: int
    started_ms: int
    stretch: int
    next_ms: int  # when its next step is due
    step: int = 0
    helpers: int = 0  # asked
    words: int = 0  # of helpers, nacks included


class _Relay(msgspec.Struct):
    target: NodeId
    asker: str  # address
    seq: int  # the asker's
    nack_ms: int


class Prober:
    def __init__(self, config: SwimConfig, rng: random.Random, book: Book, voice: Voice, health: LocalHealth) -> None:
        self._config, self._rng, self._book, self._voice, self._health = config, rng, book, voice, health
        self._steps = (
            config.retry_ms,
            config.tcp_ms - config.retry_ms,
            config.probe_ms - config.tcp_ms,
            config.look_ms,
        )
        self._seq = rng.randrange(1 << 30)
        self.open: dict[NodeId, Probe] = {}
        self._relays: OrderedDict[int, _Relay] = OrderedDict()  # by our seq; the oldest first

    def seq(self) -> int:
        self._seq += 1
        return self._seq

    def due_ms(self) -> int | None:
        due = min((probe.next_ms for probe in self.open.values()), default=None)
        if self._relays:
            nack_ms = next(iter(self._relays.values())).nack_ms
            due = nack_ms if due is None else min(due, nack_ms)
        return due

    def start(self, member: Member, now_ms: int, out: list[Output]) -> None:
        if member.node in self.open or len(self.open) >= PROBES_MAX:
            return
        stretch = self._health.stretch
        probe = Probe(self.seq(), now_ms, stretch, now_ms + self._steps[0] * stretch)
        self.open[member.node] = probe
        out.append(self._voice.ping(member, probe.seq))

    def drop(self, node: NodeId) -> None:
        self.open.pop(node, None)

    def drop_all(self) -> None:
        self.open.clear()

    def tick(self, now_ms: int, out: list[Output]) -> list[Member]:
        """Take the steps that are due; returns those whose probe has failed."""
        failed = []
        for node in [node for node, probe in self.open.items() if probe.next_ms <= now_ms]:
            probe, member = self.open[node], self._book.members[node]
            probe.step += 1
            if probe.step == len(self._steps):
                del self.open[node]
                if not probe.words:
                    self._health.worse()
                failed.append(member)
                continue
            probe.next_ms = now_ms + self._steps[probe.step] * probe.stretch
            if probe.step == 1:
                self._ask_helpers(member, probe, out)
            elif probe.step == 2:
                left_ms = sum(self._steps[probe.step :]) * probe.stretch
                out.append(ProbeTcp(node, member.address, probe.seq, left_ms))
        while self._relays and (relay := next(iter(self._relays.values()))).nack_ms <= now_ms:
            self._relays.popitem(last=False)
            target = self._book.members.get(relay.target)
            if target is not None:
                out.append(self._voice.relayed(relay.asker, relay.seq, target, alive=False))
        return failed

    def _ask_helpers(self, member: Member, probe: Probe, out: list[Output]) -> None:
        out.append(self._voice.ping(member, probe.seq))
        book = self._book
        helpers = [book.members[node] for node in book.alive.draw(self._rng, self._config.helpers, (member.node,))]
        probe.helpers = len(helpers)
        out += [self._voice.ping_req(helper, probe.seq, member) for helper in helpers]

    # -- answers --------------------------------------------------------------------------------------------------

    def acked(self, member: Member, seq: int, now_ms: int, out: list[Output]) -> int | None:
        """An Ack of the member itself. Returns the round trip in ms if it answers a probe, at most what that took."""
        member.detours = 0
        relay = self._relays.get(seq)
        if relay is not None and relay.target == member.node:
            del self._relays[seq]
            out.append(self._voice.relayed(relay.asker, relay.seq, member, alive=True))
            return None
        probe = self._end(member, seq)
        return None if probe is None else now_ms - probe.started_ms

    def relayed(self, member: Member, seq: int, helper: str, *, alive: bool) -> None:
        """What a helper says of the target `member`."""
        probe = self.open.get(member.node)
        if probe is None or probe.seq != seq:
            return
        probe.words += 1
        if alive:
            self._end(member, seq)
            member.detours += 1
            member.detour = f"through {helper}"

    def tcp_answered(self, member: Member, seq: int) -> bool:
        """Whether the answer was still waited for."""
        if self._end(member, seq) is None:
            return False
        member.detours += 1
        member.detour = "over TCP"
        return True

    def _end(self, member: Member, seq: int) -> Probe | None:
        probe = self.open.get(member.node)
        if probe is None or probe.seq != seq:
            return None
        del self.open[member.node]
        self._health.better()
        return probe

    def asked(self, target: Member, seq: int, asker: str, now_ms: int, out: list[Output]) -> None:
        """Another member wants `target` pinged."""
        if len(self._relays) >= RELAYS_MAX:
            return
        ours = self.seq()
        wait_ms = (self._config.probe_ms - self._config.retry_ms) * 4 // 5
        self._relays[ours] = _Relay(target.node, asker, seq, now_ms + wait_ms)
        out.append(self._voice.ping(target, ours))

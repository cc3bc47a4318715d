# idunno/membership/swim.py: who this node believes is alive (the core).
#
# Rule 1: nothing here opens a socket, reads a clock or draws its own random numbers: `handle(event, now_ms, wall_ms)` takes
#         one event to its end and returns outputs, to be carried out in order. Then a Tick is wanted at `due_ms`.
# Rule 2: no single silence convicts: a probe fails only when every way was in vain (probes.py), the accused is told first and
#         has 1 to 2 s to refute, and a verdict of a time in which this process was held up is discarded.
# Rule 3: only the accused refutes, with a higher incarnation. An answer to a ping alone does not.
# Rule 4: hearsay accuses; it convicts only who has been suspected here for half of T_FAIL (states.py, rule 4).
# Rule 5: a list that differs for long is exchanged as a whole; how long does not depend on the number of members.
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from idunno.base.ids import NodeId
from idunno.membership.book import Book
from idunno.membership.config import SwimConfig
from idunno.membership.events import (
    Announce,
    Doubt,
    Exchange,
    Forget,
    Input,
    MemberView,
    NotExchanged,
    Output,
    Received,
    Seed,
    Seeds,
    Self,
    Send,
    TcpProbed,
    Tick,
)
from idunno.membership.farewell import Farewell
from idunno.membership.health import LocalHealth
from idunno.membership.messages import Ack, Ping, PingReq, Relayed, Rumor, State, WholeList
from idunno.membership.probes import Prober
from idunno.membership.records import Member
from idunno.membership.states import NEVER_HEARD, STEP_MAX, Version, far_above, overrides, runs_ahead
from idunno.membership.voice import Voice

INTRODUCTIONS_MAX: Final = 16
"""Members never heard that are pinged in one period: 100 restart together within 3 s, without a burst of 100 datagrams."""
LIST_INTERVAL_MS: Final = 1_000
"""A member gets the list at most this often, whatever it asks; and nobody asks more often."""
LISTED_MAX: Final = 256
RESTLESS: Final = 10
"""Where changes never cease, lists are exchanged when no digest has matched for this many times the usual time."""


class Swim:
    """The membership view of one node: same inputs and same `rng`, same outputs.

    `allowed` says who may be a member (the roster); statements about others are ignored.
    """

    def __init__(
        self, me: Self, config: SwimConfig, rng: random.Random, allowed: Callable[[NodeId], bool] = lambda _: True
    ) -> None:
        self.me, self.config = me, config
        self.book = Book(me, config, allowed)
        self.health = LocalHealth()
        self._rng = rng
        self._voice = Voice(me, self.book)
        self._prober = Prober(config, rng, self.book, self._voice, self.health)
        self._farewell = Farewell(config, rng, self.book, self._voice)
        self._neighbours: list[NodeId] = []
        self._suspects: list[NodeId] = []  # passed on the way to the neighbours
        self._listed: dict[NodeId, int] = {}  # when each was last sent the list
        self._asked_list_ms = -LIST_INTERVAL_MS
        self._turn = rng.randrange(3)
        self._period_ms: int | None = None  # start of the next period; None before the first event
        self._gossip_ms: int | None = None
        self._random_ms = self._since_ms = 0
        self._exchanged_ms = self._matched_ms = 0  # when lists were last exchanged; when a digest last matched
        self._exchange_wait_ms = config.exchange_ms

    @property
    def members(self) -> dict[NodeId, Member]:
        return self.book.members

    @property
    def incarnation(self) -> int:
        return self.book.incarnation

    @property
    def counters(self) -> Counter[str]:
        return self.book.counters

    # -- for the shell --------------------------------------------------------------------------------------------

    def handle(self, event: Input, now_ms: int, wall_ms: int = 0) -> list[Output]:
        """Take one event; returns what is to be done, in order. Never raises for anything a peer can send.

        `wall_ms` is the wall clock, told to others and compared with theirs; 0 if it is not known.
        """
        out: list[Output] = []
        self._voice.clock_ms = max(0, wall_ms)
        if self._period_ms is None and self.book.state is State.ACTIVE:
            # Phases differ from node to node, so that a member's three watchers do not all ping at the same moment.
            self._since_ms = self._exchanged_ms = self._matched_ms = now_ms
            self._period_ms = now_ms + self._rng.randrange(self.config.period_ms)
            self._random_ms = now_ms + self._rng.randrange(self.config.random_ms)
        match event:
            case Received():
                self._received(event, now_ms, out)
            case Tick():
                self._tick(now_ms, out)
            case TcpProbed(node, seq):
                self._tcp_probed(node, seq, out)
            case NotExchanged(node):
                self._ask_list(node, now_ms, out)
            case Doubt(node):
                self._doubt(node, now_ms, out)
            case Seeds(seeds):
                self._seeds(seeds, now_ms, out)
            case Forget(node):
                self._forget(node, now_ms)
            case Announce(state):
                self._prober.drop_all()
                self._period_ms = self._gossip_ms = None
                self._farewell.begin(state, self._prober.seq(), now_ms, out)
        if self.book.state is State.ACTIVE:
            if self.book.someone_fell:
                self._look_around(now_ms, out)
            if self._gossip_ms is None and self.book.news and len(self.book.alive):
                self._gossip_ms = now_ms
        return out

    def due_ms(self) -> int | None:
        """When the next Tick is wanted; None before the first event and after an announced end."""
        if self.book.state is not State.ACTIVE:
            return self._farewell.due_ms()
        times = (self._period_ms, self._gossip_ms, self._prober.due_ms(), self.book.due_ms())
        return min((time for time in times if time is not None), default=None)

    def view(self) -> list[MemberView]:
        """All members, this one included, sorted by id."""
        me, state = self.me, self.book.state.value
        mine = MemberView(me.node, me.name, me.address, state, self.incarnation, me.boot, self._since_ms, "this node")
        return sorted([mine, *self.book.views()], key=lambda view: view.node)

    def whole_list(self) -> WholeList:
        return self._voice.whole_list()

    def skew(self) -> dict[NodeId, int]:
        """Each member's wall clock minus ours in ms, where it could be estimated to within about 0.2 s."""
        return {node: member.skew_ms for node, member in self.members.items() if member.skew_ms is not None}

    # -- time -----------------------------------------------------------------------------------------------------

    def _tick(self, now_ms: int, out: list[Output]) -> None:
        due = self.due_ms()
        if due is None or now_ms < due:
            return
        if self._farewell.is_under_way:
            self._farewell.tick(now_ms, out)
            return
        if now_ms - due > self.config.late_ms:
            self._was_held_up(now_ms - due, now_ms)
        for member in self.book.expired(now_ms):
            self._expire(member, now_ms, out)
        for member in self._prober.tick(now_ms, out):
            self._accuse(member, now_ms, out)
        if self._period_ms is not None and now_ms >= self._period_ms:
            self._period(now_ms, out)
        if self._gossip_ms is not None and now_ms >= self._gossip_ms:
            self._gossip(now_ms, out)

    def _was_held_up(self, late_ms: int, now_ms: int) -> None:
        """Answers and refutations may lie unread, so nobody is judged by this silence; and this node is not well."""
        self.counters["late-ticks"] += 1
        self.health.worse()
        self._prober.drop_all()
        self.book.give_time(late_ms, now_ms)

    def _expire(self, member: Member, now_ms: int, out: list[Output]) -> None:
        if member.state is State.SUSPICIOUS:
            who = " and ".join(self.book.name(accuser) for accuser in member.accusers) or self.me.name
            silent_s = (now_ms - member.since_ms) / 1000
            accuser = member.accusers[0] if member.accusers else None
            reason = f"no refutation for {silent_s:.1f} s, accused by {who}"
            self.book.become(member, State.FAILED, member.version, reason, now_ms, out, accuser=accuser)
        elif member.state is State.FAILED:
            self.book.become(member, State.DELETED, member.version, member.reason, now_ms, out)

    def _period(self, now_ms: int, out: list[Output]) -> None:
        assert self._period_ms is not None
        self._period_ms += self.config.period_ms
        if self._period_ms <= now_ms:  # late by whole periods: they are not caught up
            self._period_ms = now_ms + self.config.period_ms
        self._watch()
        self._turn += 1
        if self._neighbours:
            self._probe(self._neighbours[self._turn % len(self._neighbours)], now_ms, out)
        for suspect in self._suspects:
            self._probe(suspect, now_ms, out)
        self._introduce(now_ms, out)
        if now_ms >= self._random_ms:
            self._random_ms = now_ms + self.config.random_ms
            for node in self.book.alive.draw(self._rng, 1, self._neighbours):
                self._probe(node, now_ms, out)
            for node in self.book.away.draw(self._rng, 1):
                out.append(self._voice.ping(self.members[node], self._prober.seq()))

    def _introduce(self, now_ms: int, out: list[Output]) -> None:
        """Ping the never heard, in turn; who stays silent for too long is accused."""
        for node in list(islice(self.book.unknown, INTRODUCTIONS_MAX)):
            member = self.members[node]
            if now_ms - member.since_ms >= self.config.introduce_ms:
                reason = f"no answer to {self.me.name} since it was named"
                member.accusers = (self.me.node,)
                self.book.become(member, State.SUSPICIOUS, member.version, reason, now_ms, out, accuser=self.me.node)
                continue
            del self.book.unknown[node]
            self.book.unknown[node] = None  # to the end
            out.append(self._greet(member, now_ms))

    def _greet(self, member: Member, now_ms: int) -> Send:
        wants = now_ms - self._asked_list_ms >= LIST_INTERVAL_MS
        if wants:
            self._asked_list_ms = now_ms
        return self._voice.ping(member, self._prober.seq(), wants_list=wants)

    def _watch(self) -> None:
        """Bring the neighbours up to the ring."""
        if self.book.watched_stale:
            self.book.watched_stale = False
            members = self.members
            self._neighbours, self._suspects = self.book.ring.watched(lambda node: members[node].state)

    def _look_around(self, now_ms: int, out: list[Output]) -> None:
        """Somebody fell: who is newly watched because of it may have fallen with it, and a watched suspect is asked too."""
        self.book.someone_fell = False
        before, suspects_before = self._neighbours, self._suspects
        self._watch()
        if before != self._neighbours:  # also those watched already: racks and switches die as one
            for node in self._neighbours:
                self._probe(node, now_ms, out)
        for node in self._suspects:
            if node not in suspects_before:
                self._probe(node, now_ms, out)

    def _probe(self, node: NodeId, now_ms: int, out: list[Output]) -> None:
        self._prober.start(self.members[node], now_ms, out)

    def _accuse(self, member: Member, now_ms: int, out: list[Output]) -> None:
        """A probe of this member was in vain on every way."""
        if member.state is State.SUSPICIOUS:
            self.book.accuse_too(member, (self.me.node,), now_ms)
        elif member.state is State.ACTIVE:
            member.accusers = (self.me.node,)
            reason = f"no answer to {self.me.name}, directly, through others, or over TCP"
            self.book.become(member, State.SUSPICIOUS, member.version, reason, now_ms, out, accuser=self.me.node)
            out.append(self._voice.gossip(member.address, member))  # the accused is told first, on both ways
            out.append(Exchange(member.node))

    # -- what arrives ---------------------------------------------------------------------------------------------

    def _received(self, event: Received, now_ms: int, out: list[Output]) -> None:
        sender, message = event.sender, event.message
        if sender == self.me.node:
            self.counters["own-id"] += 1  # a second process runs from a copy of this directory, or a datagram came back
            return
        if not self.book.may_be_member(sender, now_ms):
            self.counters["not-allowed"] += 1
            return
        member = self._meet(event, now_ms, out)
        if member is None:
            return
        for rumor in message.rumors:
            self._hear(rumor, event, now_ms, out)
        match message:
            case Ping(seq, _, _, _, wants_list):
                out.append(self._voice.ack(event.source, seq, member))
                if wants_list:
                    self._send_list(sender, event.source, now_ms, out)
                self._compare(member, message, now_ms, out)
            case Ack(seq):
                self._acked(member, message, now_ms, out)
                self._compare(member, message, now_ms, out)
            case PingReq(seq, target):
                asked = self.members.get(target)
                if asked is not None and self.book.state is State.ACTIVE:
                    self._prober.asked(asked, seq, event.source, now_ms, out)
            case Relayed(seq, target, _, _, _, alive):
                about = self.members.get(target)
                if about is not None:
                    self._prober.relayed(about, seq, member.name, alive=alive)

    def _acked(self, member: Member, message: Ack, now_ms: int, out: list[Output]) -> None:
        trip_ms = self._prober.acked(member, message.seq, now_ms, out)
        if trip_ms is not None and trip_ms <= self.config.probe_ms and message.clock_ms and self._voice.clock_ms:
            member.skew_ms = message.clock_ms + trip_ms // 2 - self._voice.clock_ms
        self._farewell.acked(member.node, message.seq, out)

    def _compare(self, member: Member, message: Ping | Ack, now_ms: int, out: list[Output]) -> None:
        """Exchange whole lists when this member's differs although nothing is under way."""
        book, config = self.book, self.config
        if message.digest == 0 or book.state is not State.ACTIVE:
            return
        if message.digest == book.digest:
            self._exchange_wait_ms = config.exchange_ms
            self._matched_ms = now_ms
            return
        waited_ms, differs_ms = now_ms - self._exchanged_ms, now_ms - self._matched_ms
        quiet = not message.rumors and not book.news and now_ms - book.changed_ms >= config.exchange_ms
        if waited_ms >= self._exchange_wait_ms and (quiet or differs_ms >= RESTLESS * config.exchange_ms):
            self._exchanged_ms = now_ms
            self._exchange_wait_ms = min(config.exchange_max_ms, 2 * self._exchange_wait_ms)
            self.counters["exchanges"] += 1
            out.append(Exchange(member.node))

    def _send_list(self, sender: NodeId, source: str, now_ms: int, out: list[Output]) -> None:
        if now_ms - self._listed.get(sender, -LIST_INTERVAL_MS) < LIST_INTERVAL_MS:
            return
        if len(self._listed) >= LISTED_MAX:
            self._listed.clear()
        self._listed[sender] = now_ms
        out += self._voice.list_pieces(source)

    def _meet(self, event: Received, now_ms: int, out: list[Output]) -> Member | None:
        """Take what the sender says of itself. None: a process of the past speaks, or there is no room for it."""
        message = event.message
        member = self.book.record(event.sender, message.name, message.address, now_ms)
        if member is None:
            return None
        said: Version = (event.boot, message.incarnation)
        if said > member.version or (said < member.version and far_above(member.version, said)):
            restarted = NEVER_HEARD[0] < member.version[0] < event.boot
            member.name, member.address = message.name, message.address
            self._prober.drop(event.sender)  # what it did not answer before says nothing any more
            if restarted:
                reason = f"restarted (boot {event.boot})"
            elif member.state is State.UNKNOWN:
                reason = "answered"
            else:
                reason = f"refuted with incarnation {message.incarnation}"
            self.book.become(member, State.ACTIVE, said, reason, now_ms, out, restarted=restarted)
        elif event.boot < member.version[0]:
            self.counters["older-boot"] += 1
            return None
        return member

    def _hear(self, rumor: Rumor, event: Received, now_ms: int, out: list[Output]) -> None:
        """Take hearsay."""
        book = self.book
        if rumor.node == self.me.node:
            self._defend(rumor, event, now_ms, out)
            return
        if not book.may_be_member(rumor.node, now_ms):
            self.counters["not-allowed"] += 1
            return
        member = book.record(rumor.node, rumor.name, rumor.address, now_ms)
        if member is None:
            return
        version: Version = (rumor.boot, rumor.incarnation)
        own_words = rumor.node == event.sender and rumor.boot == event.boot
        if member.version != NEVER_HEARD and not own_words and runs_ahead(version, member.version):
            self.counters["implausible"] += 1
            return
        accusers = tuple(node for node in dict.fromkeys(rumor.accusers) if book.may_accuse(node))
        accusation = rumor.state in (State.SUSPICIOUS, State.FAILED)
        if (rumor.state is State.SUSPICIOUS and not accusers) or (accusation and not book.may_accuse(event.sender)):
            self.counters["accuser-not-alive"] += 1
            return
        if rumor.state is State.SUSPICIOUS and member.state is State.SUSPICIOUS and version == member.version:
            book.accuse_too(member, accusers, now_ms)
            return
        if not overrides(rumor.state, version, member.state, member.version):
            return
        if rumor.state is State.FAILED and self._too_soon(member, now_ms):
            book.accuse_too(member, (event.sender,), now_ms)
            return
        self._believe(member, rumor, version, accusers, event, now_ms, out)

    def _too_soon(self, member: Member, now_ms: int) -> bool:
        """Whether a suspect has had less than half of T_FAIL to answer here: a verdict of others does not count yet."""
        return member.state is State.SUSPICIOUS and now_ms - member.since_ms < self.config.t_fail_ms // 2

    def _believe(
        self,
        member: Member,
        rumor: Rumor,
        version: Version,
        accusers: tuple[NodeId, ...],
        event: Received,
        now_ms: int,
        out: list[Output],
    ) -> None:
        restarted = NEVER_HEARD[0] < member.version[0] < rumor.boot
        if version > member.version:
            member.name, member.address = rumor.name, rumor.address
        by, state = self.book.name(event.sender), rumor.state
        reasons = {
            State.ACTIVE: f"restarted (boot {rumor.boot}), says {by}" if restarted else f"alive, says {by}",
            State.SUSPICIOUS: f"accused by {' and '.join(self.book.name(accuser) for accuser in accusers)}",
            State.FAILED: f"declared failed by {by}",
            State.STOPPED: "announced that it stops",
            State.LEFT: "announced that it leaves",
        }
        reason = reasons[state]
        if state is State.FAILED:
            accusers = (event.sender,)
            if member.state is State.ACTIVE:  # it is told, and may answer, before this node believes it
                state = State.SUSPICIOUS
        if state is State.ACTIVE:  # it is restarted or has refuted: so it has heard somebody since it was asked
            self._prober.drop(member.node)
        member.accusers = accusers
        # What a list told of somebody who was only a name is news to nobody else.
        tell = not (isinstance(event.message, WholeList) and member.state is State.UNKNOWN)
        accuser = accusers[0] if accusers else None
        self.book.become(member, state, version, reason, now_ms, out, accuser=accuser, restarted=restarted, tell=tell)
        if state is not rumor.state:
            out.append(self._voice.gossip(member.address, member))

    def _defend(self, rumor: Rumor, event: Received, now_ms: int, out: list[Output]) -> None:
        """Somebody speaks of this node."""
        if rumor.boot > self.me.boot:
            self.counters["own-newer-boot"] += 1  # this directory is a copy or an old image: others ignore what we say
            return
        if (
            self.book.state is not State.ACTIVE
            or rumor.boot < self.me.boot
            or rumor.state is State.ACTIVE
            or rumor.incarnation < self.incarnation
        ):
            return
        if rumor.incarnation - self.incarnation > STEP_MAX:
            self.counters["implausible"] += 1
            return
        self.book.refute(rumor.incarnation + 1, now_ms)
        self.counters["refuted"] += 1
        self.health.worse()
        if rumor.state is State.FAILED:
            self.book.recant(now_ms)
        self._gossip_ms = now_ms
        if not isinstance(event.message, Ping | WholeList):  # they are answered anyway
            out.append(self._voice.gossip(event.source, self.members.get(event.sender)))

    def _tcp_probed(self, node: NodeId, seq: int, out: list[Output]) -> None:
        member = self.members.get(node)
        if member is not None and self._prober.tcp_answered(member, seq):
            out.append(Exchange(node))  # no datagram reaches it from here: news must go this way

    def _doubt(self, node: NodeId, now_ms: int, out: list[Output]) -> None:
        member = self.members.get(node)
        if member is not None and member.state is State.ACTIVE and self.book.state is State.ACTIVE:
            self._prober.start(member, now_ms, out)

    def _ask_list(self, node: NodeId, now_ms: int, out: list[Output]) -> None:
        """No TCP to it: its list comes in datagrams, if it can come at all."""
        member = self.members.get(node)
        if member is not None and self.book.state is State.ACTIVE and now_ms - self._asked_list_ms >= LIST_INTERVAL_MS:
            self._asked_list_ms = now_ms
            out.append(self._voice.ping(member, self._prober.seq(), wants_list=True))

    # -- roster ---------------------------------------------------------------------------------------------------

    def _seeds(self, seeds: Iterable[Seed], now_ms: int, out: list[Output]) -> None:
        greeted = 0
        for seed in seeds:
            if seed.node == self.me.node:
                continue
            self.book.expect(seed.node)
            known = self.members.get(seed.node)
            if known is not None:
                if known.state is not State.ACTIVE and seed.address != known.named:
                    # The roster knows a newer address than the one that fell silent. What it only says again may be older
                    # than what the member itself said when it was restarted elsewhere.
                    known.name, known.address = seed.name, seed.address
                known.named = seed.address
                continue
            added = self.book.record(seed.node, seed.name, seed.address, now_ms)
            if added is not None:
                added.named = seed.address
            if added is not None and greeted < INTRODUCTIONS_MAX:  # at once; the others in the periods that follow
                greeted += 1
                out.append(self._greet(added, now_ms))

    def _forget(self, node: NodeId, now_ms: int) -> None:
        if self.book.forget(node, now_ms):
            self._prober.drop(node)
            self._farewell.forget(node)
            self._listed.pop(node, None)
            self._watch()

    # -- news -----------------------------------------------------------------------------------------------------

    def _gossip(self, now_ms: int, out: list[Output]) -> None:
        """Random gossip beside the ring, as long as there is news: epidemics, O(log n) rounds to reach all."""
        for node in self.book.alive.draw(self._rng, self.config.gossip_fanout):
            if not self.book.news:
                break
            member = self.members[node]
            out.append(self._voice.gossip(member.address, member))
        self._gossip_ms = now_ms + self.config.gossip_ms if self.book.news and len(self.book.alive) else None

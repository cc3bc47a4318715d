# idunno/membership/swim.py: who this node believes is alive (the core).
#
# Rule 1: every rule that changes a member's state is in this file; which statement replaces which is in records.py.
# Rule 2: nothing here opens a socket, reads a clock or draws its own random numbers: `handle(event, now_ms)` takes one event
#         to its end and returns outputs, to be carried out in order. Then a Tick is wanted at `due_ms`.
# Rule 3: no single silence convicts. A ping is sent twice in its period; only two silent periods in a row accuse; an accused
#         member is told first and has 1 to 2 s to refute; a verdict of a period in which this process was late is discarded.
# Rule 4: only the accused refutes, with a higher incarnation. An answer to a ping alone does not.
# Rule 5: everything kept is bounded: records by members_max, news by the records, accusers by two.
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

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
from idunno.membership.gossip import News, pieces
from idunno.membership.messages import Ack, Gossip, Message, Ping, Rumor, State
from idunno.membership.records import AWAY, LIFE, NEVER_HEARD, STEP_MAX, Member, Version, overrides, runs_ahead
from idunno.membership.ring import Ring

INTRODUCTIONS_MAX: Final = 16
"""Members never heard that are pinged in one period: 100 restart together within 3 s, without a burst of 100 datagrams."""
LIST_PIECES_MAX: Final = 64
"""Datagrams with which a list is answered: about 1,000 members, 80 KB to somebody who holds the cluster key."""
LIST_INTERVAL_MS: Final = 1_000
"""A member gets the list at most this often, whatever it asks."""
FORGOTTEN_MAX: Final = 1_024
FORGOTTEN_MS: Final = 60_000
"""How long a removed member's tombstone stands: rumours live for seconds."""


class Swim:
    """The membership view of one node: same inputs and same `rng`, same outputs.

    `allowed` says who may be a member (the roster); statements about others are ignored.
    """

    def __init__(
        self, me: Self, config: SwimConfig, rng: random.Random, allowed: Callable[[NodeId], bool] = lambda _: True
    ) -> None:
        self.me, self.config = me, config
        self.incarnation = 0
        self.state = State.ACTIVE  # or STOPPED, LEFT once announced
        self.members: dict[NodeId, Member] = {}  # all others
        self.counters: Counter[str] = Counter()
        self._rng, self._allowed = rng, allowed
        self._ring, self._news = Ring(me.node), News()
        self._watched: tuple[list[NodeId], list[NodeId]] | None = None  # None: to be worked out again
        self._unknown: dict[NodeId, None] = {}  # never heard, in the order they are introduced to
        self._away: dict[NodeId, None] = {}
        self._timed: dict[NodeId, None] = {}  # those with a deadline
        self._forgotten: dict[NodeId, int] = {}
        self._listed: dict[NodeId, int] = {}
        self._round = rng.randrange(1 << 30)  # number of the period, and `seq` of its pings
        self._turn = rng.randrange(3)
        self._open: dict[NodeId, bool] = {}  # pinged in this period -> answered
        self._period_ms: int | None = None  # start of the next period; None before the first event
        self._retry_ms: int | None = None
        self._gossip_ms: int | None = None
        self._away_ms = self._since_ms = 0
        self._telling: dict[NodeId, bool] = {}  # while announcing: told -> answered
        self._announce_end_ms: int | None = None

    # -- for the shell --------------------------------------------------------------------------------------------

    def handle(self, event: Input, now_ms: int) -> list[Output]:
        """Take one event; returns what is to be done, in order. Never raises for anything a peer can send."""
        out: list[Output] = []
        if self._period_ms is None and self.state is State.ACTIVE:
            # Phases differ from node to node, so that a member's three watchers do not all ping at the same moment.
            self._since_ms = now_ms
            self._period_ms = now_ms + self._rng.randrange(self.config.period_ms)
        match event:
            case Received():
                self._received(event, now_ms, out)
            case Tick():
                self._tick(now_ms, out)
            case Seeds(seeds):
                self._seeds(seeds, now_ms, out)
            case Forget(node):
                self._forget(node, now_ms)
            case Announce(state):
                self._announce(state, now_ms, out)
        return out

    def due_ms(self) -> int | None:
        """When the next Tick is wanted; None before the first event and after an announced end."""
        times = [t for t in (self._period_ms, self._retry_ms, self._gossip_ms, self._announce_end_ms) if t is not None]
        for node in self._timed:
            deadline = self.members[node].deadline_ms
            if deadline is not None:
                times.append(deadline)
        return min(times, default=None)

    def view(self) -> list[MemberView]:
        """All members, this one included, sorted by id."""
        me, state = self.me, self.state.value
        mine = MemberView(me.node, me.name, me.address, state, self.incarnation, me.boot, self._since_ms, "this node")
        return sorted([mine, *(member.view() for member in self.members.values())], key=lambda view: view.node)

    # -- time -----------------------------------------------------------------------------------------------------

    def _tick(self, now_ms: int, out: list[Output]) -> None:
        due = self.due_ms()
        if due is None or now_ms < due:
            return
        if now_ms - due > self.config.late_ms:
            self._discard_verdicts(now_ms - due)
        if self._announce_end_ms is not None:
            self._tick_announcing(now_ms, out)
            return
        self._expire(now_ms, out)
        if self._period_ms is not None and now_ms >= self._period_ms:
            self._period(now_ms, out)
        elif self._retry_ms is not None and now_ms >= self._retry_ms:
            self._retry_ms = None
            out += [self._ping(self.members[node]) for node, answered in self._open.items() if not answered]
        if self._gossip_ms is not None and now_ms >= self._gossip_ms:
            self._gossip(now_ms, out)

    def _discard_verdicts(self, late_ms: int) -> None:
        """This process was held up: answers and refutations may lie unread, so nobody is judged by this silence."""
        self.counters["late-ticks"] += 1
        for node in self._open:
            self._open[node] = True
        for node in self._timed:
            member = self.members[node]
            if member.deadline_ms is not None:
                member.deadline_ms += late_ms

    def _expire(self, now_ms: int, out: list[Output]) -> None:
        for node in list(self._timed):
            member = self.members[node]
            if member.deadline_ms is None or member.deadline_ms > now_ms:
                continue
            if member.state is State.SUSPICIOUS:
                who = " and ".join(self._name(accuser) for accuser in member.accusers)
                silent_s = (now_ms - member.since_ms) / 1000
                accuser = member.accusers[0] if member.accusers else None
                reason = f"no refutation for {silent_s:.1f} s, accused by {who}"
                self._become(member, State.FAILED, member.version, reason, now_ms, out, accuser=accuser)
            else:
                self._become(member, State.DELETED, member.version, member.reason, now_ms, out)

    def _period(self, now_ms: int, out: list[Output]) -> None:
        self._judge(now_ms, out)
        assert self._period_ms is not None
        self._period_ms += self.config.period_ms
        if self._period_ms <= now_ms:  # late by whole periods: they are not caught up
            self._period_ms = now_ms + self.config.period_ms
        self._round += 1
        self._open = dict.fromkeys(self._targets(), False)
        if now_ms >= self._away_ms and self._away:
            self._away_ms = now_ms + self.config.away_ms
            out.append(self._ping(self.members[self._rng.choice(list(self._away))]))
        if self._open:
            self._retry_ms = now_ms + self.config.retry_ms
            out += [self._ping(self.members[node]) for node in self._open]

    def _judge(self, now_ms: int, out: list[Output]) -> None:
        """The verdict of the period that ends: a miss is counted, the second in a row accuses."""
        self._retry_ms = None
        for node, answered in self._open.items():
            member = self.members[node]
            if answered:
                member.missed = 0
                continue
            member.missed += 1
            if member.missed < self.config.misses_to_suspect:
                continue
            if member.state in (State.ACTIVE, State.UNKNOWN):
                member.accusers = (self.me.node,)
                reason = f"no answer to {self.me.name} for {member.missed} periods of {self.config.period_ms} ms"
                self._become(member, State.SUSPICIOUS, member.version, reason, now_ms, out, accuser=self.me.node)
            elif member.state is State.SUSPICIOUS:
                self._accuse_too(member, (self.me.node,), now_ms)

    def _targets(self) -> Iterable[NodeId]:
        """Whom to ping this period: one ring neighbour in turn, whoever missed the last one, suspects, the never heard."""
        targets = {
            node: None
            for node in self._open
            if (member := self.members[node]).missed and member.state in (State.ACTIVE, State.SUSPICIOUS, State.UNKNOWN)
        }
        if self._watched is None:
            self._watched = self._ring.watched(lambda node: self.members[node].state)
        neighbours, suspects = self._watched
        self._turn += 1
        if neighbours:
            targets[neighbours[self._turn % len(neighbours)]] = None
        targets.update(dict.fromkeys(suspects))
        targets.update(dict.fromkeys(islice(self._unknown, INTRODUCTIONS_MAX)))
        return targets

    # -- what arrives ---------------------------------------------------------------------------------------------

    def _received(self, event: Received, now_ms: int, out: list[Output]) -> None:
        sender, message = event.sender, event.message
        if sender == self.me.node:
            self.counters["own-id"] += 1  # an echo, or a copied data directory that runs elsewhere
            return
        if not self._may_be_member(sender, now_ms):
            self.counters["not-allowed"] += 1
            return
        member = self._meet(event, now_ms, out)
        if member is None:
            return
        for rumor in message.rumors:
            self._hear(rumor, event, now_ms, out)
        if isinstance(message, Ping):
            first = self._told_first(member)
            rumors = self._news.take(len(self._ring.ids), first)
            out.append(Send(event.source, self._ack(message.seq, rumors)))
            if message.wants_list and now_ms - self._listed.get(sender, -LIST_INTERVAL_MS) >= LIST_INTERVAL_MS:
                self._listed[sender] = now_ms
                out += [Send(event.source, self._say(piece)) for piece in self._list()]
        elif isinstance(message, Ack):
            # An answer to the period before is late, but proves life within the last second.
            if sender in self._open and message.seq in (self._round, self._round - 1):
                self._open[sender] = True
            if sender in self._telling and message.seq == self._round:
                self._telling[sender] = True
                self._end_announcing_if_done(out)

    def _meet(self, event: Received, now_ms: int, out: list[Output]) -> Member | None:
        """Take what the sender says of itself. None: a process of the past speaks, or there is no room for it."""
        message = event.message
        member = self._record(event.sender, message.name, message.address, now_ms)
        if member is None:
            return None
        said: Version = (event.boot, message.incarnation)
        if said > member.version or (said < member.version and runs_ahead(member.version, said)):
            restarted = NEVER_HEARD[0] < member.version[0] < event.boot
            member.name, member.address = message.name, message.address
            if restarted:
                reason = f"restarted (boot {event.boot})"
            elif member.state is State.UNKNOWN:
                reason = "answered"
            else:
                reason = f"refuted with incarnation {message.incarnation}"
            self._become(member, State.ACTIVE, said, reason, now_ms, out, restarted=restarted)
        elif event.boot < member.version[0]:
            self.counters["older-boot"] += 1
            return None
        return member

    def _hear(self, rumor: Rumor, event: Received, now_ms: int, out: list[Output]) -> None:
        """Take hearsay."""
        if rumor.node == self.me.node:
            self._defend(rumor, event, now_ms, out)
            return
        if not self._may_be_member(rumor.node, now_ms):
            self.counters["not-allowed"] += 1
            return
        member = self._record(rumor.node, rumor.name, rumor.address, now_ms)
        if member is None:
            return
        version: Version = (rumor.boot, rumor.incarnation)
        own_words = rumor.node == event.sender and rumor.boot == event.boot
        if member.version != NEVER_HEARD and not own_words and runs_ahead(version, member.version):
            self.counters["implausible"] += 1
            return
        accusers = tuple(node for node in dict.fromkeys(rumor.accusers) if self._may_accuse(node))
        accusation = rumor.state in (State.SUSPICIOUS, State.FAILED)
        if (rumor.state is State.SUSPICIOUS and not accusers) or (accusation and not self._may_accuse(event.sender)):
            self.counters["accuser-not-alive"] += 1
            return
        if rumor.state is State.SUSPICIOUS and member.state is State.SUSPICIOUS and version == member.version:
            self._accuse_too(member, accusers, now_ms)
            return
        if not overrides(rumor.state, version, member.state, member.version):
            return
        restarted = NEVER_HEARD[0] < member.version[0] < rumor.boot
        if version > member.version:
            member.name, member.address = rumor.name, rumor.address
        member.accusers = accusers
        by = self._name(event.sender)
        reasons = {
            State.ACTIVE: f"restarted (boot {rumor.boot}), says {by}" if restarted else f"alive, says {by}",
            State.SUSPICIOUS: f"accused by {' and '.join(self._name(accuser) for accuser in accusers)}",
            State.FAILED: f"declared failed by {by}",
            State.STOPPED: "announced that it stops",
            State.LEFT: "announced that it leaves",
        }
        accuser = accusers[0] if accusers else event.sender if rumor.state is State.FAILED else None
        self._become(
            member, rumor.state, version, reasons[rumor.state], now_ms, out, accuser=accuser, restarted=restarted
        )

    def _defend(self, rumor: Rumor, event: Received, now_ms: int, out: list[Output]) -> None:
        """Somebody speaks of this node."""
        if rumor.boot > self.me.boot:
            self.counters["own-newer-boot"] += 1  # this directory is a copy or an old image: others ignore what we say
            return
        if (
            self.state is not State.ACTIVE
            or rumor.boot < self.me.boot
            or rumor.state is State.ACTIVE
            or rumor.incarnation < self.incarnation
        ):
            return
        if rumor.incarnation - self.incarnation > STEP_MAX:
            self.counters["implausible"] += 1
            return
        self.incarnation = rumor.incarnation + 1
        self.counters["refuted"] += 1
        self._spread(self._own_rumor(), now_ms)
        self._gossip_ms = now_ms
        if not isinstance(event.message, Ping):  # an Ack tells a pinger anyway
            out.append(Send(event.source, self._say(self._news.take(len(self._ring.ids)))))

    # -- state ----------------------------------------------------------------------------------------------------

    def _become(
        self,
        member: Member,
        state: State,
        version: Version,
        reason: str,
        now_ms: int,
        out: list[Output],
        *,
        accuser: NodeId | None = None,
        restarted: bool = False,
    ) -> None:
        """The one place where a member's state changes."""
        old = member.state
        if old is not state and state not in LIFE[old]:
            raise AssertionError(f"{member.name} cannot go from {old.value} to {state.value}: {reason}")
        member.state, member.version = state, version
        self._watched = None
        if old is not state:
            member.since_ms = now_ms
            member.reason = reason
        if state is not State.SUSPICIOUS:
            member.accusers = ()
            member.missed = 0
        self._keep_sets(member, now_ms)
        if state is not State.DELETED:  # deletion is each node's own; it changes nothing that others or users see
            self._spread(member.rumor(), now_ms)
            if old is not state or restarted:
                self.counters[f"became-{state.value}"] += 1
                out.append(Changed(member.view(), old, state, reason, accuser))

    def _keep_sets(self, member: Member, now_ms: int) -> None:
        node, state = member.node, member.state
        self._unknown.pop(node, None)
        for kept, wanted in ((self._away, state in AWAY), (self._timed, state in (State.SUSPICIOUS, State.FAILED))):
            if wanted:
                kept[node] = None
            else:
                kept.pop(node, None)
        if state is State.DELETED:
            self._ring.discard(node)
        else:
            self._ring.add(node)
        if state is State.SUSPICIOUS:
            self._set_deadline(member, now_ms)
        else:
            member.deadline_ms = now_ms + self.config.t_delete_ms if state is State.FAILED else None

    def _set_deadline(self, member: Member, now_ms: int) -> None:
        lone = len(member.accusers) < 2
        wait = self.config.t_fail_lone_ms if lone else self.config.t_fail_ms
        if self.me.node not in member.accusers:
            wait += self.config.bystander_ms
        member.deadline_ms = max(now_ms, member.since_ms + wait)

    def _accuse_too(self, member: Member, accusers: tuple[NodeId, ...], now_ms: int) -> None:
        """More accusers of a suspect: two, who watch it independently, shorten its time."""
        both = tuple(dict.fromkeys((*member.accusers, *accusers)))[:2]
        if both != member.accusers:
            member.accusers = both
            self._set_deadline(member, now_ms)
            self._spread(member.rumor(), now_ms)

    def _record(self, node: NodeId, name: str, address: str, now_ms: int) -> Member | None:
        member = self.members.get(node)
        if member is None:
            if len(self.members) >= self.config.members_max:
                self.counters["no-room"] += 1
                return None
            member = self.members[node] = Member(node, name, address, now_ms)
            self._unknown[node] = None
        return member

    def _may_be_member(self, node: NodeId, now_ms: int) -> bool:
        until = self._forgotten.get(node)
        if until is not None:
            if now_ms < until:
                return False
            del self._forgotten[node]
        return self._allowed(node)

    def _may_accuse(self, accuser: NodeId) -> bool:
        """The accusation of a dead member, or of one cut off, is not heard: from where it is, all look dead."""
        if not self._allowed(accuser):
            return False
        member = self.members.get(accuser)
        return member is None or member.state in (State.ACTIVE, State.SUSPICIOUS, State.UNKNOWN)

    def _name(self, node: NodeId) -> str:
        if node == self.me.node:
            return self.me.name
        member = self.members.get(node)
        return member.name if member is not None else node

    # -- roster ---------------------------------------------------------------------------------------------------

    def _seeds(self, seeds: Iterable[Seed], now_ms: int, out: list[Output]) -> None:
        greeted = 0
        for seed in seeds:
            if seed.node == self.me.node:
                continue
            self._forgotten.pop(seed.node, None)
            if seed.node in self.members:
                member = self.members[seed.node]
                if (
                    member.state is not State.ACTIVE
                ):  # the roster may know a newer address than the one that fell silent
                    member.name, member.address = seed.name, seed.address
                continue
            added = self._record(seed.node, seed.name, seed.address, now_ms)
            if added is None:
                continue
            if greeted < INTRODUCTIONS_MAX:  # at once; the periods that follow do the counting
                greeted += 1
                out.append(self._ping(added))

    def _forget(self, node: NodeId, now_ms: int) -> None:
        if self.members.pop(node, None) is None:
            return
        for kept in (self._unknown, self._away, self._timed, self._open, self._telling, self._listed):
            kept.pop(node, None)
        self._news.discard(node)
        self._ring.discard(node)
        self._watched = None
        self._forgotten[node] = now_ms + FORGOTTEN_MS
        if len(self._forgotten) > FORGOTTEN_MAX:
            del self._forgotten[next(iter(self._forgotten))]

    # -- the end --------------------------------------------------------------------------------------------------

    def _announce(self, state: State, now_ms: int, out: list[Output]) -> None:
        if state not in (State.STOPPED, State.LEFT):
            raise AssertionError(f"{state.value} is nothing a member announces of itself")
        self.state = state
        self._period_ms = self._retry_ms = self._gossip_ms = None
        self._round += 1
        alive = [node for node, member in self.members.items() if member.state is State.ACTIVE]
        told = self._rng.sample(alive, min(len(alive), self.config.announce_members))
        self._telling = dict.fromkeys(told, False)
        self._announce_end_ms = now_ms + self.config.announce_ms
        self._retry_ms = now_ms + self.config.retry_ms
        out += [self._ping(self.members[node]) for node in told]
        self._end_announcing_if_done(out)

    def _tick_announcing(self, now_ms: int, out: list[Output]) -> None:
        assert self._announce_end_ms is not None
        if now_ms >= self._announce_end_ms:
            self._end_announcing(out)
        elif self._retry_ms is not None and now_ms >= self._retry_ms:
            self._retry_ms = now_ms + self.config.retry_ms
            out += [self._ping(self.members[node]) for node, answered in self._telling.items() if not answered]

    def _end_announcing_if_done(self, out: list[Output]) -> None:
        if self._announce_end_ms is not None and all(self._telling.values()):
            self._end_announcing(out)

    def _end_announcing(self, out: list[Output]) -> None:
        out.append(Announced(len(self._telling), sum(self._telling.values())))
        self._announce_end_ms = self._retry_ms = self._period_ms = None
        self._timed.clear()

    # -- what is sent ---------------------------------------------------------------------------------------------

    def _spread(self, rumor: Rumor | None, now_ms: int) -> None:
        if rumor is not None:
            self._news.add(rumor)
            if self._gossip_ms is None and self.state is State.ACTIVE:
                self._gossip_ms = now_ms

    def _gossip(self, now_ms: int, out: list[Output]) -> None:
        """Random gossip beside the ring, as long as there is news: epidemics, O(log n) rounds to reach all."""
        hearers = [m for m in self.members.values() if m.state in (State.ACTIVE, State.SUSPICIOUS)]
        for member in self._rng.sample(hearers, min(len(hearers), self.config.gossip_fanout)):
            if not self._news:
                break
            rumors = self._news.take(len(self._ring.ids), self._told_first(member))
            out.append(Send(member.address, self._say(rumors)))
        self._gossip_ms = now_ms + self.config.gossip_ms if self._news and hearers else None

    def _own_rumor(self) -> Rumor:
        return Rumor(self.me.node, self.me.boot, self.incarnation, self.state, self.me.name, self.me.address)

    def _told_first(self, member: Member) -> list[Rumor]:
        """What `member` must hear before all else: that this node stops, and what is said of itself."""
        first = [] if self.state is State.ACTIVE else [self._own_rumor()]
        rumor = None if member.state is State.ACTIVE else member.rumor()
        return first if rumor is None else [*first, rumor]

    def _list(self) -> list[tuple[Rumor, ...]]:
        known = [rumor for member in self.members.values() if (rumor := member.rumor()) is not None]
        return pieces(known)[:LIST_PIECES_MAX]

    def _ping(self, member: Member) -> Send:
        me = self.me
        rumors = self._news.take(len(self._ring.ids), self._told_first(member))
        new_to_us = member.state is State.UNKNOWN
        return Send(member.address, Ping(self._round, me.name, me.address, self.incarnation, new_to_us, rumors))

    def _ack(self, seq: int, rumors: tuple[Rumor, ...]) -> Message:
        return Ack(seq, self.me.name, self.me.address, self.incarnation, rumors)

    def _say(self, rumors: tuple[Rumor, ...]) -> Message:
        return Gossip(self.me.name, self.me.address, self.incarnation, rumors)

# idunno/membership/book.py: what this node believes of all members, and the one place where a belief changes.
#
# Rule 1: `become` alone changes a state, along the table of states.py, and keeps everything derived from it: the ring, who is
#         alive, who is away, deadlines, news, the digest.
# Rule 2: no operation takes time in proportion to the number of members, but for the whole list and the view.
# Rule 3: everything kept is bounded: records by members_max, news and deadlines by the records, accusers by three,
#         tombstones of removed members by FORGOTTEN_MAX.
from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from typing import Final

from idunno.base.ids import NodeId
from idunno.membership.config import SwimConfig
from idunno.membership.events import Changed, MemberView, Output, Self
from idunno.membership.gossip import News, Pool
from idunno.membership.health import suspicion_ms
from idunno.membership.messages import ACCUSERS_MAX, Rumor, State
from idunno.membership.records import Member, mark_of
from idunno.membership.ring import Ring
from idunno.membership.states import AWAY, LIFE, Version

FORGOTTEN_MAX: Final = 1_024
FORGOTTEN_MS: Final = 60_000
"""How long a removed member's tombstone stands: rumours live for seconds, and the roster refuses it for ever."""


class Book:
    """`allowed` says who may be a member (the roster); statements about others are ignored."""

    def __init__(self, me: Self, config: SwimConfig, allowed: Callable[[NodeId], bool]) -> None:
        self.me, self._config, self._allowed = me, config, allowed
        self.incarnation = 0
        self.state = State.ACTIVE  # this node's own: or STOPPED, LEFT once announced
        self.members: dict[NodeId, Member] = {}  # all others
        self.counters: Counter[str] = Counter()
        self.news, self.ring = News(), Ring(me.node)
        self.alive, self.away = Pool(), Pool()  # who is gossiped to; who may come back
        self.unknown: dict[NodeId, None] = {}  # never heard, in the order they are introduced to
        self.digest = mark_of(me.node, (me.boot, 0), State.ACTIVE)
        self.changed_ms = 0  # when the digest last changed
        self.watched_stale = True  # somebody entered or left the ring, or changed its state in it
        self.someone_fell = False  # an Active member is no longer: its neighbours may have fallen with it
        self._deadlines: list[tuple[int, NodeId]] = []  # a heap; entries that no longer hold are skipped
        self._forgotten: dict[NodeId, int] = {}

    # -- reading --------------------------------------------------------------------------------------------------

    def views(self) -> list[MemberView]:
        return [member.view() for member in self.members.values()]

    def own_rumor(self) -> Rumor:
        me = self.me
        return Rumor(me.node, me.boot, self.incarnation, self.state, me.name, me.address)

    def rumors(self) -> list[Rumor]:
        """All that is told of the others."""
        return [rumor for member in self.members.values() if (rumor := member.rumor()) is not None]

    def name(self, node: NodeId) -> str:
        if node == self.me.node:
            return self.me.name
        member = self.members.get(node)
        return member.name if member is not None else node

    def may_accuse(self, accuser: NodeId) -> bool:
        """The accusation of a dead member, or of one cut off, is not heard: from where it is, all look dead."""
        if not self._allowed(accuser):
            return False
        member = self.members.get(accuser)
        return member is None or member.state in (State.ACTIVE, State.SUSPICIOUS, State.UNKNOWN)

    def may_be_member(self, node: NodeId, now_ms: int) -> bool:
        until = self._forgotten.get(node)
        if until is not None:
            if now_ms < until:
                return False
            del self._forgotten[node]
        return self._allowed(node)

    def due_ms(self) -> int | None:
        """When the next suspect fails or the next failed member is deleted."""
        while self._deadlines:
            at_ms, node = self._deadlines[0]
            member = self.members.get(node)
            if member is not None and member.deadline_ms == at_ms:
                return at_ms
            heapq.heappop(self._deadlines)
        return None

    # -- writing --------------------------------------------------------------------------------------------------

    def record(self, node: NodeId, name: str, address: str, now_ms: int) -> Member | None:
        """The member's record, made if it is new. None: there is no room."""
        member = self.members.get(node)
        if member is None:
            if len(self.members) >= self._config.members_max:
                self.counters["no-room"] += 1
                return None
            member = self.members[node] = Member(node, name, address, now_ms)
            self.unknown[node] = None
        return member

    def become(
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
        tell: bool = True,
    ) -> None:
        """The one place where a member's state changes. `tell`: it is news to others as well."""
        old = member.state
        if old is not state and state not in LIFE[old]:
            raise AssertionError(f"{member.name} cannot go from {old.value} to {state.value}: {reason}")
        if old is not state or (state is State.SUSPICIOUS and version != member.version):  # a new trial
            member.since_ms, member.reason = now_ms, reason
            member.given_ms = member.not_before_ms = 0
        member.state, member.version = state, version
        if old is not state:
            self.watched_stale = True
            self.someone_fell |= old is State.ACTIVE
        if state is not State.SUSPICIOUS:
            member.accusers = ()
        self._keep_sets(member, now_ms)
        self._mark(member, now_ms)
        if state is State.DELETED:  # deletion is each node's own; it changes nothing that others or users see
            return
        if tell:
            self._spread(member)
        if old is not state or restarted:
            self.counters[f"became-{state.value}"] += 1
            out.append(Changed(member.view(), old, state, reason, accuser, restarted))

    def accuse_too(self, member: Member, accusers: tuple[NodeId, ...], now_ms: int) -> None:
        """More accusers of a suspect: those who found it silent themselves shorten its time."""
        agreed = tuple(dict.fromkeys((*member.accusers, *accusers)))[:ACCUSERS_MAX]
        if agreed != member.accusers:
            member.accusers = agreed
            self._set_suspect_deadline(member, now_ms)
            self._spread(member)

    def refute(self, incarnation: int, now_ms: int) -> None:
        """This node lives, under a new incarnation."""
        self.digest ^= mark_of(self.me.node, (self.me.boot, self.incarnation), self.state)
        self.incarnation = incarnation
        self.digest ^= mark_of(self.me.node, (self.me.boot, self.incarnation), self.state)
        self.changed_ms = now_ms
        self.news.add(self.own_rumor())

    def give_time(self, late_ms: int, now_ms: int) -> None:
        """This process was held up: suspects get the time back, and what came meanwhile is read first."""
        for node in dict.fromkeys(node for _, node in self._deadlines):  # one may have several entries, most void
            member = self.members.get(node)
            if member is not None and member.state is State.SUSPICIOUS and member.deadline_ms is not None:
                # Kept beside the deadline: another accuser sets that anew, and must not take the time away again.
                member.given_ms += late_ms
                member.not_before_ms = now_ms + self._config.late_ms
                self._set_suspect_deadline(member, now_ms)

    def recant(self, now_ms: int) -> None:
        """This node counts as dead: from where it was, all others looked dead. Its accusations are not told on."""
        for node in dict.fromkeys(node for _, node in self._deadlines):
            member = self.members.get(node)
            if member is not None and member.state in (State.SUSPICIOUS, State.FAILED):
                self.news.discard(node)
        self.give_time(self._config.t_fail_lone_ms, now_ms)

    def expired(self, now_ms: int) -> list[Member]:
        """Whose deadline has passed. A suspect is looked at twice: a refutation may lie in the socket unread."""
        found = []
        while (due := self.due_ms()) is not None and due <= now_ms:
            member = self.members[self._deadlines[0][1]]
            if member.state is State.SUSPICIOUS and not member.looked:
                self._set_deadline(member, now_ms + self._config.look_ms)
                member.looked = True
            else:
                member.deadline_ms = None
                found.append(member)
        return found

    def forget(self, node: NodeId, now_ms: int) -> bool:
        """Removed from the roster. False: it was not known."""
        member = self.members.pop(node, None)
        if member is None:
            return False
        self.digest ^= member.mark
        self.changed_ms = now_ms
        self.unknown.pop(node, None)
        self.alive.keep(node, False)
        self.away.keep(node, False)
        self.news.discard(node)
        self.ring.discard(node)
        self.watched_stale = True
        self._forgotten[node] = now_ms + FORGOTTEN_MS
        if len(self._forgotten) > FORGOTTEN_MAX:
            del self._forgotten[next(iter(self._forgotten))]
        return True

    def expect(self, node: NodeId) -> None:
        """The roster names it (again)."""
        self._forgotten.pop(node, None)

    # -- what follows from a state ----------------------------------------------------------------------------------

    def _keep_sets(self, member: Member, now_ms: int) -> None:
        node, state = member.node, member.state
        self.unknown.pop(node, None)
        self.alive.keep(node, state in (State.ACTIVE, State.SUSPICIOUS))
        self.away.keep(node, state in AWAY)
        if state is State.DELETED:
            self.ring.discard(node)
        else:
            self.ring.add(node)
        if state is State.SUSPICIOUS:
            self._set_suspect_deadline(member, now_ms)
        elif state is State.FAILED:
            self._set_deadline(member, now_ms + self._config.t_delete_ms)
        else:
            member.deadline_ms = None

    def _set_suspect_deadline(self, member: Member, now_ms: int) -> None:
        config = self._config
        wait = suspicion_ms(
            config.t_fail_ms, config.t_fail_lone_ms, max(0, len(member.accusers) - 1), config.confirmations
        )
        if self.me.node not in member.accusers:
            wait += config.bystander_ms
        self._set_deadline(member, max(now_ms, member.not_before_ms, member.since_ms + wait + member.given_ms))

    def _set_deadline(self, member: Member, at_ms: int) -> None:
        member.looked = False
        if member.deadline_ms == at_ms:
            return
        member.deadline_ms = at_ms
        heapq.heappush(self._deadlines, (at_ms, member.node))
        if len(self._deadlines) > 2 * len(self.members) + 64:
            kept = [(m.deadline_ms, m.node) for m in self.members.values() if m.deadline_ms is not None]
            heapq.heapify(kept)
            self._deadlines = kept

    def _mark(self, member: Member, now_ms: int) -> None:
        mark = mark_of(member.node, member.version, member.state)
        if mark != member.mark:
            self.digest ^= member.mark ^ mark
            member.mark = mark
            self.changed_ms = now_ms

    def _spread(self, member: Member) -> None:
        rumor = member.rumor()
        if rumor is not None:
            self.news.add(rumor)

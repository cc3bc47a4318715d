# idunno/membership/voice.py: what this node says: every message introduces it and carries the news that fit.
#
# Rule 1: a suspect, or one that counts as dead, is told so before all else (Lifeguard's buddy system); so is, by a node that
#         stops, that it stops.
from __future__ import annotations

from idunno.membership.book import Book
from idunno.membership.events import Self, Send
from idunno.membership.gossip import pieces
from idunno.membership.messages import Ack, Gossip, Ping, PingReq, Relayed, Rumor, State, WholeList
from idunno.membership.records import Member

LIST_PIECES_MAX = 64
"""Datagrams with which a list is answered: about 1,000 members, 80 KB to somebody who holds the cluster key."""


class Voice:
    def __init__(self, me: Self, book: Book) -> None:
        self.me, self._book = me, book
        self.clock_ms = 0  # this node's wall clock, as of the event that is handled

    def _digest(self) -> int:
        """Of the whole list; none from who is about to go."""
        return self._book.digest if self._book.state is State.ACTIVE else 0

    def ping(self, member: Member, seq: int, *, wants_list: bool = False) -> Send:
        me, book = self.me, self._book
        return Send(
            member.address,
            Ping(
                seq,
                me.name,
                me.address,
                book.incarnation,
                wants_list,
                self._news(member),
                self._digest(),
                self.clock_ms,
            ),
        )

    def ack(self, address: str, seq: int, asker: Member | None) -> Send:
        me, book = self.me, self._book
        return Send(
            address,
            Ack(seq, me.name, me.address, book.incarnation, self._news(asker), self._digest(), self.clock_ms),
        )

    def ping_req(self, helper: Member, seq: int, target: Member) -> Send:
        me = self.me
        message = PingReq(seq, target.node, me.name, me.address, self._book.incarnation, self._news(helper))
        return Send(helper.address, message)

    def relayed(self, address: str, seq: int, target: Member, *, alive: bool) -> Send:
        me = self.me
        return Send(
            address, Relayed(seq, target.node, me.name, me.address, self._book.incarnation, alive, self._news(None))
        )

    def gossip(self, address: str, member: Member | None) -> Send:
        return self._say(address, self._news(member))

    def list_pieces(self, address: str) -> list[Send]:
        return [self._say(address, piece) for piece in pieces(self._book.rumors())[:LIST_PIECES_MAX]]

    def whole_list(self) -> WholeList:
        me, book = self.me, self._book
        return WholeList(me.name, me.address, me.boot, book.incarnation, (book.own_rumor(), *book.rumors()))

    def _say(self, address: str, rumors: tuple[Rumor, ...]) -> Send:
        return Send(address, Gossip(self.me.name, self.me.address, self._book.incarnation, rumors))

    def _news(self, hearer: Member | None) -> tuple[Rumor, ...]:
        book = self._book
        first = [] if book.state is State.ACTIVE else [book.own_rumor()]
        if hearer is not None and hearer.state is not State.ACTIVE and (rumor := hearer.rumor()) is not None:
            first.append(rumor)
        return book.news.take(len(book.members), first)

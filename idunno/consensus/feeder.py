# idunno/consensus/feeder.py: finds the entries that the core wants sent: from memory at once, older ones from the disk.
#
# Rule: entries are sent only while this node still leads the term they were ordered in; a leader never changes its log.
from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from idunno.base.errors import DiskFailed, NotFound
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.events import SendEntries
from idunno.consensus.log import Log
from idunno.consensus.messages import Append, Entry, RaftMessage
from idunno.consensus.raft import Raft

log = logging.getLogger("idunno.consensus")

_What: TypeAlias = tuple[Term, Index, Index, Index, int]


class Feeder:
    """`spawn` keeps a task and watches over its errors."""

    def __init__(
        self,
        core: Raft,
        log: Log,
        send: Callable[[NodeId, RaftMessage], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        self._core, self._log, self._send, self._spawn = core, log, send, spawn
        self._behind: dict[NodeId, deque[SendEntries]] = {}  # followers that a task is reading for
        self._made: Append  # the last one: the next follower is mostly sent the same
        self._made_of: _What | None = None

    def send(self, order: SendEntries) -> None:
        if _what(order) == self._made_of:
            self._send(order.to, self._made)
            return
        payloads = self._log.cached(order.first, order.last)
        if payloads is not None:
            self._send_append(order, payloads)
            return
        queue = self._behind.get(order.to)
        if queue is not None:
            queue.append(order)  # few: the core waits for answers (inflight_messages_max)
            return
        self._behind[order.to] = deque([order])
        self._spawn(self._read_and_send(order.to), f"raft entries for {order.to}")

    def _send_append(self, order: SendEntries, payloads: list[bytes]) -> None:
        entries = tuple(map(Entry, self._core.terms.each(order.first, order.last), payloads))
        self._made = Append(order.term, Index(order.first - 1), order.prev_term, order.commit, order.round, entries)
        self._made_of = _what(order)
        self._send(order.to, self._made)

    async def _read_and_send(self, to: NodeId) -> None:
        queue = self._behind[to]
        try:
            while queue:
                order = queue.popleft()
                if not self._leads(order.term):
                    continue
                try:
                    payloads = await self._log.read(order.first, order.last)
                except NotFound:
                    continue  # cut meanwhile: this node does not lead that term any more, or a snapshot took their place
                except DiskFailed as error:  # as if they were lost on the way: the core asks for them again
                    log.warning("entries for a follower not read", extra={"node": to, "error": str(error)})
                    continue
                if self._leads(order.term) and order.first > self._core.terms.base:
                    self._send_append(order, payloads)
        finally:
            del self._behind[to]

    def _leads(self, term: Term) -> bool:
        return self._core.is_leader and self._core.term == term


def _what(order: SendEntries) -> _What:
    """What makes an append equal to another."""
    return order.term, order.first, order.last, order.commit, order.round

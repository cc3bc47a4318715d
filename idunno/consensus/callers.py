# idunno/consensus/callers.py: who proposes to the replicated log, reads its index, or waits for an entry to be applied.
#
# Rule 1: a proposal is answered when it is committed, applied and synced on `copies_needed` nodes. NotLeader, NoQuorum and
#         Exhausted mean: certainly not appended. Anything later is Unconfirmed or DeadlineExceeded.
# Rule 2: all proposals of one turn of the loop become one append, with those that it is worth to wait for (gathering.py).
# Rule 3: every wait ends, and an error says how far things had come.
from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from idunno.base.errors import (
    DeadlineExceeded,
    Exhausted,
    InvalidArgument,
    NoQuorum,
    NotLeader,
    Unavailable,
    Unconfirmed,
)
from idunno.base.ids import Index, NodeId
from idunno.consensus.applying import Applying
from idunno.consensus.config import RaftConfig
from idunno.consensus.events import Propose, Read
from idunno.consensus.gathering import Gathering
from idunno.consensus.health import Health
from idunno.consensus.messages import PAYLOAD_BYTES_MAX
from idunno.consensus.quorum import majority
from idunno.consensus.raft import Raft
from idunno.consensus.voters import names_voters
from idunno.consensus.waiting import IndexWaiters, Proposal

EXPIRE_REST_S: Final = 1e-6
"""Between two looks for late proposals, for each that was looked at: ten times what the look takes. Of ten thousand whose
deadlines lie apart one is told 10 ms late at most, where a look for each took a second."""


class Callers:
    """`step` hands the core what they want of it. Refuses all until `bind`, and after `close`."""

    def __init__(
        self,
        me: NodeId,
        config: RaftConfig,
        applying: Applying,
        health: Health,
        step: Callable[[Propose | Read], None],
        copies_needed: int,
    ) -> None:
        self.copies_needed = copies_needed
        self._me, self._config, self._applying, self._health, self._step = me, config, applying, health, step
        self._core: Raft | None = None
        self._new: list[Proposal] = []  # to be appended at the end of this turn of the loop, or when all are there
        self._gathering = Gathering()
        self._waiting: asyncio.TimerHandle | None = None  # for more of them
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_s = math.inf  # when it fires, in loop time
        self._proposals: OrderedDict[Index, Proposal] = OrderedDict()  # appended here, in this term, not answered
        self._reads: dict[int, asyncio.Future[Index]] = {}
        self._read_number = 0
        self._awaited = IndexWaiters()

    def bind(self, core: Raft) -> None:
        self._core = core
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        self.lose("this node is stopping")
        self._core = None
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
            self._append_new()  # which refuses them
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    # -- what they ask ------------------------------------------------------------------------------------------------

    async def propose(self, payload: bytes, timeout_s: float) -> tuple[Index, int, Any]:
        """See RaftDriver.propose."""
        if not 1 <= len(payload) <= PAYLOAD_BYTES_MAX:
            raise InvalidArgument(f"a command has 1 to {PAYLOAD_BYTES_MAX} bytes, this one has {len(payload)}")
        if names_voters(payload):
            raise InvalidArgument("voters are named by change_voters only")
        core = self._core
        if core is None or not self._new:  # with others there, what let in the first of them holds
            core = self.leading()
        # Given up or not, but not what was in the log when this node was elected: after a restart of all that is all of it.
        uncommitted = core.terms.last - max(core.commit, core.term_start)
        waiting = len(self._new) + max(len(self._proposals), uncommitted)
        if waiting >= self._config.proposals_max:
            raise Exhausted(
                f"{waiting} proposals wait at the leader, at most {self._config.proposals_max}; try again later"
            )
        now_s = self._loop.time()
        proposal = Proposal(payload, self._loop.create_future(), timeout_s, now_s + timeout_s)
        self._gather(proposal, now_s)
        self._expire_by(proposal.end_s)
        try:
            return await proposal.answer
        finally:
            if proposal.index is not None and self._proposals.get(proposal.index) is proposal:
                del self._proposals[proposal.index]

    async def read_index(self, timeout_s: float) -> Index:
        """See RaftDriver.read_index."""
        core = self.leading()
        if len(self._reads) >= self._config.proposals_max:
            raise Exhausted(
                f"{len(self._reads)} reads wait at the leader, at most {self._config.proposals_max}; try again later"
            )
        self._read_number += 1
        read = self._read_number
        answer = self._reads[read] = self._loop.create_future()
        self._step(Read(read))
        try:
            async with asyncio.timeout(timeout_s):
                index: Index = await answer
                return index
        except TimeoutError:
            self.leading()
            raise DeadlineExceeded(
                f"no read index after {timeout_s:g} s: {core.answering(3)} of {len(core.voters)} voters answer, "
                f"committed {core.commit}, this term began at {core.term_start}"
            ) from None
        finally:
            self._reads.pop(read, None)

    async def applied(self, index: Index, timeout_s: float) -> None:
        """See RaftDriver.applied."""
        self._check_applies()
        if self._applying.index >= index:
            return
        if len(self._awaited) >= self._config.proposals_max:
            raise Exhausted(f"{len(self._awaited)} callers wait for entries to be applied; try again later")
        try:
            await self._awaited.wait(index, timeout_s)
        except TimeoutError:
            core = self._core
            known = f", known committed {core.commit}, log ends at {core.terms.last}" if core is not None else ""
            leader = (core.leader if core is not None else None) or "unknown"
            raise DeadlineExceeded(
                f"entry {index} not applied here after {timeout_s:g} s: applied {self._applying.index}{known}, leader {leader}"
            ) from None

    def leading(self) -> Raft:
        """The core of a leader. Raises NotLeader; NoQuorum from a leader, or a node that hears no leader, if too few voters
        answer."""
        core = self._core
        if core is None:
            raise NotLeader(f"{self._me} is not running")
        if core.accepts_proposals and core.answering(3) >= majority(len(core.voters)):
            return core
        raise self._refusal(core)

    def _refusal(self, core: Raft) -> NotLeader | NoQuorum:
        lost = "start the others, or see `idunno recover` if they are lost for good"
        voters, needed = len(core.voters), majority(len(core.voters))
        if core.accepts_proposals:
            return NoQuorum(f"{core.answering(3)} of {voters} voters answer, {needed} are needed; {lost}")
        silent_ms = core.leaderless_ms(int(self._loop.time() * 1000))
        if self._health.problem is None and silent_ms > 2 * self._config.election_ms_max:
            return NoQuorum(
                f"no leader for {silent_ms / 1000:.1f} s: fewer than {needed} of {voters} voters are up and reach "
                f"each other; {lost}"
            )
        led = f"the leader is {core.leader}" if core.leader else "a leader is being elected"
        return NotLeader(f"{self._me} does not lead: {self._health.problem or led}")

    def _check_applies(self) -> None:
        if self._health.stuck:
            raise Unavailable(f"{self._me} applies nothing: {self._health.problem}; ask another node")

    # -- what happened ------------------------------------------------------------------------------------------------

    def read_ready(self, reads: tuple[int, ...], index: Index) -> None:
        for read in reads:
            if (answer := self._reads.get(read)) is not None and not answer.done():
                answer.set_result(index)

    def read_failed(self, reads: tuple[int, ...]) -> None:
        for read in reads:
            if (answer := self._reads.get(read)) is not None and not answer.done():
                answer.set_exception(NotLeader(f"{self._me} lost the leadership; ask the new leader"))

    def was_applied(self, index: Index, value: Any) -> None:
        proposal = self._proposals.get(index)
        if proposal is not None:
            proposal.applied, proposal.value = True, value

    def applied_more(self) -> None:
        """Answer whoever waited for an entry to be applied."""
        self._awaited.reached(self._applying.index)

    def settle(self) -> None:
        """Answer the proposals that are applied and on enough nodes."""
        if not self._proposals:
            return
        oldest, applied, core = next(iter(self._proposals)), self._applying.index, self._core
        if oldest > applied or core is None or not core.is_leader:
            return
        synced = core.copies()
        copies, answered = len(synced), 0
        ready = min(applied, synced[self.copies_needed - 1]) if self.copies_needed <= copies else 0
        while oldest <= ready:
            index, proposal = self._proposals.popitem(last=False)
            while synced[copies - 1] < index:  # never more of them than had the entry before
                copies -= 1
            if not proposal.answer.done():
                proposal.answer.set_result((index, copies, proposal.value))
                answered += 1
            if not self._proposals:
                break
            oldest = next(iter(self._proposals))
        if answered:
            self._gathering.answered(answered, self._loop.time())

    def lose(self, why: str) -> None:
        """The leadership is gone, or this node is about to be: what was appended here may or may not be committed."""
        commit = self._core.commit if self._core is not None else 0
        proposals, self._proposals = self._proposals, OrderedDict()
        for index, proposal in proposals.items():
            state = "is committed" if index <= commit else "was appended"
            proposal.fail(Unconfirmed(f"{why}: entry {index} {state}, it may have happened; look before trying again"))

    def fail_awaited(self) -> None:
        """Nothing is applied here any more."""
        self.applied_more()  # before it ended
        self._awaited.fail(Unavailable(f"{self._me} applies nothing: {self._health.problem}; ask another node"))

    # -----------------------------------------------------------------------------------------------------------------

    def _gather(self, proposal: Proposal, now_s: float) -> None:
        """Have it appended: at the end of this turn of the loop, or when those came whom it is worth to wait for."""
        self._new.append(proposal)
        if len(self._new) == 1:
            wait_s = self._gathering.first(now_s)
            if wait_s:
                self._waiting = self._loop.call_later(wait_s, self._gathered)
            else:
                self._loop.call_soon(self._append_new)
        elif self._waiting is not None and self._gathering.another():
            self._waiting.cancel()
            self._waiting = None
            self._loop.call_soon(self._append_new)

    def _gathered(self) -> None:
        wait_s = self._gathering.on(self._loop.time())
        self._waiting = self._loop.call_later(wait_s, self._gathered) if wait_s else None
        if self._waiting is None:
            self._append_new()

    def _append_new(self) -> None:
        self._gathering.appended()
        new, self._new = self._new, []
        core = self._core
        if core is None or not core.accepts_proposals:
            leader = (core.leader if core is not None else None) or "not known"
            for proposal in new:
                proposal.fail(NotLeader(f"{self._me} does not lead any more; the leader is {leader}"))
            return
        payloads, index = list[bytes](), core.terms.last
        for proposal in new:
            if not proposal.answer.done():
                index = proposal.index = Index(index + 1)
                self._proposals[index] = proposal
                payloads.append(proposal.payload)
        if payloads:
            self._step(Propose(tuple(payloads)))

    def _expire_by(self, end_s: float) -> None:
        """One timer for all proposals, moved only when it must fire earlier: nearly all are answered long before."""
        if self._expiry is not None:
            if self._expiry_s <= end_s:
                return
            self._expiry.cancel()
        self._expiry, self._expiry_s = self._loop.call_at(end_s, self._expire), end_s

    def _expire(self) -> None:
        self._expiry = None
        now_s, next_s = max(self._expiry_s, self._loop.time()), math.inf  # a loop may round a timer down
        proposals = [*self._proposals.values(), *self._new]
        for proposal in proposals:
            if proposal.end_s > now_s:
                next_s = min(next_s, proposal.end_s)
            elif not proposal.answer.done():
                story = self._story(proposal)
                proposal.fail(DeadlineExceeded(f"no answer after {proposal.timeout_s:g} s: {story}"))
        if next_s < math.inf:
            self._expire_by(max(next_s, now_s + len(proposals) * EXPIRE_REST_S))

    def _story(self, proposal: Proposal) -> str:
        """How far a proposal has come, with the numbers that decide."""
        index, core = proposal.index, self._core
        if index is None or core is None:
            return "not appended yet"
        copies = sum(synced >= index for synced in core.copies())
        if index > core.commit:
            voters = len(core.voters)
            needed = majority(voters)
            return f"entry {index} is synced on {copies} nodes, not committed: {needed} of {voters} voters are needed"
        if not proposal.applied:
            return f"entry {index} is committed, not applied yet (applied {self._applying.index})"
        missing = sorted(node for node, p in core.peers.items() if p.match < index)
        return (
            f"entry {index} is committed, {copies} of {self.copies_needed} copies synced; "
            f"no acknowledgement from {', '.join(missing) or 'anybody else'}"
        )

# idunno/consensus/driver.py: the asyncio shell around the Raft core: its log, its timer, its messages, its callers.
#
# Rule 1: outputs are carried out in order; what a Persist promises is sent only after its flush. All Persists that wait share
#         one flush (group commit).
# Rule 2: committed entries are applied one after another, in slices of a few ms. An entry that cannot be applied stops this
#         node's part in the consensus, and it says so: applying on would make it differ from the others.
# Rule 3: a proposal is answered when it is committed, applied and synced on `copies_needed` nodes. NotLeader, NoQuorum and
#         Exhausted mean: certainly not appended. Anything later is Unconfirmed or DeadlineExceeded.
# Rule 4: who votes stands in the log; who else has the log, and how many copies an answer needs, the node says (set_members).
# Rule 5: a disk that refuses does not end the node: it steps aside (Halt), tries again every second, and comes back.
from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final

from idunno.base.disk import Disk
from idunno.base.errors import (
    Conflict,
    DeadlineExceeded,
    DiskFailed,
    Exhausted,
    IdunnoError,
    InternalError,
    InvalidArgument,
    NoQuorum,
    NotFound,
    NotLeader,
    Unconfirmed,
)
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.config import RaftConfig
from idunno.consensus.events import (
    ChangeVoters,
    Committed,
    Compacted,
    Halt,
    HardState,
    Input,
    InstallAnswered,
    Output,
    PeerLost,
    Persist,
    Persisted,
    Propose,
    Read,
    ReadFailed,
    ReadReady,
    Received,
    RoleChanged,
    Send,
    SendEntries,
    SendSnapshot,
    SetMembers,
    TakeInstall,
    Tick,
    Transfer,
)
from idunno.consensus.feeder import Feeder
from idunno.consensus.install import Snapshots, StateMachine
from idunno.consensus.log import Log
from idunno.consensus.messages import PAYLOAD_BYTES_MAX, RaftMessage
from idunno.consensus.quorum import majority
from idunno.consensus.raft import Raft
from idunno.consensus.terms import Terms
from idunno.consensus.voters import Voters, names_voters
from idunno.consensus.waiting import IndexWaiters, Proposal

log = logging.getLogger("idunno.consensus")

DISK_RETRY_S: Final = 1.0
"""Between attempts to write to a disk that refused: soon enough for a person who just freed space."""
STOP_FLUSH_S: Final = 5.0
"""How long `stop` waits for the last flush: the node has 10 s to exit."""
APPLY_BYTES_MAX: Final = 1024 * 1024
APPLY_ENTRIES_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class FollowerView:
    """What a leader knows of another node."""

    match: Index
    silent_ms: int
    installing: bool


class RaftDriver:
    """One node's replicated log. `send` must not block; it may lose messages. `apply` gets every committed entry once, in
    order, from index 1, or behind the snapshot, at each start; an empty payload is the no-op of a new term, and one that
    `names_voters` says who votes from then on.

    `voters`: those of a log in which no entry names any yet. `machine`: without one no snapshots are taken, sent or taken in.
    """

    def __init__(
        self,
        me: NodeId,
        disk: Disk,
        *,
        send: Callable[[NodeId, RaftMessage], None],
        apply: Callable[[Index, bytes], Any],
        config: RaftConfig,
        rng: random.Random,
        voters: Iterable[NodeId],
        members: Iterable[NodeId] = (),
        copies_needed: int = 1,
        machine: StateMachine | None = None,
    ) -> None:
        self.me, self.config, self.copies_needed = me, config, copies_needed
        self.on_role: list[Callable[[bool, Term], None]] = []
        """Told (True, term) when this node leads and has applied the no-op of its term, (False, term) when it leads no more."""
        self.on_leader: list[Callable[[NodeId | None, Term], None]] = []
        """Told whenever this node's role, its term or the leader it knows are others than before."""
        self.problem: str | None = None
        """Why this node takes no part at the moment (its disk refuses, an entry could not be applied); None if it does."""
        self._disk, self._send, self._apply, self._rng = disk, send, apply, rng
        self._first_voters, self._members = frozenset(voters), frozenset(members)
        # Until `start` opens the log: a core that knows nothing and is asked nothing.
        self._core = Raft(me, Voters(self._first_voters), self._members, Terms(), HardState(Term(0)), config, rng, 0)
        self._snapshots = (
            Snapshots(machine, disk, config, send=send, spawn=self._spawn) if machine is not None else None
        )
        self._forget_up_to = Index(0)
        self._running = self._busy = self._announced = False
        self._stuck = False  # halted for good
        self._disk_refuses: set[str] = set()  # halted for as long as the disk refuses these: "write", "read"
        self._inbox: deque[Input] = deque()
        self._persists: list[Persist] = []
        self._persist_due, self._apply_due, self._role_changed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._applied = Index(0)
        self._new: list[Proposal] = []  # to be appended at the end of this turn of the loop
        self._proposals: OrderedDict[Index, Proposal] = OrderedDict()  # appended here, in this term, not answered
        self._reads: dict[int, asyncio.Future[Index]] = {}
        self._read_number = 0
        self._awaited = IndexWaiters()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._persister: asyncio.Task[None] | None = None

    # -- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open snapshot and log and begin. Raises NotFound, Corrupt, Incompatible, DiskFailed (see Log.open)."""
        self._loop = asyncio.get_running_loop()
        head = await self._snapshots.load() if self._snapshots is not None else None
        self._log = await Log.open(
            self._disk,
            snapshot=(head.index, head.term) if head is not None else None,
            segment_bytes=self.config.segment_bytes,
        )
        first = Voters(self._first_voters) if head is None else Voters(head.voters, head.voters_index)
        self._applied = head.index if head is not None else Index(0)
        self._core = Raft(
            self.me,
            self._log.voters(first),
            self._members,
            self._log.terms,
            self._log.hard,
            self.config,
            self._rng,
            self._now_ms(),
            self._applied,
        )
        if self._snapshots is not None:
            self._snapshots.bind(self._core, self._log, self._step, self._forget)
            await self._log.keep_reserve()
        self._feeder = Feeder(self._core, self._log, self._send, self._spawn)
        self._running = True
        self._persister = self._spawn(self._persist_forever(), "raft persist")
        self._spawn(self._apply_forever(), "raft apply")
        self._arm()

    async def stop(self, transfer: bool) -> None:
        """End; with `transfer` hand leadership over first, for at most an election timeout."""
        if not self._running:
            return
        if transfer and self.is_leader:
            self._step(Transfer())
            try:
                async with asyncio.timeout(self.config.election_timeout_ms / 1000):
                    while self.is_leader and len(self._core.voters) > 1:
                        self._role_changed.clear()
                        await self._role_changed.wait()
            except TimeoutError:
                log.warning("leadership not handed over", extra={"term": self.term})
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        self._fail_waiting("this node is stopping")
        self._persist_due.set()
        assert self._persister is not None
        await asyncio.wait({self._persister}, timeout=STOP_FLUSH_S)  # a flush is not cut off while a thread writes
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._log.close()
        except DiskFailed as error:
            log.warning("log not closed cleanly", extra={"problem": str(error)})  # as after a crash: nothing is lost

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._stuck = True
            self._halt(f"{task.get_name()} failed: {error!r}", error)
            self._awaited.fail(InternalError(f"{self.me} applies nothing: {self.problem}"))

    # -- what it knows ----------------------------------------------------------------------------------------------

    @property
    def leader(self) -> NodeId | None:
        return self._core.leader if self._running else None

    @property
    def term(self) -> Term:
        return self._core.term

    @property
    def is_leader(self) -> bool:
        return self._running and self._core.is_leader

    @property
    def commit(self) -> Index:
        return self._core.commit

    @property
    def applied_index(self) -> Index:
        return self._applied

    @property
    def last_index(self) -> Index:
        return self._core.terms.last

    def lag(self) -> dict[NodeId, int]:
        """Of a leader: how many entries each other node has yet to sync. Empty on others."""
        return {node: self.last_index - p.match for node, p in self._core.peers.items()}

    def answering(self) -> int:
        """Of a leader: how many voters, itself included, answered one of its last three heartbeats."""
        return self._core.answering(3)

    @property
    def voters(self) -> frozenset[NodeId]:
        """As this node's log names them, committed or not."""
        return self._core.voters

    @property
    def short_of_space(self) -> bool:
        """The disk was full and the log's reserve is in use: only what frees space should be proposed."""
        return self._running and self._log.short

    @property
    def snapshot_index(self) -> Index:
        return self._snapshots.index if self._snapshots is not None else Index(0)

    def followers(self) -> dict[NodeId, FollowerView]:
        """Of a leader: what it knows of each other voter and member."""
        return {
            node: FollowerView(Index(p.match), p.unanswered * self.config.heartbeat_ms, p.installing)
            for node, p in self._core.peers.items()
        }

    # -- what the node tells it -------------------------------------------------------------------------------------

    def receive(self, sender: NodeId, message: RaftMessage) -> None:
        if self._running:
            self._step(Received(sender, message))

    def peer_lost(self, node: NodeId) -> None:
        """The connection to `node` closed: if it led, stand for election without waiting for its silence."""
        if self._running:
            self._step(PeerLost(node))

    def set_members(self, members: Iterable[NodeId], copies_needed: int) -> None:
        """Who is replicated to beside the voters, and on how many nodes an entry must be synced before it is answered."""
        self.copies_needed = copies_needed
        self._members = frozenset(members)
        if self._running:
            self._step(SetMembers(self._members))

    async def change_voters(self, voters: Iterable[NodeId], timeout_s: float) -> Index:
        """One voter more or one less; returns when that is committed and applied here.

        Raises NotLeader, NoQuorum, Conflict (not possible now: nothing happened); Unconfirmed, DeadlineExceeded.
        """
        self._check_leads()
        wanted = frozenset(voters)
        why = self._core.change_refused(wanted)
        if why:
            raise Conflict(f"the voters cannot be changed now: {why}")
        term, index = self._core.term, Index(self._core.terms.last + 1)
        self._step(ChangeVoters(wanted))
        log.info("voters changed", extra={"voters": sorted(wanted), "index": index, "term": term})
        await self.applied(index, timeout_s)
        if self._core.terms.term(index) != term:
            raise Unconfirmed(f"leadership was lost before the change of voters, entry {index}, was committed")
        return index

    async def hand_over(self, timeout_s: float) -> None:
        """Give the leadership to the voter that is furthest along. Raises Conflict when there is none, DeadlineExceeded."""
        if not self.is_leader:
            return
        if self._core.voters <= {self.me}:
            raise Conflict(f"{self.me} is the only voter: nobody can take over")
        self._step(Transfer())
        try:
            async with asyncio.timeout(timeout_s):
                while self.is_leader:
                    self._role_changed.clear()
                    await self._role_changed.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"no voter took over from {self.me} within {timeout_s:g} s") from None

    # -- what callers ask -------------------------------------------------------------------------------------------

    async def propose(self, payload: bytes, timeout_s: float) -> tuple[Index, int, Any]:
        """Append, and wait until it is committed, applied here and synced on `copies_needed` nodes.

        Returns its index, the number of nodes that have it synced, and what `apply` returned. Raises NotLeader, NoQuorum,
        Exhausted, InvalidArgument (certainly not appended); Unconfirmed, DeadlineExceeded (it may happen, or have happened).
        """
        if not 1 <= len(payload) <= PAYLOAD_BYTES_MAX:
            raise InvalidArgument(f"a command has 1 to {PAYLOAD_BYTES_MAX} bytes, this one has {len(payload)}")
        if names_voters(payload):
            raise InvalidArgument("voters are named by change_voters only")
        self._check_leads()
        waiting = len(self._new) + max(len(self._proposals), self._core.terms.last - self._core.commit)
        if waiting >= self.config.proposals_max:
            raise Exhausted(
                f"{waiting} proposals wait at the leader, at most {self.config.proposals_max}; try again later"
            )
        proposal = Proposal(payload, self._loop.create_future())
        if not self._new:
            self._loop.call_soon(self._append_new)
        self._new.append(proposal)
        expiry = self._loop.call_later(timeout_s, self._expire, proposal, timeout_s)
        try:
            return await proposal.answer
        finally:
            expiry.cancel()
            if proposal.index is not None and self._proposals.get(proposal.index) is proposal:
                del self._proposals[proposal.index]

    async def read_index(self, timeout_s: float) -> Index:
        """An index such that a machine that has applied it has seen all that was committed before this call.

        Raises NotLeader, NoQuorum, Exhausted, DeadlineExceeded; a read changes nothing, so it may always be asked again.
        """
        self._check_leads()
        if len(self._reads) >= self.config.proposals_max:
            raise Exhausted(
                f"{len(self._reads)} reads wait at the leader, at most {self.config.proposals_max}; try again later"
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
            self._check_leads()
            raise DeadlineExceeded(
                f"no read index after {timeout_s:g} s: {self.answering()} of {len(self._core.voters)} voters answer, "
                f"committed {self.commit}, this term began at {self._core.term_start}"
            ) from None
        finally:
            self._reads.pop(read, None)

    async def applied(self, index: Index, timeout_s: float) -> None:
        """Wait until this node has applied `index`. Raises DeadlineExceeded, InternalError (it stopped applying)."""
        if self._applied >= index:
            return
        self._check_applies()
        if len(self._awaited) >= self.config.proposals_max:
            raise Exhausted(f"{len(self._awaited)} callers wait for entries to be applied; try again later")
        try:
            await self._awaited.wait(index, timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(
                f"entry {index} not applied here after {timeout_s:g} s: applied {self._applied}, known committed "
                f"{self.commit}, log ends at {self.last_index}, leader {self.leader or 'unknown'}"
            ) from None

    def _check_leads(self) -> None:
        """Raises NotLeader; NoQuorum from a leader, or a node that hears no leader, if too few voters answer."""
        lost = "start the others, or see `idunno recover` if they are lost for good"
        voters, needed = len(self._core.voters), majority(len(self._core.voters))
        if not self._running:
            raise NotLeader(f"{self.me} is not running")
        if not self._core.accepts_proposals:
            silent_ms = self._core.leaderless_ms(self._now_ms())
            if self.problem is None and silent_ms > 2 * self.config.election_ms_max:
                raise NoQuorum(
                    f"no leader for {silent_ms / 1000:.1f} s: fewer than {needed} of {voters} voters are up and reach "
                    f"each other; {lost}"
                )
            why = self.problem or (f"the leader is {self.leader}" if self.leader else "a leader is being elected")
            raise NotLeader(f"{self.me} does not lead: {why}")
        if self.answering() < needed:
            raise NoQuorum(f"{self.answering()} of {voters} voters answer, {needed} are needed; {lost}")

    def _check_applies(self) -> None:
        if self._stuck:
            raise InternalError(f"{self.me} applies nothing: {self.problem}")

    # -- the core and its outputs -----------------------------------------------------------------------------------

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)

    def _step(self, event: Input) -> None:
        """Hand an event to the core and carry out what it says. An event that this causes waits for its turn."""
        self._inbox.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._inbox:
                for output in self._core.handle(self._inbox.popleft(), self._now_ms()):
                    self._carry_out(output)
        finally:
            self._busy = False
            self._arm()
        self._settle()

    def _carry_out(self, output: Output) -> None:
        match output:
            case Send():
                self._send(output.to, output.message)
            case SendEntries():
                self._feeder.send(output)
            case SendSnapshot(to, term):
                if self._snapshots is not None:
                    self._snapshots.send(to, term)
            case TakeInstall():
                if self._snapshots is not None:
                    self._snapshots.take_in(output)
            case InstallAnswered(sender, message):
                if self._snapshots is not None:
                    self._snapshots.answered(sender, message)
            case Persist(_, hard, first, entries, _, anew):
                if anew is not None:
                    self._begin_anew(anew)
                if hard is not None:
                    self._log.stage_hard(hard)
                if entries:
                    self._log.stage(first, entries)
                self._persists.append(output)
                self._persist_due.set()
            case Committed():
                self._apply_due.set()
            case ReadReady(reads, index):
                for read in reads:
                    if (answer := self._reads.get(read)) is not None and not answer.done():
                        answer.set_result(index)
            case ReadFailed(reads):
                for read in reads:
                    if (answer := self._reads.get(read)) is not None and not answer.done():
                        answer.set_exception(NotLeader(f"{self.me} lost the leadership; ask the new leader"))
            case RoleChanged(role, term, leader):
                log.info("consensus role", extra={"role": role.value, "term": term, "leader": leader})
                self._role_changed.set()
                for callback in self.on_leader:
                    self._loop.call_soon(callback, leader, term)
                if not self._core.is_leader:
                    self._lost_leadership()

    def _begin_anew(self, index: Index) -> None:
        """A snapshot took the place of this node's log and machine."""
        assert self._snapshots is not None
        assert self._snapshots.incoming is not None
        self._log.begin_anew(index)
        self._snapshots.incoming.install()
        self._applied = index

    def _forget(self, index: Index) -> None:
        self._forget_up_to = max(self._forget_up_to, index)
        self._persist_due.set()

    def _arm(self) -> None:
        """One timer, moved only when it must fire earlier: a heartbeat that puts off an election costs nothing here."""
        deadline = self._core.deadline_ms()
        if self._timer is not None:
            if self._timer_ms <= deadline:
                return
            self._timer.cancel()
        self._timer_ms = deadline
        self._timer = self._loop.call_at(deadline / 1000, self._tick) if self._running else None

    def _tick(self) -> None:
        self._timer = None
        if self._running:
            self._step(Tick())

    # -- durability -------------------------------------------------------------------------------------------------

    async def _persist_forever(self) -> None:
        while True:
            await self._persist_due.wait()
            self._persist_due.clear()
            while self._persists:
                batch, self._persists = self._persists, []
                try:
                    await self._log.flush()
                except IdunnoError as error:
                    self._persists = batch + self._persists
                    self._disk_refuses.add("write")
                    self._halt(f"its log cannot be written: {error}", error)
                    if not self._running:
                        return
                    await asyncio.sleep(DISK_RETRY_S)
                    continue
                for persist in batch:
                    for send in persist.then:
                        self._send(send.to, send.message)
                self._step(Persisted(batch[-1].seq))
                self._resume("write")
            if self._forget_up_to > self._core.terms.base and self._running:
                await self._compact()
            if not self._running:
                return

    async def _compact(self) -> None:
        """Here, because the log is written and cut by one task only."""
        index, self._forget_up_to = self._forget_up_to, Index(0)
        try:
            await self._log.roll()
            base = await self._log.forget(index)
        except DiskFailed as error:
            log.warning("log not cut", extra={"index": index, "problem": str(error)})
            return
        if base > self._core.terms.base:
            self._step(Compacted(base))

    def _halt(self, problem: str, error: BaseException) -> None:
        if self.problem is None:
            self.problem = problem
            log.error("node takes no part in consensus", extra={"problem": problem}, exc_info=error)
            if self._running:
                self._step(Halt(True))

    def _resume(self, doing: str) -> None:
        """The disk works again. A node that could not apply an entry does not come back."""
        if doing not in self._disk_refuses:
            return
        self._disk_refuses.remove(doing)
        if not self._stuck and not self._disk_refuses:
            self.problem = None
            log.warning("node takes part in consensus again")
            self._step(Halt(False))

    # -- applying and answering -------------------------------------------------------------------------------------

    async def _apply_forever(self) -> None:
        while True:
            await self._apply_due.wait()
            self._apply_due.clear()
            while self._applied < self._core.commit:
                first = self._applied + 1
                last, _ = self._core.terms.batch_end(first, APPLY_BYTES_MAX, APPLY_ENTRIES_MAX)
                last = min(last, self._core.commit)
                payloads = await self._read(first, last)
                if payloads is None or self._applied + 1 != first:
                    continue  # the disk refused, or a snapshot was installed meanwhile
                self._apply_slice(payloads)
                self._settle()
                if self._snapshots is not None:
                    self._snapshots.consider(self._applied)
                await asyncio.sleep(0)  # lets the loop breathe between slices

    async def _read(self, first: int, last: int) -> list[bytes] | None:
        """Committed entries; None when they could not be had, and are to be asked for again."""
        payloads = self._log.cached(first, last)
        if payloads is not None:
            return payloads
        try:
            payloads = await self._log.read(first, last)
        except NotFound:
            if self._applied + 1 == first:
                raise
            return None
        except DiskFailed as error:
            self._disk_refuses.add("read")
            self._halt(f"its log cannot be read: {error}", error)
            await asyncio.sleep(DISK_RETRY_S)
            return None
        self._resume("read")
        return payloads

    def _apply_slice(self, payloads: list[bytes]) -> None:
        end = self._loop.time() + self.config.apply_slice_ms / 1000
        for index, payload in enumerate(payloads, self._applied + 1):
            value = self._apply(Index(index), payload)
            self._applied = Index(index)
            proposal = self._proposals.get(self._applied)
            if proposal is not None:
                proposal.applied, proposal.value = True, value
            if self._loop.time() >= end:
                return

    def _settle(self) -> None:
        """Answer whoever waited for what is now there."""
        self._awaited.reached(self._applied)
        if not self._core.is_leader:
            return
        if not self._announced and self._applied >= self._core.term_start:
            self._announced = True
            self._tell_role(True)
        if not self._proposals:
            return
        ready = min(self._applied, self._core.copies(self.copies_needed))
        while self._proposals and next(iter(self._proposals)) <= ready:
            index, proposal = self._proposals.popitem(last=False)
            if not proposal.answer.done():
                proposal.answer.set_result((index, self._core.copies_of(index), proposal.value))

    def _append_new(self) -> None:
        new, self._new = [p for p in self._new if not p.answer.done()], []
        if not self._running or not self._core.accepts_proposals:
            for proposal in new:
                proposal.fail(
                    NotLeader(f"{self.me} does not lead any more; the leader is {self.leader or 'not known'}")
                )
        elif new:
            for index, proposal in enumerate(new, self._core.terms.last + 1):
                proposal.index = Index(index)
                self._proposals[proposal.index] = proposal
            self._step(Propose(tuple(proposal.payload for proposal in new)))

    def _expire(self, proposal: Proposal, timeout_s: float) -> None:
        if not proposal.answer.done():
            proposal.fail(DeadlineExceeded(f"no answer after {timeout_s:g} s: {self._story(proposal)}"))

    def _story(self, proposal: Proposal) -> str:
        """How far a proposal has come, with the numbers that decide."""
        index = proposal.index
        if index is None:
            return "not appended yet"
        copies = self._core.copies_of(index)
        if index > self._core.commit:
            voters = len(self._core.voters)
            needed = majority(voters)
            return f"entry {index} is synced on {copies} nodes, not committed: {needed} of {voters} voters are needed"
        if not proposal.applied:
            return f"entry {index} is committed, not applied yet (applied {self._applied})"
        missing = sorted(node for node, p in self._core.peers.items() if p.match < index)
        return (
            f"entry {index} is committed, {copies} of {self.copies_needed} copies synced; "
            f"no acknowledgement from {', '.join(missing) or 'anybody else'}"
        )

    def _lost_leadership(self) -> None:
        self._fail_waiting("the leadership was lost")
        if self._announced:
            self._announced = False
            self._tell_role(False)

    def _fail_waiting(self, why: str) -> None:
        proposals, self._proposals = self._proposals, OrderedDict()
        for index, proposal in proposals.items():
            state = "is committed" if index <= self._core.commit else "was appended"
            proposal.fail(Unconfirmed(f"{why}: entry {index} {state}, it may have happened; look before trying again"))

    def _tell_role(self, is_leader: bool) -> None:
        for callback in self.on_role:
            self._loop.call_soon(callback, is_leader, self._core.term)  # in order; an error of theirs is theirs

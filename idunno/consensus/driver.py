# idunno/consensus/driver.py: the asyncio shell around the Raft core: its log, its timer, its messages, its callers.
#
# Rule 1: outputs are carried out in order. An event that one of them causes waits for its turn.
# Rule 2: what is promised only when it is durable is in durability.py, what is done with committed entries in applying.py, who
#         waits for what in callers.py, what keeps a node from taking part in health.py.
# Rule 3: who votes stands in the log; who else has the log, and how many copies an answer needs, the node says (set_members).
from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final

from idunno.base.disk import Disk
from idunno.base.errors import (
    Conflict,
    DeadlineExceeded,
    DiskFailed,
    Unconfirmed,
)
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.applying import Applying
from idunno.consensus.callers import Callers
from idunno.consensus.config import RaftConfig
from idunno.consensus.durability import Durability
from idunno.consensus.events import (
    ChangeVoters,
    Committed,
    Copy,
    Doubted,
    HardState,
    Input,
    InstallAnswered,
    Output,
    PeerLost,
    Persist,
    Propose,
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
from idunno.consensus.health import Health
from idunno.consensus.install import Snapshots, StateMachine
from idunno.consensus.log import Log
from idunno.consensus.messages import RaftMessage
from idunno.consensus.raft import Raft
from idunno.consensus.terms import Terms
from idunno.consensus.voters import Voters

log = logging.getLogger("idunno.consensus")

STOP_FLUSH_S: Final = 5.0
"""How long `stop` waits for the last flush: the node has 10 s to exit."""


@dataclass(frozen=True, slots=True)
class FollowerView:
    """What a leader knows of another node."""

    match: Index
    silent_ms: int
    installing: bool


RESERVE_AGAIN_S: Final = 5.0
"""A disk that was full, or failed for a moment, is asked for the log's reserve again after this."""


class RaftDriver:
    """One node's replicated log. `send` must not block; it may lose messages. `apply` gets every committed entry once, in
    order, from index 1, or behind the snapshot, at each start; an empty payload is the no-op of a new term, and one that
    `names_voters` says who votes from then on.

    `voters`: those of a log in which no entry names any yet. `machine`: without one no snapshots are taken, sent or taken in.
    Not `proved`: it follows and promises nothing until `prove`, because its log may be an old one (standing.py).
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
        proved: bool = True,
    ) -> None:
        self.me, self.config, self._proved = me, config, proved
        self.on_role: list[Callable[[bool, Term], None]] = []
        """Told (True, term) when this node leads and has applied the no-op of its term, (False, term) when it leads no more."""
        self.on_leader: list[Callable[[NodeId | None, Term], None]] = []
        """Told whenever this node's role, its term or the leader it knows are others than before."""
        self._disk, self._send, self._rng = disk, send, rng
        self._first_voters, self._members = frozenset(voters), frozenset(members)
        # Until `start` opens the log: a core that knows nothing and is asked nothing.
        self._core = Raft(me, Voters(self._first_voters), self._members, Terms(), HardState(Term(0)), config, rng, 0)
        self._snapshots = (
            Snapshots(machine, disk, config, send=send, spawn=self._spawn) if machine is not None else None
        )
        self._running = self._busy = self._announced = self._ordered = False
        self._inbox: deque[Input] = deque()
        self._role_changed = asyncio.Event()
        self._health = Health(self._step_if_running)
        room = machine.room if machine is not None else None
        self._applying = Applying(apply, slice_s=config.apply_slice_ms / 1000, settled=self._slice_applied, room=room)
        self._callers = Callers(me, config, self._applying, self._health, self._step, copies_needed)
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
        applied = head.index if head is not None else Index(0)
        self._core = Raft(
            self.me,
            self._log.voters(first),
            self._members,
            self._log.terms,
            self._log.hard,
            self.config,
            self._rng,
            int(self._loop.time() * 1000),
            applied,
        )
        self._durability = Durability(self._log, self._core.terms, self._health, send=self._send, step=self._step)
        self._applying.bind(self._core, self._log, self._health, applied, self._callers.was_applied)
        self._callers.bind(self._core)
        if self._snapshots is not None:
            self._snapshots.bind(self._core, self._log, self._step, self._durability.forget)
            await self._log.keep_reserve()
            self._spawn(self._watch_reserve(), "raft reserve")
        self._feeder = Feeder(self._core, self._log, self._send, self._spawn)
        self._running = True
        if not self._proved:
            self._health.unproved("it has just started, and no other node has confirmed its log yet")
        self._persister = self._spawn(self._durability.run(), "raft persist")
        self._spawn(self._applying.run(), "raft apply")
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
        self._callers.close()
        self._durability.end()
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
            self._health.broken(f"{task.get_name()} failed: {error!r}", error)
            self._callers.fail_awaited()

    # -- what it knows ----------------------------------------------------------------------------------------------

    @property
    def problem(self) -> str | None:
        """Why this node takes no part at the moment (its disk refuses, an entry could not be applied); None if it does."""
        return self._health.problem

    @property
    def copies_needed(self) -> int:
        return self._callers.copies_needed

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
        return self._applying.index

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

    @property
    def busy_with_snapshot(self) -> bool:
        """One is being taken, sent or taken in."""
        return self._snapshots is not None and self._snapshots.busy

    def followers(self) -> dict[NodeId, FollowerView]:
        """Of a leader: what it knows of each other voter and member."""
        return {
            node: FollowerView(Index(p.match), p.unanswered * self.config.heartbeat_ms, p.installing)
            for node, p in self._core.peers.items()
        }

    @property
    def voters_index(self) -> Index:
        """Of the entry that named them."""
        return self._core.named.index

    @property
    def durable(self) -> tuple[Term, Index]:
        """The term, and up to which entry the log is synced. At the start both are as the disk has them; later the term is ahead
        of it for as long as a flush takes, as is a cut of the log that comes with it."""
        return self._core.term, self._core.synced

    # -- what the node tells it -------------------------------------------------------------------------------------

    def unproved(self, why: str) -> None:
        """It still waits for `prove`, for this reason."""
        if not self._proved:
            self._health.unproved(why)

    def prove(self) -> None:
        """Its log is what it acknowledged: take part."""
        self._proved = True
        self._health.proved()

    def copy(self, term: Term) -> None:
        """Unproved for longer: its log was found to be an old one. It takes in the leader's, and promises nothing. `term`: in
        which it once was, as others know."""
        self._step(Copy(term))

    def doubt(self, node: NodeId) -> None:
        """The log of `node` is an old one: its disk has not what it acknowledged."""
        if self._running:
            self._step(Doubted(node))

    @property
    def copying(self) -> bool:
        return self._core.copying

    def holds(self, term: Term, index: Index) -> bool:
        """Whether this node's synced log has the entry `index` of `term`, which is committed; or a snapshot in its place."""
        terms = self._core.terms
        return self._core.synced >= index and (terms.base >= index or terms.term(index) == term)

    def refuse(self, why: str) -> None:
        """Take no part any more, for good."""
        self._health.broken(why, None)

    def receive(self, sender: NodeId, message: RaftMessage, *, counts: bool = True) -> None:
        """`counts`: not if the sender only copies the log."""
        if self._running:
            self._step(Received(sender, message, counts))

    def peer_lost(self, node: NodeId) -> None:
        """The connection to `node` closed: if it led, stand for election without waiting for its silence."""
        if self._running:
            self._step(PeerLost(node))

    def set_members(self, members: Iterable[NodeId], copies_needed: int) -> None:
        """Who is replicated to beside the voters, and on how many nodes an entry must be synced before it is answered."""
        self._callers.copies_needed = copies_needed
        self._members = frozenset(members)
        if self._running:
            self._step(SetMembers(self._members))

    async def change_voters(self, voters: Iterable[NodeId], timeout_s: float) -> Index:
        """One voter more or one less; returns when that is committed and applied here.

        Raises NotLeader, NoQuorum, Conflict (not possible now: nothing happened); Unconfirmed, DeadlineExceeded.
        """
        self._callers.leading()
        wanted = frozenset(voters)
        why = self._core.change_refused(wanted)
        if why:
            raise Conflict(f"the voters cannot be changed now: {why}")
        log.info("voters changed", extra={"voters": sorted(wanted), "index": self.last_index + 1, "term": self.term})
        return (await self._commit(ChangeVoters(wanted), timeout_s))[1]

    async def mark_end(self, timeout_s: float) -> tuple[Term, Index]:
        """Have an entry committed that means nothing, behind all that this leader's log holds; returns its term and index.
        Raises NotLeader, NoQuorum (nothing happened); Unconfirmed, DeadlineExceeded."""
        self._callers.leading()
        return await self._commit(Propose((b"",)), timeout_s)

    async def _commit(self, event: ChangeVoters | Propose, timeout_s: float) -> tuple[Term, Index]:
        """Have its one entry appended, committed and applied here."""
        term, index = self._core.term, Index(self._core.terms.last + 1)
        self._step(event)
        await self.applied(index, timeout_s)
        if self._core.terms.term(index) != term:
            raise Unconfirmed(f"leadership was lost before entry {index} was committed")
        return term, index

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

    def propose(self, payload: bytes, timeout_s: float) -> Coroutine[Any, Any, tuple[Index, int, Any]]:
        """Append, and wait until it is committed, applied here and synced on `copies_needed` nodes.

        Returns its index, the number of nodes that have it synced, and what `apply` returned. Raises NotLeader, NoQuorum,
        Exhausted, InvalidArgument (certainly not appended); Unconfirmed, DeadlineExceeded (it may happen, or have happened).
        """
        return self._callers.propose(payload, timeout_s)

    async def read_index(self, timeout_s: float) -> Index:
        """An index such that a machine that has applied it has seen all that was committed before this call.

        Raises NotLeader, NoQuorum, Exhausted, DeadlineExceeded; a read changes nothing, so it may always be asked again.
        """
        return await self._callers.read_index(timeout_s)

    async def applied(self, index: Index, timeout_s: float) -> None:
        """Wait until this node has applied `index`. Raises DeadlineExceeded, Exhausted, Unavailable (it applies no more)."""
        await self._callers.applied(index, timeout_s)

    # -- the core and its outputs -----------------------------------------------------------------------------------

    def _step(self, event: Input) -> None:
        """Hand an event to the core and carry out what it says. An event that this causes waits for its turn."""
        self._inbox.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._inbox:
                for output in self._core.handle(self._inbox.popleft(), int(self._loop.time() * 1000)):
                    self._carry_out(output)
        finally:
            self._busy = False
            self._arm()
            if self._ordered:
                self._begin()
        self._settle()

    def _begin(self) -> None:
        """What was ordered, in the order of how many wait for it: a follower's promise is waited for by all, what it applies
        by few."""
        self._ordered = False
        writing, committed = self._durability.begin(), self._applying.index < self._core.commit
        if committed and writing:
            self._loop.call_soon(self._applying.committed)
        elif committed:
            self._applying.committed()

    def _step_if_running(self, event: Input) -> None:
        if self._running:
            self._step(event)

    def _carry_out(self, output: Output) -> None:
        match output:
            case SendEntries():
                self._feeder.send(output)
            case Send():
                self._send(output.to, output.message)
            case Committed():
                self._ordered = True
            case Persist():
                if output.anew is not None:
                    self._begin_anew(output.anew)
                self._durability.persist(output)
                self._ordered = True
            case SendSnapshot(to, term):
                if self._snapshots is not None:
                    self._snapshots.send(to, term)
            case TakeInstall():
                if self._snapshots is not None:
                    self._snapshots.take_in(output)
            case InstallAnswered(sender, message):
                if self._snapshots is not None:
                    self._snapshots.answered(sender, message)
            case ReadReady(reads, index):
                self._callers.read_ready(reads, index)
            case ReadFailed(reads):
                self._callers.read_failed(reads)
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
        self._applying.begin_anew(index)
        self._callers.applied_more()

    async def _watch_reserve(self) -> None:
        """While the log is short nothing new is proposed, so no snapshot may ever come that would look for space again."""
        while True:
            await asyncio.sleep(RESERVE_AGAIN_S)
            await self._log.regain_reserve()

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

    # -- applied, and answered --------------------------------------------------------------------------------------

    def _slice_applied(self) -> None:
        self._callers.applied_more()
        self._settle()
        if self._snapshots is not None:
            self._snapshots.consider(self._applying.index)

    def _settle(self) -> None:
        self._callers.settle()
        if not self._announced and self._core.is_leader and self._applying.index >= self._core.term_start:
            self._announced = True
            self._tell_role(True)

    def _lost_leadership(self) -> None:
        self._callers.lose("the leadership was lost")
        if self._announced:
            self._announced = False
            self._tell_role(False)

    def _tell_role(self, is_leader: bool) -> None:
        for callback in self.on_role:
            self._loop.call_soon(callback, is_leader, self._core.term)  # in order; an error of theirs is theirs

# idunno/consensus/raft.py: the Raft core: who leads, what the log holds, what is committed.
#
# Source: Diego Ongaro, Consensus: Bridging Theory and Practice (the Raft thesis); numbers in comments are its sections.
# Rule 1: every rule that changes term, vote, role, log or commit is in this file. It does no I/O, reads no clock and draws
#         no chance of its own; one call handles one input to the end.
# Rule 2: what is promised is synced first: see events.Persist. The leader counts its own log only when it is synced.
# Rule 3: messages may be lost, repeated, reordered; none of that may do more than cost time.
# Rule 4: voters are those whom the newest entry of the log that names any names (voters.py), one more or one less at a time;
#         learners, the other members, are replicated to and never counted for a vote or a commit.
from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import attrgetter
from typing import Final

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.config import RaftConfig
from idunno.consensus.events import (
    ChangeVoters,
    Committed,
    Compacted,
    Copy,
    Doubted,
    Halt,
    HardState,
    Input,
    InstallAnswered,
    Installed,
    Output,
    PeerLost,
    Persist,
    Persisted,
    Propose,
    RaftRole,
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
from idunno.consensus.messages import (
    APPEND_BYTES_MAX,
    APPEND_ENTRIES_MAX,
    Append,
    AppendAnswer,
    Entry,
    Install,
    InstallAnswer,
    RaftMessage,
    TimeoutNow,
    VoteAnswer,
    VoteRequest,
)
from idunno.consensus.progress import Progress
from idunno.consensus.quorum import grants_vote, majority, reached
from idunno.consensus.read_index import ReadIndex
from idunno.consensus.terms import Terms
from idunno.consensus.voters import Voters, encode_voters, named_in

_NONE: Final = Index(0)
_term: Final[Callable[[Entry], Term]] = attrgetter("term")


class Raft:
    """One node's part in the consensus. Same inputs, times and `rng`: same outputs.

    `terms`, `voters` and `hard` are what log and snapshot held at start, all of it synced; `commit` is the snapshot's index.
    `members` are all who are to have the log. Times are milliseconds of one monotonic clock.
    Call `handle(Tick(), now_ms)` whenever `deadline_ms()` has come.
    """

    def __init__(
        self,
        me: NodeId,
        voters: Voters,
        members: Iterable[NodeId],
        terms: Terms,
        hard: HardState,
        config: RaftConfig,
        rng: random.Random,
        now_ms: int,
        commit: Index = _NONE,
    ) -> None:
        self.me, self.config, self.terms = me, config, terms
        self.named, self.members = voters, frozenset(members)
        self.term, self.voted_for = hard.term, hard.voted_for
        self.role, self.commit = RaftRole.FOLLOWER, Index(max(terms.base, commit))
        self.leader: NodeId | None = None
        self.peers: dict[NodeId, Progress] = {}  # of a leader: every other voter and learner
        self.synced = terms.last  # how far this node's own log is durable
        self.halted = False
        self.copying = False  # while halted: see Copy
        self._rng, self._now, self._out = rng, now_ms, list[Output]()
        self._heard_ms = now_ms  # when the leader was last heard
        self._votes: set[NodeId] = set()
        self._vote_seq = 0  # the Persist that holds this candidate's own vote
        self._seq = self._saved_seq = self._hard_seq = 0
        self._hard_dirty = False
        self._unsynced: deque[tuple[int, int]] = deque()  # (seq, last index) of Persists with entries under way
        self._term_start = 0  # of a leader: the index of its no-op
        self._heartbeat_ms = self._election_ms = now_ms
        self._notice_ms: int | None = None
        self._transfer: tuple[NodeId, int] | None = None  # to whom, until when
        self._reads = ReadIndex()
        self._restart_election_timer()
        if self.voters == {me}:
            self._election_ms = now_ms  # nobody to wait for

    # -- what the driver asks ---------------------------------------------------------------------------------------

    @property
    def voters(self) -> frozenset[NodeId]:
        return self.named.now

    @property
    def learners(self) -> frozenset[NodeId]:
        return self.members - self.voters

    @property
    def is_leader(self) -> bool:
        return self.role is RaftRole.LEADER

    @property
    def accepts_proposals(self) -> bool:
        return self.role is RaftRole.LEADER and self._transfer is None

    @property
    def term_start(self) -> Index:
        """Of a leader: the index of the no-op that began its term."""
        return Index(self._term_start)

    def leaderless_ms(self, now_ms: int) -> int:
        """For how long no leader was known here."""
        return 0 if self.leader is not None else now_ms - self._heard_ms

    def change_refused(self, voters: frozenset[NodeId]) -> str:
        """Why these cannot become the voters now; "" if they can."""
        if not self.accepts_proposals:
            return "this node does not lead"
        if self.commit < self._term_start:  # the erratum of 2015: else an older leader's change could still win
            return "no entry of this leader's term is committed yet"
        if self.named.index > self.commit:
            return f"the change before it, entry {self.named.index}, is not committed yet"
        if not voters or len(voters ^ self.voters) != 1:
            return f"from {len(self.voters)} voters to {len(voters)} others: one joins or one goes at a time"
        return ""

    def deadline_ms(self) -> int:
        if self.role is not RaftRole.LEADER:
            return self._election_ms
        due, notice, ask_all = self._heartbeat_ms, self._notice_ms, self._reads.ask_all_ms
        if notice is not None and notice < due:
            due = notice
        return ask_all if ask_all is not None and ask_all < due else due

    def copies(self) -> list[int]:
        """Of a leader: up to which index each node, voter or learner, has synced its log; the furthest first."""
        return sorted([self.synced, *[p.match for p in self.peers.values()]], reverse=True)

    def answering(self, heartbeats: int) -> int:
        """Of a leader: how many voters, itself included, left at most so many heartbeats unanswered."""
        voters = self.named.now
        found = 1 if self.me in voters else 0
        for node, p in self.peers.items():
            if p.unanswered <= heartbeats and node in voters:
                found += 1
        return found

    # -- the one entrance -------------------------------------------------------------------------------------------

    def handle(self, event: Input, now_ms: int) -> list[Output]:
        self._now, self._out = now_ms, []
        before = (self.role, self.term, self.leader)
        match event:
            case Received():
                self._received(event.sender, event.message, event.counts)
            case Persisted():
                self._persisted(event.seq)
            case Propose():
                assert self.accepts_proposals, f"proposed to a {self.role.value}"
                self._append_own(event.payloads)
            case Read(read):
                self._read(read)
            case Tick():
                self._tick()
            case PeerLost(node):
                self._peer_lost(node)
            case Transfer():
                self._begin_transfer()
            case SetMembers(members):
                self.members = members
                self._meet_peers()
            case ChangeVoters(voters):
                assert not (why := self.change_refused(voters)), why
                self._append_own((encode_voters(voters),))
            case Installed():
                self._installed(event)
            case Compacted(index):
                self.terms.compact(index)
                self.named.compact(index)
            case Copy(term):
                self.copying = self.halted
                if self.copying and term > self.term:
                    self._follow(term, None)
            case Doubted(node):
                if (p := self.peers.get(node)) is not None:
                    self.peers[node] = Progress(next=self.terms.last + 1, unanswered=p.unanswered, silent=True)
            case Halt(on):
                self.halted, self.copying = on, self.copying and on
                if on and self.role is not RaftRole.FOLLOWER:
                    self._follow(self.term, None)
                elif not on and self.voters == {self.me}:
                    self._election_ms = now_ms  # nobody to wait for
        if self._hard_dirty:
            self._persist()
        if before != (self.role, self.term, self.leader):
            self._out.append(RoleChanged(self.role, self.term, self.leader))
        return self._out

    def _received(self, sender: NodeId, message: RaftMessage, counts: bool) -> None:
        if not counts and not isinstance(message, AppendAnswer | InstallAnswer):
            return
        match message:
            case VoteRequest():
                self._asked_for_vote(sender, message)
                return
            case VoteAnswer(granted=True, pre=True):
                self._pre_vote_granted(sender, message)
                return
        if message.term > self.term:
            self._follow(message.term, None)
        elif message.term < self.term:
            if isinstance(message, Append):  # tells a deposed leader, or one that lags behind our term
                self._answer(sender, AppendAnswer(self.term, False, message.prev_index, message.round))
            elif isinstance(message, Install):
                self._answer(sender, InstallAnswer(self.term, message.index, 0))
            return
        match message:
            case Append():
                self._appended(sender, message)
            case AppendAnswer():
                if p := self._heeded(sender, counts, less=not message.ok, index=message.hint_index):
                    self._append_answered(sender, p, message)
            case Install():
                self._offered_snapshot(sender, message)
            case InstallAnswer():
                if p := self._heeded(sender, counts):
                    self._install_answered(sender, p, message)
            case VoteAnswer(granted=True):
                if self.role is RaftRole.CANDIDATE and sender in self.voters:
                    self._count_vote(sender)
            case TimeoutNow():
                if self._may_stand() and self.role is not RaftRole.LEADER:
                    self._stand(transfer=True)

    def _tick(self) -> None:
        if not self.is_leader:
            if self._now >= self._election_ms:
                self._ask_pre_votes()
            return
        if self._transfer is not None and self._now >= self._transfer[1]:
            self._transfer = None  # 3.10: given up after one election timeout, and leads on
        if self._notice_ms is not None and self._now >= self._notice_ms:
            self._notice_ms = None
            for node, p in self.peers.items():
                if min(self.commit, p.match) > p.commit_sent:
                    self._heartbeat(node, p, notice=True)
        if self._reads.ask_all_ms is not None and self._now >= self._reads.ask_all_ms:
            self._reads.ask_all_ms = None
            self._heartbeat_all()
        if self._now >= self._heartbeat_ms:
            self._heartbeat_ms = self._now + self.config.heartbeat_ms
            if self.answering(self.config.silent_heartbeats_max) < majority(len(self.voters)):
                self._follow(self.term, None)  # 6.2: a leader without a majority steps down after one election timeout
                return
            for p in self.peers.values():
                p.unanswered += 1
            self._reads.heartbeat()
            self._heartbeat_all()

    # -- elections (3.4, 4.2.3, 9.6, 3.10) --------------------------------------------------------------------------

    def _restart_election_timer(self) -> None:
        spread = self._rng.randrange(self.config.election_spread_ms)
        self._election_ms = self._now + self.config.election_timeout_ms + spread

    def _may_stand(self) -> bool:
        """4.2.2: also a voter whose removal is not known committed: perhaps no other has that entry, and waits for it. It
        does not count its own vote then."""
        leaving = self.named.index > self.commit and self.me in self.named.before
        return (self.me in self.voters or leaving) and not self.halted

    def _hears_leader(self) -> bool:
        if self.is_leader:
            return True  # check-quorum: a leader that stays one hears a majority
        return self.leader is not None and self._now - self._heard_ms < self.config.election_timeout_ms

    def _peer_lost(self, node: NodeId) -> None:
        if node == self.leader:
            self.leader = None
            self._election_ms = self._now + self._rng.randrange(self.config.lost_leader_spread_ms)

    def _ask_pre_votes(self) -> None:
        self._restart_election_timer()
        self.leader = None
        if not self._may_stand():
            return
        # Asked again soon: it changes nothing at others, and they may just be connecting, or about to miss the leader too.
        self._election_ms = self._now + self.config.heartbeat_ms + self._rng.randrange(self.config.heartbeat_ms)
        self.role, self._votes = RaftRole.PRE_CANDIDATE, {self.me}
        if self._is_majority(self._votes):
            self._stand()
            return
        last, last_term = self.terms.last, self.terms.last_term
        self._broadcast(VoteRequest(Term(self.term + 1), last, last_term, pre=True))

    def _pre_vote_granted(self, sender: NodeId, answer: VoteAnswer) -> None:
        if self.role is RaftRole.PRE_CANDIDATE and answer.term == self.term + 1 and sender in self.voters:
            self._votes.add(sender)
            if self._is_majority(self._votes):
                self._stand()

    def _stand(self, *, transfer: bool = False) -> None:
        """Raise the term, vote for oneself, ask the others; one's own vote counts when it is synced."""
        self.term, self.voted_for, self._hard_dirty = Term(self.term + 1), self.me, True
        self.role, self.leader, self._votes = RaftRole.CANDIDATE, None, set()
        self._restart_election_timer()
        request = VoteRequest(self.term, self.terms.last, self.terms.last_term, transfer=transfer)
        self._persist(*(Send(node, request) for node in sorted(self.voters - {self.me})))
        self._vote_seq = self._seq

    def _count_vote(self, voter: NodeId) -> None:
        self._votes.add(voter)
        if self.me in self._votes and self._is_majority(self._votes):
            self._lead()

    def _is_majority(self, nodes: set[NodeId]) -> bool:
        return len(nodes & self.voters) >= majority(len(self.voters))

    def _asked_for_vote(self, sender: NodeId, request: VoteRequest) -> None:
        # 4.2.2: also of and by nodes that are no voters here: the asker's log may be ahead with a change of voters, and it
        # counts the votes. That it is not behind is what is checked.
        if self.halted:
            return
        if self._hears_leader() and not request.transfer:
            return  # 4.2.3: a node that hears a leader takes no part in another's election, nor its term
        mine, theirs = (self.terms.last_term, self.terms.last), (request.last_term, request.last_index)
        if request.pre:  # 9.6: would it be granted? Changes nothing here
            granted = request.term > self.term and theirs >= mine
            self._answer(sender, VoteAnswer(request.term if granted else self.term, granted, pre=True))
            return
        if request.term > self.term:
            self._follow(request.term, None)
        granted = request.term == self.term and grants_vote(mine, theirs, self.voted_for, sender)
        if granted and self.voted_for is None:
            self.voted_for, self._hard_dirty = sender, True
            self._restart_election_timer()
        self._answer(sender, VoteAnswer(self.term, granted))

    def _follow(self, term: Term, leader: NodeId | None) -> None:
        if term > self.term:
            self.term, self.voted_for, self._hard_dirty = term, None, True
        if self.is_leader:
            self._heard_ms = self._now
        if self.role is not RaftRole.FOLLOWER:
            self._restart_election_timer()
        if reads := self._reads.all():
            self._out.append(ReadFailed(reads))
        self.role, self.leader = RaftRole.FOLLOWER, leader
        self.peers, self._reads = {}, ReadIndex()
        self._transfer = self._notice_ms = None

    def _lead(self) -> None:
        self.role, self.leader = RaftRole.LEADER, self.me
        last = self.terms.last
        others = sorted((self.voters | self.members) - {self.me})
        self.peers = {node: Progress(next=last + 1) for node in others}
        self._heartbeat_ms = self._now + self.config.heartbeat_ms
        self._term_start = last + 1
        self._append_own((b"",))  # 6.4 and the erratum: nothing is known committed before an entry of the own term is

    def _begin_transfer(self) -> None:
        targets = [node for node in self.peers if node in self.voters]
        if not self.is_leader or not targets:
            return
        self._transfer = (self._successor(targets), self._now + self.config.election_timeout_ms)
        self._hand_over()

    def _successor(self, nodes: Iterable[NodeId]) -> NodeId:
        """Who should lead next: of those that answer, the one furthest along. In a quiet cluster a dead one is as far as any."""
        return max(sorted(nodes), key=lambda node: (self.peers[node].unanswered <= 1, self.peers[node].match))

    def _hand_over(self) -> None:
        if self._transfer is not None and self.peers[self._transfer[0]].match == self.terms.last:
            self._out.append(Send(self._transfer[0], TimeoutNow(self.term)))

    # -- replication, the leader's side (3.5, 10.2.1) ---------------------------------------------------------------

    def _append_own(self, payloads: tuple[bytes, ...]) -> None:
        first = Index(self.terms.last + 1)
        self.terms.extend(self.term, [len(payload) for payload in payloads])
        for at, voters in named_in(payloads).items():
            self.named.append(first + at, voters)
            self._meet_peers()  # 4.1: they count as soon as they are in the log
        self._persist(first=first, entries=tuple([Entry(self.term, payload) for payload in payloads]))
        for node, p in self.peers.items():
            self._replicate(node, p)

    def _replicate(self, node: NodeId, p: Progress) -> None:
        if p.next <= self.terms.base and not p.installing:
            p.installing = True
            self._out.append(SendSnapshot(node, self.term))
        while p.next <= self.terms.last and p.may_send(self.config):
            prev_term = self.terms.term(p.next - 1)
            assert prev_term is not None
            first = Index(p.next)
            last, size = self.terms.batch_end(first, APPEND_BYTES_MAX, APPEND_ENTRIES_MAX)
            if len(p.inflight) >= self.config.inflight_small_max and size < self.config.gather_bytes:
                break  # goes with what comes until one of those under way is acknowledged
            p.sent(last, size)
            if p.commit_sent < self.commit:
                p.commit_sent = max(p.commit_sent, min(self.commit, last))
            self._out.append(SendEntries(node, self.term, prev_term, first, last, self.commit, self._reads.round))

    def _heartbeat(self, node: NodeId, p: Progress, *, notice: bool = False, like: Append | None = None) -> Append:
        """An Append without entries just before `next`: where the follower lacks something, its answer says so. `like`: what
        another was sent just now; the same message where it would be an equal one."""
        prev = max(p.next - 1, self.terms.base)
        p.commit_sent = max(p.commit_sent, min(self.commit, p.next - 1))
        if like is None or like.prev_index != prev:
            prev_term = self.terms.term(prev)
            assert prev_term is not None
            like = Append(self.term, Index(prev), prev_term, self.commit, self._reads.round, notice=notice)
        self._out.append(Send(node, like))
        return like

    def _heartbeat_all(self) -> None:
        append: Append | None = None
        for node, p in self.peers.items():
            append = self._heartbeat(node, p, like=append)

    def _heeded(self, sender: NodeId, counts: bool, *, less: bool = False, index: Index = _NONE) -> Progress | None:
        """What is known of who answered, with whether its answers count. None: this node leads no more, or it is no member any
        more. Of one whose log turned out to be an old one nothing is known; `less`: it says that its log agrees up to `index`
        at most, which may be less than it had once."""
        p = self.peers.get(sender)
        if p is None:
            return None
        if not counts and (not p.silent or (less and index < p.match)):
            never = self.config.silent_heartbeats_max + 1
            p = self.peers[sender] = Progress(next=self.terms.last + 1, unanswered=never, silent=True)
        elif counts and p.silent:
            p.silent = False
        return p

    def _append_answered(self, sender: NodeId, p: Progress, answer: AppendAnswer) -> None:
        if not p.silent:
            p.unanswered = 0
            if answer.round > p.round:
                p.round = answer.round
            if self._reads.answered is not None and sender in self.voters:
                self._reads.heard(sender, self._others_needed())
        if answer.ok:
            p.acknowledged(answer.index)
            p.installing = p.installing and p.next <= self.terms.base
        else:
            p.rejected(answer, self.terms)
        if p.match > self.commit:
            self._advance_commit()
            if not self.is_leader:
                return
        if p.next <= self.terms.last:
            self._replicate(sender, p)
        if self._notice_ms is None and min(self.commit, p.match) > p.commit_sent:
            self._notice_ms = self._now + self.config.commit_notice_ms
        if self._reads.under_way is not None:
            self._finish_reads()
        if self._transfer is not None and sender == self._transfer[0]:
            self._hand_over()

    def _synced_by_majority(self) -> int:
        me, peers, voters = self.me, self.peers, self.named.now
        promised = [self.synced if node == me else 0 if peers[node].silent else peers[node].match for node in voters]
        return reached(promised, majority(len(voters)))

    def _advance_commit(self) -> None:
        index = self._synced_by_majority()
        # 3.6.2: only an entry of the own term is committed by counting; it takes those before it along.
        if index > self.commit and self.terms.term(index) == self.term:
            self._commit_to(index)
            if self._notice_ms is None and any(min(index, p.match) > p.commit_sent for p in self.peers.values()):
                self._notice_ms = self._now + self.config.commit_notice_ms
            if self._reads.waiting:
                self._begin_reads()
            if self.me not in self.named.now and self.commit >= self.named.index:
                self._resign()

    def _resign(self) -> None:
        """4.2.2: a leader that is no voter any more leads until that is committed; then the one furthest along takes over."""
        self._out.append(Send(self._successor(self.voters), TimeoutNow(self.term)))
        self._follow(self.term, None)

    def _commit_to(self, index: int) -> None:
        if index > self.commit:
            self.commit = Index(index)
            self._out.append(Committed(self.commit))

    def _meet_peers(self) -> None:
        """Of a leader: begin with who is new, end with who is gone."""
        if self.is_leader:
            wanted = (self.voters | self.members) - {self.me}
            for node in sorted(wanted - self.peers.keys()):
                self.peers[node] = Progress(next=self.terms.last + 1)
                self._heartbeat(node, self.peers[node])
            self.peers = {node: p for node, p in self.peers.items() if node in wanted}

    # -- replication, the follower's side (3.5) ---------------------------------------------------------------------

    def _appended(self, sender: NodeId, append: Append) -> None:
        assert not self.is_leader, f"{sender} and {self.me} both lead term {self.term}"
        if self.role is not RaftRole.FOLLOWER:
            self._follow(self.term, sender)
        self.leader, self._heard_ms = sender, self._now
        self._restart_election_timer()
        if self.copying:
            self._use_up_vote(sender)
        append = self._behind_base(append)
        agrees = self.terms.term(append.prev_index) == append.prev_term
        if self.halted and not self.copying:  # goes on learning and applying what it has, and acknowledges nothing
            if agrees:
                self._commit_to(min(append.commit, append.prev_index))
            return
        if not agrees:
            hint, hint_term = self.terms.last_agreeing(append.prev_index, append.prev_term)
            self._answer(sender, AppendAnswer(self.term, False, append.prev_index, append.round, hint, hint_term))
            return
        new = self._take_over(append)
        if new is None:
            return
        last = append.prev_index + len(append.entries)
        if new:
            first = Index(last - len(new) + 1)
            answer = AppendAnswer(self.term, True, Index(last), append.round)
            self._persist(Send(sender, answer), first=first, entries=new)
        elif not append.notice:
            self._answer(sender, AppendAnswer(self.term, True, Index(min(last, self.synced)), append.round))
        self._commit_to(min(append.commit, last))

    def _use_up_vote(self, leader: NodeId) -> None:
        """Its log being an old one, it may have voted in this term, and have forgotten."""
        if self.voted_for is None:
            self.voted_for, self._hard_dirty = leader, True

    def _behind_base(self, append: Append) -> Append:
        """An append that came late, without what a snapshot covers: that is committed, so every leader's log agrees there."""
        known = self.terms.base - append.prev_index
        if known <= 0:
            return append
        rest = append.entries[known:]
        return Append(append.term, self.terms.base, self.terms.base_term, append.commit, append.round, rest)

    def _take_over(self, append: Append) -> tuple[Entry, ...] | None:
        """Bring the log's terms in line with `append`; returns the entries to store, None if the disk is too far behind."""
        named = named_in([entry.payload for entry in append.entries])
        for at, entry in enumerate(append.entries):
            index = append.prev_index + 1 + at
            mine = self.terms.term(index)
            if mine == entry.term:
                continue
            if self._seq - self._saved_seq >= self.config.persists_max:
                return None
            if mine is not None:
                assert index > self.commit, f"{index} is committed ({self.commit}) and would be replaced"
                self.terms.truncate(index)
                self.named.truncate(index)
                self.synced = Index(min(self.synced, index - 1))
                self._unsynced = deque((seq, min(last, index - 1)) for seq, last in self._unsynced)
            new = append.entries[at:]
            for term, entries in groupby(new, _term):
                self.terms.extend(term, [len(entry.payload) for entry in entries])
            for place, voters in named.items():
                if place >= at:
                    self.named.append(append.prev_index + 1 + place, voters)
            return new
        return ()

    # -- snapshots (5.1) --------------------------------------------------------------------------------------------

    def _offered_snapshot(self, sender: NodeId, offer: Install) -> None:
        assert not self.is_leader, f"{sender} and {self.me} both lead term {self.term}"
        if self.role is not RaftRole.FOLLOWER:
            self._follow(self.term, sender)
        self.leader, self._heard_ms = sender, self._now
        self._restart_election_timer()
        if self.copying:
            self._use_up_vote(sender)
        elif self.halted:
            return
        if offer.index <= self.commit:
            self._answer(sender, InstallAnswer(self.term, Index(min(offer.index, self.synced)), offer.size, True))
        else:
            self._out.append(TakeInstall(sender, offer))

    def _install_answered(self, sender: NodeId, p: Progress, answer: InstallAnswer) -> None:
        if not p.silent:
            p.unanswered = 0
        self._out.append(InstallAnswered(sender, answer))
        if answer.done:
            p.installed(answer.index)
            self._advance_commit()
            if self.is_leader:
                self._replicate(sender, p)

    def _installed(self, event: Installed) -> None:
        then = Send(event.sender, InstallAnswer(self.term, event.index, 0, True))
        if event.index <= self.commit or self.terms.term(event.index) == event.term:
            self._commit_to(event.index)  # it came by appends meanwhile
            then = Send(event.sender, InstallAnswer(self.term, Index(min(event.index, self.synced)), 0, True))
            self._persist(then)
            return
        assert not self.is_leader, f"{self.me} leads without entry {event.index}, which is committed"
        self.terms.reset(event.index, event.term)
        self.named = Voters(event.voters, event.voters_index)
        self.commit = self.synced = event.index
        self._unsynced.clear()
        self._persist(then, anew=event.index)

    # -- reads (6.4) ------------------------------------------------------------------------------------------------

    def _read(self, read: int) -> None:
        if not self.is_leader:
            self._out.append(ReadFailed((read,)))
            return
        self._reads.add(read)
        self._begin_reads()

    def _begin_reads(self) -> None:
        if self.commit >= self._term_start and self._reads.begin(self.commit):
            self._ask_round()
            self._finish_reads()

    def _others_needed(self) -> int:
        """How many voters make a majority with this one."""
        return majority(len(self.voters)) - (self.me in self.voters)

    def _ask_round(self) -> None:
        """Whoever has yet to hear what is committed is asked too: who asked may wait for that."""
        needed = self._others_needed()
        quick = self._reads.quick(self.voters, needed)
        if len(quick) < needed:
            self._heartbeat_all()
            return
        self._reads.ask_all_ms = self._now + self.config.read_wait_ms
        append: Append | None = None
        for node, p in self.peers.items():
            if node in quick or min(self.commit, p.match) > p.commit_sent:
                append = self._heartbeat(node, p, like=append)

    def _finish_reads(self) -> None:
        if self._reads.under_way is None:
            return
        me, peers, voters, round_ = self.me, self.peers, self.voters, self._reads.round
        rounds = [round_ if node == me else peers[node].round for node in voters]
        if reached(rounds, majority(len(voters))) >= round_:
            index, reads = self._reads.finish()
            self._out.append(ReadReady(reads, index))
            self._begin_reads()

    # -- durability (3.8) -------------------------------------------------------------------------------------------

    def _persist(
        self, *then: Send, first: Index = _NONE, entries: tuple[Entry, ...] = (), anew: Index | None = None
    ) -> None:
        self._seq += 1
        hard = HardState(self.term, self.voted_for) if self._hard_dirty else None
        if hard is not None:
            self._hard_dirty, self._hard_seq = False, self._seq
        if entries:
            self._unsynced.append((self._seq, first + len(entries) - 1))
        self._out.append(Persist(self._seq, hard, first, entries, then, anew))

    def _answer(self, to: NodeId, message: RaftMessage) -> None:
        """Send now if the term and vote that the answer speaks of are synced, else behind their sync."""
        if not self._hard_dirty and self._hard_seq <= self._saved_seq:
            self._out.append(Send(to, message))
        elif self._hard_dirty or self._seq - self._saved_seq < self.config.persists_max:
            self._persist(Send(to, message))

    def _persisted(self, seq: int) -> None:
        self._saved_seq = seq
        while self._unsynced and self._unsynced[0][0] <= seq:
            self.synced = Index(max(self.synced, self._unsynced.popleft()[1]))
        if self.role is RaftRole.CANDIDATE and seq >= self._vote_seq:
            self._count_vote(self.me)
        elif self.role is RaftRole.LEADER and self.synced > self.commit:
            self._advance_commit()

    def _broadcast(self, message: RaftMessage) -> None:
        self._out.extend(Send(node, message) for node in sorted(self.voters - {self.me}))

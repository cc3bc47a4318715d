# One rule of the Raft thesis a test, with its section; on single cores, or on a quiet world.
from __future__ import annotations

import random

import pytest

from idunno.base.errors import InvalidArgument
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import events as e
from idunno.consensus.config import RaftConfig
from idunno.consensus.messages import (
    APPEND_BYTES_MAX,
    Append,
    AppendAnswer,
    Entry,
    TimeoutNow,
    VoteAnswer,
    VoteRequest,
)
from idunno.consensus.quorum import grants_vote, majority, reached
from idunno.consensus.raft import Raft
from idunno.consensus.terms import Terms
from idunno.consensus.voters import Voters
from tests.unit.consensus.world import CONFIG, World

ME, A, B, C, D = (NodeId(name) for name in ("me", "a", "b", "c", "d"))
LATE = 100_000  # ms: any election timeout is over


def core(
    *log_terms: int, voters: tuple[NodeId, ...] = (ME, A, B), learners: tuple[NodeId, ...] = (), term: int = 0
) -> Raft:
    terms = Terms()
    for t in log_terms:
        terms.append(Term(t), 10)
    hard = e.HardState(Term(max([term, *log_terms])))
    return Raft(ME, Voters(voters), {*voters, *learners}, terms, hard, CONFIG, random.Random(1), 0)


def lead(raft: Raft, now_ms: int = LATE) -> list[e.Output]:
    """Bring it through an election; the no-op is appended and not synced."""
    raft.handle(e.Tick(), now_ms)
    if raft.role is e.RaftRole.PRE_CANDIDATE:
        for voter in sorted(raft.voters - {ME}):
            raft.handle(e.Received(voter, VoteAnswer(Term(raft.term + 1), True, pre=True)), now_ms)
    outputs = raft.handle(e.Persisted(raft._seq), now_ms)
    for voter in sorted(raft.voters - {ME}):
        outputs += raft.handle(e.Received(voter, VoteAnswer(raft.term, True)), now_ms)
    assert raft.is_leader
    return outputs


def ack(raft: Raft, sender: NodeId, index: int, now_ms: int = LATE, round_: int = 0) -> list[e.Output]:
    return raft.handle(e.Received(sender, AppendAnswer(raft.term, True, Index(index), round_)), now_ms)


def sync(raft: Raft, now_ms: int = LATE) -> list[e.Output]:
    return raft.handle(e.Persisted(raft._seq), now_ms)


def of(kind: type[e.Output], outputs: list[e.Output]) -> list[e.Output]:
    return [output for output in outputs if isinstance(output, kind)]


def append(term: int, prev: tuple[int, int], *entries: int, commit: int = 0) -> Append:
    new = tuple(Entry(Term(t), b"%d" % t) for t in entries)
    return Append(Term(term), Index(prev[0]), Term(prev[1]), Index(commit), 0, new)


# -- elections ---------------------------------------------------------------------------------------------------------


def test_3_4_a_follower_that_hears_no_leader_stands_and_one_that_does_will_not() -> None:
    raft = core(1)
    raft.handle(e.Received(A, append(1, (1, 1))), 900)
    assert raft.handle(e.Tick(), 1_800) == []  # heard 900 ms ago: at least 1,000 are needed
    asked = of(e.Send, raft.handle(e.Tick(), LATE))
    assert asked == [e.Send(n, VoteRequest(Term(2), Index(1), Term(1), pre=True)) for n in (A, B)]


def test_9_6_pre_vote_changes_neither_term_nor_vote() -> None:
    raft = core(1)
    raft.handle(e.Tick(), LATE)
    assert (raft.term, raft.voted_for, raft.role) == (1, None, e.RaftRole.PRE_CANDIDATE)
    answer = raft.handle(e.Received(A, VoteRequest(Term(2), Index(1), Term(1), pre=True)), LATE)
    assert answer == [e.Send(A, VoteAnswer(Term(2), True, pre=True))]
    assert (raft.term, raft.voted_for) == (1, None)


def test_9_6_a_pre_vote_that_nobody_heard_is_asked_again_soon() -> None:
    world = World(3, seed=12)
    world.split(*([name] for name in world.nodes))
    world.run(5_000)
    world.heal()
    world.run(2 * CONFIG.heartbeat_ms + 50)
    assert world.leader() is not None


def test_9_6_a_node_without_a_majority_never_raises_its_term() -> None:
    world = World(3, seed=3)
    leader = world.elect()
    term = world.core(leader).term
    alone = next(n for n in world.nodes if n != leader)
    world.split([alone], [n for n in world.nodes if n != alone])
    world.run(60_000)
    world.heal()
    world.run(5_000)
    assert world.leader() == leader  # its return disturbs nobody
    assert world.core(leader).term == term


def test_4_2_3_a_node_that_hears_a_leader_ignores_a_candidate_and_its_term() -> None:
    raft = core(1)
    raft.handle(e.Received(A, append(1, (1, 1))), LATE)
    assert raft.handle(e.Received(B, VoteRequest(Term(9), Index(9), Term(8))), LATE + 500) == []
    assert raft.term == 1


def test_3_8_a_vote_leaves_only_behind_its_sync() -> None:
    raft = core(1)
    outputs = raft.handle(e.Received(A, VoteRequest(Term(2), Index(1), Term(1))), LATE)
    [persist] = of(e.Persist, outputs)
    assert isinstance(persist, e.Persist)
    assert persist.hard == e.HardState(Term(2), A)
    assert persist.then == (e.Send(A, VoteAnswer(Term(2), True)),)
    assert of(e.Send, outputs) == []


def test_3_8_a_repeated_answer_waits_for_the_same_sync() -> None:
    raft = core(1)
    request = e.Received(A, VoteRequest(Term(2), Index(1), Term(1)))
    raft.handle(request, LATE)
    assert of(e.Send, raft.handle(request, LATE)) == []
    sync(raft)
    assert raft.handle(request, LATE) == [e.Send(A, VoteAnswer(Term(2), True))]


def test_3_8_the_own_vote_counts_when_it_is_synced() -> None:
    raft = core(1)
    raft.handle(e.Tick(), LATE)
    raft.handle(e.Received(A, VoteAnswer(Term(2), True, pre=True)), LATE)
    raft.handle(e.Received(A, VoteAnswer(Term(2), True)), LATE)
    raft.handle(e.Received(B, VoteAnswer(Term(2), True)), LATE)
    assert not raft.is_leader
    sync(raft)
    assert raft.is_leader


def test_3_4_one_vote_a_term() -> None:
    raft = core(1)
    raft.handle(e.Received(A, VoteRequest(Term(2), Index(1), Term(1))), LATE)
    [persist] = of(e.Persist, raft.handle(e.Received(B, VoteRequest(Term(2), Index(5), Term(1))), LATE))
    assert isinstance(persist, e.Persist)
    assert persist.then == (e.Send(B, VoteAnswer(Term(2), False)),)


@pytest.mark.parametrize(
    ("mine", "theirs", "granted"),
    [((2, 5), (3, 1), True), ((3, 1), (2, 5), False), ((2, 5), (2, 5), True), ((2, 5), (2, 4), False)],
)
def test_3_6_1_only_a_log_as_long_and_late_as_mine_gets_my_vote(
    mine: tuple[int, int], theirs: tuple[int, int], granted: bool
) -> None:
    assert grants_vote(mine, theirs, None, A) is granted
    assert not grants_vote(mine, theirs, B, A)


def test_a_learner_never_stands() -> None:
    raft = core(1, voters=(A, B, C), learners=(ME,))
    assert of(e.Send, raft.handle(e.Tick(), LATE)) == []


@pytest.mark.parametrize("voters", [(ME, A, B), (A, B, C)])
def test_4_2_2_a_vote_is_given_whoever_votes_by_the_own_log_since_the_askers_may_be_ahead(
    voters: tuple[NodeId, ...],
) -> None:
    raft = core(1, voters=voters)
    [persist] = of(e.Persist, raft.handle(e.Received(D, VoteRequest(Term(2), Index(1), Term(1))), LATE))
    assert isinstance(persist, e.Persist)
    assert persist.then == (e.Send(D, VoteAnswer(Term(2), True)),)


def test_6_4_a_new_leader_begins_with_a_no_op() -> None:
    raft = core(1)
    [persist] = of(e.Persist, lead(raft))
    assert isinstance(persist, e.Persist)
    assert (persist.first, persist.entries) == (2, (Entry(raft.term, b""),))


def test_a_closed_connection_to_the_leader_starts_an_election_at_once() -> None:
    world = World(3, seed=5)
    old = world.elect()
    world.run(1_000)
    began = world.now_ms
    world.crash(old)
    for name in world.up():
        world.step(name, e.PeerLost(old))
    world.elect()
    assert world.now_ms - began < 300  # the chance delay, two round trips, two syncs


def test_6_2_a_leader_without_a_majority_steps_down_after_one_election_timeout() -> None:
    world = World(3, seed=8)
    old = world.elect()
    world.split([old], [n for n in world.nodes if n != old])
    began = world.now_ms
    world.run_until(lambda: not world.core(old).is_leader)
    assert world.now_ms - began <= CONFIG.election_timeout_ms + 2 * CONFIG.heartbeat_ms


def test_3_3_a_leader_of_an_older_term_is_told_and_steps_down() -> None:
    raft = core(1, term=5)
    [answer] = raft.handle(e.Received(A, append(3, (1, 1))), 10)
    assert answer == e.Send(A, AppendAnswer(Term(5), False, Index(1), 0))
    old = core(1)
    lead(old)
    old.handle(e.Received(A, AppendAnswer(Term(9), False, Index(1), 0)), LATE)
    assert (old.role, old.term, old.voted_for) == (e.RaftRole.FOLLOWER, 9, None)


def test_3_10_leadership_is_handed_over_to_who_has_everything() -> None:
    world = World(3, seed=2)
    old = world.elect()
    world.propose(old, b"x")
    world.step(old, e.Transfer())
    began = world.now_ms
    world.run_until(lambda: world.leader() not in (None, old))
    assert world.now_ms - began < 200
    assert not world.core(old).is_leader


def test_3_10_a_transfer_that_fails_ends_and_the_leader_leads_on() -> None:
    raft = core(1)
    lead(raft)
    raft.handle(e.Transfer(), LATE)
    assert not raft.accepts_proposals
    for late in range(150, 1_200, 150):
        raft.handle(e.Tick(), LATE + late)
        ack(raft, A, 1, LATE + late)
    assert raft.accepts_proposals


def test_3_10_leadership_goes_to_a_voter_that_answers_though_a_dead_one_is_as_far() -> None:
    raft = core(1)
    lead(raft)
    for voter in (A, B):
        ack(raft, voter, 2)
    for late in range(150, 600, 150):
        raft.handle(e.Tick(), LATE + late)
        ack(raft, B, 2, LATE + late)
    [order] = of(e.Send, raft.handle(e.Transfer(), LATE + 600))
    assert order == e.Send(B, TimeoutNow(raft.term))


def test_3_10_timeout_now_of_an_older_term_does_nothing() -> None:
    raft = core(1, term=5)
    assert raft.handle(e.Received(A, TimeoutNow(Term(4))), 10) == []
    assert raft.term == 5


# -- replication -------------------------------------------------------------------------------------------------------


def test_3_5_an_append_is_acknowledged_only_behind_its_sync() -> None:
    raft = core(1)
    outputs = raft.handle(e.Received(A, append(1, (1, 1), 1, 1)), 10)
    [persist] = of(e.Persist, outputs)
    assert isinstance(persist, e.Persist)
    assert persist.then == (e.Send(A, AppendAnswer(Term(1), True, Index(3), 0)),)
    assert of(e.Send, outputs) == []


def test_3_5_a_heartbeat_acknowledges_only_what_is_synced() -> None:
    raft = core(1)
    raft.handle(e.Received(A, append(1, (1, 1), 1, 1)), 10)
    assert raft.handle(e.Received(A, append(1, (3, 1))), 20) == [e.Send(A, AppendAnswer(Term(1), True, Index(1), 0))]
    sync(raft, 30)
    assert raft.handle(e.Received(A, append(1, (3, 1))), 40) == [e.Send(A, AppendAnswer(Term(1), True, Index(3), 0))]


def test_3_5_a_gap_is_refused_with_a_hint() -> None:
    raft = core(1, 1, 3)
    [answer] = [m for m in raft.handle(e.Received(A, append(5, (9, 5))), 10) if isinstance(m, e.Persist)]
    assert answer.then == (e.Send(A, AppendAnswer(Term(5), False, Index(9), 0, Index(3), Term(3))),)


def test_3_5_a_conflict_replaces_the_suffix_and_a_repetition_does_not() -> None:
    raft = core(1, 2, 2, 2)
    [persist] = of(e.Persist, raft.handle(e.Received(A, append(3, (1, 1), 2, 3)), 10))
    assert isinstance(persist, e.Persist)
    assert (persist.first, [x.term for x in persist.entries]) == (3, [3])
    assert raft.terms.last == 3
    sync(raft, 20)
    assert raft.handle(e.Received(A, append(3, (1, 1), 2, 3)), 30) == [
        e.Send(A, AppendAnswer(Term(3), True, Index(3), 0))
    ]


def test_3_5_an_old_append_that_arrives_late_cuts_nothing() -> None:
    raft = core(1)
    raft.handle(e.Received(A, append(1, (1, 1), 1, 1, 1)), 10)
    raft.handle(e.Received(A, append(1, (1, 1), 1)), 20)
    assert raft.terms.last == 4


def test_what_is_synced_shrinks_with_a_cut_and_an_older_sync_does_not_raise_it() -> None:
    raft = core(1)
    raft.handle(e.Received(A, append(1, (1, 1), 1, 1, 1)), 10)  # 2..4, its sync under way
    raft.handle(e.Received(B, append(2, (2, 1), 2)), 20)  # replaces 3..4
    raft.handle(e.Persisted(1), 30)
    assert raft.synced == 2


def test_10_2_1_appends_are_pipelined_within_bounds() -> None:
    raft = core(1)
    lead(raft)
    ack(raft, A, 2)

    def sent(outputs: list[e.Output]) -> list[tuple[int, int]]:
        return [(o.first, o.last) for o in outputs if isinstance(o, e.SendEntries) and o.to == A]

    assert [sent(raft.handle(e.Propose((b"x",)), LATE)) for _ in range(4)] == [[(3, 3)], [(4, 4)], [], []]
    assert sent(ack(raft, A, 3)) == [(5, 6)]  # small ones gather while two are under way
    for _ in range(10):
        raft.handle(e.Propose((bytes(APPEND_BYTES_MAX),)), LATE)
    assert raft.peers[A].inflight_bytes <= CONFIG.inflight_bytes_max + APPEND_BYTES_MAX


def test_3_5_lost_appends_are_sent_again_after_a_heartbeat_shows_the_gap() -> None:
    world = World(3, seed=4)
    leader = world.elect()
    world.run(500)
    follower = next(n for n in world.nodes if n != leader)
    world.swallows = lambda _, message: isinstance(message, Append) and bool(message.entries)
    for number in range(5):
        world.propose(leader, b"%d" % number)
    world.swallows = lambda _, message: False
    world.run(2 * CONFIG.heartbeat_ms + 50)
    assert len(world.nodes[follower].store.entries) == len(world.nodes[leader].store.entries) == 7


def test_3_6_2_an_entry_of_an_older_term_is_not_committed_by_counting() -> None:
    raft = core(1, 1, 1)
    lead(raft)
    assert of(e.Committed, sync(raft) + ack(raft, A, 3)) == []
    assert of(e.Committed, ack(raft, A, 4)) == [e.Committed(Index(4))]  # its own no-op takes the others along


def test_the_leaders_own_log_counts_only_when_it_is_synced() -> None:
    raft = core(1, voters=(ME, A, B))
    lead(raft)
    assert of(e.Committed, ack(raft, A, 2)) == []
    assert of(e.Committed, sync(raft)) == [e.Committed(Index(2))]


def test_a_learner_is_replicated_to_and_counts_as_a_copy_but_not_for_commit() -> None:
    raft = core(1, voters=(ME, A, B), learners=(C,))
    assert [o.to for o in lead(raft) if isinstance(o, e.SendEntries)] == [A, B, C]
    sync(raft)
    assert of(e.Committed, ack(raft, C, 2)) == []
    assert raft.copies() == [2, 2, 0, 0]
    ack(raft, A, 2)
    assert (raft.commit, raft.copies()) == (2, [2, 2, 2, 0])


def test_learners_come_and_go_while_it_leads() -> None:
    raft = core(1)
    lead(raft)
    assert [o.to for o in raft.handle(e.SetMembers(frozenset({ME, A, B, C})), LATE) if isinstance(o, e.Send)] == [C]
    raft.handle(e.SetMembers(frozenset({ME, A, B})), LATE)
    assert sorted(raft.peers) == [A, B]


def test_a_new_learner_with_an_empty_log_catches_up() -> None:
    world = World(3, seed=6, learners=1)
    late = world.learners[0]
    world.crash(late)
    world.nodes[late].store.entries = []
    leader = world.elect()
    for number in range(20):
        world.propose(leader, b"%d" % number)
    world.run(500)
    world.start(late)
    world.run(1_000)
    assert world.nodes[late].applied == world.chosen


def test_followers_hear_of_a_commit_without_waiting_for_a_heartbeat() -> None:
    world = World(3, seed=9)
    leader = world.elect()
    world.run(500)
    world.propose(leader, b"x")
    world.run(50)
    assert all(node.applied[-1].payload == b"x" for node in world.nodes.values())


# -- reads -------------------------------------------------------------------------------------------------------------


def test_6_4_a_read_waits_for_the_no_op_of_the_own_term() -> None:
    raft = core(1)
    lead(raft)
    sync(raft)
    assert of(e.ReadReady, raft.handle(e.Read(1), LATE)) == []
    ack(raft, A, 2)  # commits the no-op, begins the round
    assert of(e.ReadReady, ack(raft, A, 2, round_=1)) == [e.ReadReady((1,), Index(2))]


def test_6_4_one_round_answers_all_reads_that_waited_when_it_began_and_no_later_one() -> None:
    raft = core(1)
    lead(raft)
    sync(raft)
    ack(raft, A, 2)
    assert len(of(e.Send, raft.handle(e.Read(1), LATE))) == 2  # a round begins
    assert raft.handle(e.Read(2), LATE) == raft.handle(e.Read(3), LATE) == []
    assert of(e.ReadReady, ack(raft, A, 2, round_=1)) == [e.ReadReady((1,), Index(2))]
    assert of(e.ReadReady, ack(raft, B, 2, round_=1)) == []
    assert of(e.ReadReady, ack(raft, B, 2, round_=2)) == [e.ReadReady((2, 3), Index(2))]


def asked(outputs: list[e.Output]) -> list[NodeId]:
    return sorted(output.to for output in outputs if isinstance(output, e.Send) and isinstance(output.message, Append))


def quick_leader() -> Raft:
    """Of five voters and a learner; A and B were the first to answer its last heartbeat, and all know what is committed."""
    raft = core(1, voters=(ME, A, B, C, D), learners=(NodeId("learner"),))
    lead(raft)
    sync(raft)
    for node in raft.peers:
        ack(raft, node, 2)
    now_ms = LATE + CONFIG.heartbeat_ms
    assert len(set(asked(raft.handle(e.Tick(), now_ms)))) == 5  # tells all of the commit, too
    for node in (NodeId("learner"), A, B, C, D):
        ack(raft, node, 2, now_ms)
    return raft


def test_6_4_a_read_asks_those_that_were_quick_of_late_and_all_when_they_are_silent() -> None:
    raft, now_ms = quick_leader(), LATE + CONFIG.heartbeat_ms + 1
    assert asked(raft.handle(e.Read(1), now_ms)) == [A, B]
    assert of(e.ReadReady, ack(raft, A, 2, now_ms, round_=1)) == []  # two of five have spoken
    assert raft.deadline_ms() == now_ms + CONFIG.read_wait_ms
    assert len(asked(raft.handle(e.Tick(), now_ms + CONFIG.read_wait_ms))) == 5
    assert of(e.ReadReady, ack(raft, NodeId("learner"), 2, now_ms, round_=1)) == []
    assert of(e.ReadReady, ack(raft, D, 2, now_ms, round_=1)) == [e.ReadReady((1,), Index(2))]
    assert raft.deadline_ms() > now_ms + CONFIG.read_wait_ms


def test_6_4_who_has_yet_to_hear_of_a_commit_hears_it_with_the_round_of_a_read() -> None:
    raft, now_ms = quick_leader(), LATE + CONFIG.heartbeat_ms + 1
    raft.handle(e.Propose((b"x",)), now_ms)
    sync(raft, now_ms)
    for node in (A, B, C):
        ack(raft, node, 3, now_ms)
    assert asked(raft.handle(e.Read(1), now_ms)) == [A, B, C]  # D has not acknowledged entry 3: it could not apply it


def test_6_4_no_voter_counts_as_quick_before_it_answered_a_heartbeat_or_when_it_votes_no_more() -> None:
    raft = core(1, voters=(ME, A, B, C, D))
    lead(raft)
    sync(raft)
    for node in raft.peers:
        ack(raft, node, 2)
    assert asked(raft.handle(e.Read(1), LATE)) == [A, B, C, D]
    raft, now_ms = quick_leader(), LATE + CONFIG.heartbeat_ms + 1
    raft.handle(e.ChangeVoters(frozenset({ME, B, C, D})), now_ms)
    assert set(asked(raft.handle(e.Read(2), now_ms))) >= {B, C, D}


def test_6_4_a_read_at_a_leader_that_is_deposed_fails() -> None:
    raft = core(1)
    lead(raft)
    raft.handle(e.Read(1), LATE)
    outputs = raft.handle(e.Received(A, append(9, (1, 1))), LATE)
    assert of(e.ReadFailed, outputs) == [e.ReadFailed((1,))]
    assert raft.handle(e.Read(2), LATE) == [e.ReadFailed((2,))]


def test_6_4_a_partitioned_leader_answers_no_read() -> None:
    world = World(3, seed=11)
    old = world.elect()
    others = [n for n in world.nodes if n != old]
    world.split([old], others)
    stale = world.read(old)
    world.run_until(lambda: world.leader() in others)
    new = world.leader()
    assert new is not None
    world.propose(new, b"newer")
    world.run(2_000)
    assert world.reads[stale] is None
    fresh = world.read(new)
    world.run(100)
    index = world.reads[fresh]
    assert index is not None
    assert world.chosen[index - 1].payload == b"newer"


def test_a_single_voter_leads_commits_and_reads_alone() -> None:
    raft = core(1, voters=(ME,))
    raft.handle(e.Tick(), 0)
    sync(raft, 1)
    assert raft.is_leader
    assert of(e.Committed, sync(raft, 2)) == [e.Committed(Index(2))]
    assert raft.handle(e.Read(7), 3) == [e.ReadReady((7,), Index(2))]


# -- a node that cannot keep a promise -----------------------------------------------------------------------------------


def test_a_halted_leader_steps_down_and_a_halted_follower_is_silent_but_goes_on_applying() -> None:
    raft = core(1)
    lead(raft)
    raft.handle(e.Halt(True), LATE)
    assert not raft.is_leader
    follower = core(1, 1)
    follower.handle(e.Halt(True), 0)
    assert follower.handle(e.Received(A, append(1, (2, 1), 1, commit=2)), 10) == [
        e.Committed(Index(2)),
        e.RoleChanged(e.RaftRole.FOLLOWER, Term(1), A),
    ]
    assert follower.handle(e.Received(B, VoteRequest(Term(2), Index(9), Term(1))), LATE) == []
    assert of(e.Send, follower.handle(e.Tick(), LATE)) == []


def test_promises_that_wait_for_a_dead_disk_are_bounded() -> None:
    raft = core(1)
    for number in range(3_000):
        raft.handle(e.Received(A, append(2, (number + 1, 2 if number else 1), 2)), 10)
    assert raft._seq - raft._saved_seq <= CONFIG.persists_max + 1


# -- the small rules -----------------------------------------------------------------------------------------------------


def test_majority_and_reached() -> None:
    assert [majority(n) for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 2, 3, 3, 4]
    assert reached([5, 3, 9], 2) == 5
    assert reached([5], 2) == 0


def test_a_configuration_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least 450"):
        RaftConfig(election_timeout_ms=200)


def test_where_two_logs_may_still_agree() -> None:
    raft = core(1, 1, 4, 4, 7)
    assert raft.terms.last_agreeing(5, 5) == (4, 4)
    assert raft.terms.last_agreeing(9, 9) == (5, 7)
    assert raft.terms.last_agreeing(5, 3) == (2, 1)
    assert raft.terms.last_agreeing(5, 0) == (0, 0)


def test_a_notice_of_a_commit_is_answered_only_by_who_lacks_something() -> None:
    raft = core(1)
    raft.handle(e.Received(A, append(1, (1, 1), 1, 1)), 10)  # 2..3
    sync(raft)
    notice = Append(Term(1), Index(3), Term(1), Index(3), 0, notice=True)
    outputs = raft.handle(e.Received(A, notice), 20)
    assert raft.commit == 3
    assert of(e.Send, outputs) == []
    further = Append(Term(1), Index(5), Term(1), Index(5), 0, notice=True)
    answers = [output.message for output in raft.handle(e.Received(A, further), 30) if isinstance(output, e.Send)]
    assert [(answer.ok, answer.index) for answer in answers if isinstance(answer, AppendAnswer)] == [(False, 5)]

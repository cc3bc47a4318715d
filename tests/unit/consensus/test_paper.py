# More rules of the Raft thesis, one a test, with the section: what test_raft.py and test_membership.py leave out.
from __future__ import annotations

import random

import pytest

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import events as e
from idunno.consensus.messages import AppendAnswer, Install, InstallAnswer, TimeoutNow, VoteAnswer, VoteRequest
from idunno.consensus.raft import Raft
from idunno.consensus.terms import Terms
from idunno.consensus.voters import Voters
from tests.unit.consensus.test_raft import LATE, A, B, ack, append, core, lead, of, sync
from tests.unit.consensus.world import CONFIG, World

ME = NodeId("me")


@pytest.mark.parametrize(
    "message",
    [
        VoteRequest(Term(9), Index(1), Term(1)),
        VoteAnswer(Term(9), False),
        append(9, (1, 1)),
        AppendAnswer(Term(9), False, Index(1), 0),
        TimeoutNow(Term(9)),
        Install(Term(9), Index(5), Term(8), 10, 0, b"x"),
        InstallAnswer(Term(9), Index(5), 0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_3_3_a_higher_term_in_any_message_ends_a_candidacy_or_leadership(message: object) -> None:
    raft = core(1)
    raft.handle(e.Tick(), LATE)
    raft.handle(e.Received(B, VoteAnswer(Term(2), True, pre=True)), LATE)
    assert raft.role is e.RaftRole.CANDIDATE
    raft.handle(e.Received(A, message), LATE)  # type: ignore[arg-type]
    assert raft.term >= 9
    assert not raft.is_leader
    raft.handle(e.Received(B, VoteAnswer(Term(2), True)), LATE)  # a vote of the old term counts for nothing
    sync(raft)
    assert not raft.is_leader


def test_3_3_a_vote_asked_for_in_an_older_term_is_refused_with_the_own() -> None:
    raft = core(1, term=5)
    [answer] = raft.handle(e.Received(A, VoteRequest(Term(4), Index(9), Term(4))), LATE)
    assert answer == e.Send(A, VoteAnswer(Term(5), False))
    assert raft.voted_for is None


def test_3_4_a_candidate_that_hears_the_leader_of_its_term_follows_it() -> None:
    raft = core(1)
    raft.handle(e.Tick(), LATE)
    raft.handle(e.Received(B, VoteAnswer(Term(2), True, pre=True)), LATE)
    sync(raft)
    raft.handle(e.Received(A, append(2, (1, 1))), LATE)
    assert (raft.role, raft.leader, raft.term, raft.voted_for) == (e.RaftRole.FOLLOWER, A, 2, ME)


def test_3_4_timeouts_are_drawn_anew_for_every_election_and_differ() -> None:
    raft, drawn = core(1), set()
    for number in range(1, 40):
        raft.handle(e.Received(A, append(1, (1, 1))), number * 10_000)
        drawn.add(raft.deadline_ms() - number * 10_000)
    low, high = CONFIG.election_timeout_ms, CONFIG.election_ms_max
    assert all(low <= after < high for after in drawn)
    assert len(drawn) > 30


def test_3_4_a_candidate_without_a_majority_begins_another_election() -> None:
    world = World(3, seed=4)
    world.swallows = lambda _, message: isinstance(message, VoteAnswer) and not message.pre
    world.run(4_000)
    tried = max(world.core(name).term for name in world.nodes)
    assert tried >= 3
    assert not world.leaders
    world.swallows = lambda _, message: False
    world.elect()


def test_3_5_a_follower_commits_no_further_than_it_knows_its_log_to_agree() -> None:
    raft = core(1, 1, 1, 1)  # entries 3 and 4 may be another leader's
    outputs = raft.handle(e.Received(A, append(2, (2, 1), commit=4)), 10)
    assert of(e.Committed, outputs) == [e.Committed(Index(2))]


def test_3_5_a_leader_never_changes_what_is_in_its_log() -> None:
    raft = core(1, 1, 1)
    lead(raft)
    before = [raft.terms.term(index) for index in range(1, 5)]
    for message in (append(1, (1, 1), 1), AppendAnswer(raft.term, False, Index(3), 0, Index(0), Term(0))):
        outputs = raft.handle(e.Received(A, message), LATE)
        assert [o for o in outputs if isinstance(o, e.Persist) and o.entries] == []
    assert [raft.terms.term(index) for index in range(1, 5)] == before


def test_3_5_a_leader_finds_where_two_logs_agree_in_as_many_steps_as_there_are_terms() -> None:
    raft = core(1, *[2] * 50, *[4] * 50)
    lead(raft)
    # The follower has 80 entries of term 3 behind the first 21.
    theirs = Terms()
    for term in (1, *[2] * 20, *[3] * 80):
        theirs.append(Term(term), 10)
    steps = 0
    while raft.peers[A].probing and steps < 10:
        at = raft.peers[A].next - 1
        if theirs.term(at) == raft.terms.term(at):
            ack(raft, A, at)
            break
        hint, hint_term = theirs.last_agreeing(at, raft.terms.term(at) or 0)
        raft.handle(e.Received(A, AppendAnswer(raft.term, False, Index(at), 0, hint, hint_term)), LATE)
        steps += 1
    assert raft.peers[A].match == 21
    assert steps <= 3


def test_3_7_who_restarts_remembers_its_term_and_whom_it_voted_for() -> None:
    raft = Raft(ME, Voters((ME, A, B)), {ME, A, B}, core(1).terms, e.HardState(Term(7), A), CONFIG, random.Random(1), 0)
    assert raft.term == 7
    [refused] = raft.handle(e.Received(B, VoteRequest(Term(7), Index(9), Term(6))), LATE)
    assert refused == e.Send(B, VoteAnswer(Term(7), False))
    [again] = raft.handle(e.Received(A, VoteRequest(Term(7), Index(9), Term(6))), LATE)
    assert again == e.Send(A, VoteAnswer(Term(7), True))


def test_3_7_who_restarts_knows_nothing_to_be_committed_beyond_its_snapshot() -> None:
    assert core(1, 1, 1).commit == 0
    terms = Terms(5, 1)
    raft = Raft(ME, Voters((ME, A)), {ME, A}, terms, e.HardState(Term(1)), CONFIG, random.Random(1), 0, Index(8))
    assert raft.commit == 8


def test_3_10_who_hears_the_leader_votes_for_the_one_it_named() -> None:
    raft = core(1)
    raft.handle(e.Received(A, append(1, (1, 1))), LATE)
    asked = VoteRequest(Term(2), Index(1), Term(1))
    assert raft.handle(e.Received(B, asked), LATE + 10) == []
    named = VoteRequest(Term(2), Index(1), Term(1), transfer=True)
    [persist] = of(e.Persist, raft.handle(e.Received(B, named), LATE + 20))
    assert isinstance(persist, e.Persist)
    assert persist.then == (e.Send(B, VoteAnswer(Term(2), True)),)


def test_3_10_the_order_to_stand_waits_until_the_other_has_everything() -> None:
    raft = core(1)
    lead(raft)
    ack(raft, A, 1)
    outputs = raft.handle(e.Transfer(), LATE)
    assert of(e.Send, outputs) == []
    assert e.Send(A, TimeoutNow(raft.term)) in ack(raft, A, 2) + ack(raft, B, 1)


def test_5_1_an_offer_of_what_is_committed_here_is_answered_with_done_and_not_taken() -> None:
    raft = core(1, 1, 1)
    raft.handle(e.Received(A, append(1, (3, 1), commit=3)), 10)
    outputs = raft.handle(e.Received(A, Install(Term(1), Index(2), Term(1), 10, 0, b"x")), 20)
    assert outputs == [e.Send(A, InstallAnswer(Term(1), Index(2), 10, True))]


def test_5_1_an_offer_of_a_deposed_leader_is_refused_with_the_term() -> None:
    raft = core(1, term=5)
    outputs = raft.handle(e.Received(A, Install(Term(4), Index(9), Term(4), 10, 0, b"x")), 20)
    assert outputs == [e.Send(A, InstallAnswer(Term(5), Index(9), 0))]


def test_6_4_a_leader_counts_only_answers_to_its_own_round_for_a_read() -> None:
    raft = core(1)
    lead(raft)
    sync(raft)
    ack(raft, A, 2)
    raft.handle(e.Read(1), LATE)
    assert of(e.ReadReady, ack(raft, A, 2, round_=0)) == []  # an answer to something sent before the read came
    assert of(e.ReadReady, ack(raft, A, 2, round_=1)) == [e.ReadReady((1,), Index(2))]


def test_9_6_a_log_that_is_behind_gets_no_pre_vote() -> None:
    raft = core(1, 1, 2)
    for behind in (
        VoteRequest(Term(3), Index(9), Term(1), pre=True),
        VoteRequest(Term(3), Index(2), Term(2), pre=True),
    ):
        assert raft.handle(e.Received(A, behind), LATE) == [e.Send(A, VoteAnswer(Term(2), False, pre=True))]

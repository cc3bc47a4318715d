# Changes of voters and snapshots, one rule of the Raft thesis a test (chapters 4 and 5, and the erratum of 2015).
from __future__ import annotations

import random

import pytest

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import events as e
from idunno.consensus.messages import Append, AppendAnswer, Entry, Install, InstallAnswer, TimeoutNow, VoteAnswer
from idunno.consensus.raft import Raft
from idunno.consensus.voters import encode_voters
from tests.unit.consensus.test_raft import LATE, A, B, C, D, ack, append, core, lead, of, sync
from tests.unit.consensus.world import World

ME = NodeId("me")


def leading(*, voters: tuple[NodeId, ...] = (ME, A, B), learners: tuple[NodeId, ...] = (C, D)) -> Raft:
    """Its no-op, entry 2, is committed."""
    raft = core(1, voters=voters, learners=learners)
    lead(raft)
    sync(raft)
    for voter in sorted(raft.voters - {ME}):
        ack(raft, voter, 2)
    assert raft.commit == 2
    return raft


def change(raft: Raft, *voters: NodeId) -> list[e.Output]:
    return raft.handle(e.ChangeVoters(frozenset(voters)), LATE)


def committed(outputs: list[e.Output]) -> list[e.Output]:
    return of(e.Committed, outputs)


def test_4_1_the_new_voters_count_as_soon_as_the_entry_is_in_the_log() -> None:
    raft = leading()
    change(raft, ME, A, B, C)
    assert raft.voters == {ME, A, B, C}
    assert committed(sync(raft) + ack(raft, A, 3)) == []  # two of three would have done, two of four do not
    assert committed(ack(raft, C, 3)) == [e.Committed(Index(3))]


def test_4_1_one_change_at_a_time_and_of_one_voter() -> None:
    raft = leading()
    assert "one joins or one goes" in raft.change_refused(frozenset({ME, A, B, C, D}))
    assert "one joins or one goes" in raft.change_refused(frozenset({ME, A, C}))
    assert raft.change_refused(frozenset()) != ""
    change(raft, ME, A, B, C)
    assert "entry 3, is not committed yet" in raft.change_refused(frozenset({ME, A, B, C, D}))
    for node in (A, C):
        ack(raft, node, 3)
    sync(raft)
    assert raft.change_refused(frozenset({ME, A, B, C, D})) == ""


def test_the_erratum_no_change_before_the_leaders_own_no_op_is_committed() -> None:
    raft = core(1, learners=(C,))
    lead(raft)
    assert "no entry of this leader's term" in raft.change_refused(frozenset({ME, A, B, C}))
    sync(raft)
    ack(raft, A, 2)
    assert raft.change_refused(frozenset({ME, A, B, C})) == ""


def test_4_1_a_change_that_is_cut_from_the_log_counts_no_more() -> None:
    raft = core(1)
    entry = Entry(Term(1), encode_voters([ME, A, B, C]))
    raft.handle(e.Received(A, Append(Term(1), Index(1), Term(1), Index(1), 0, (entry,))), 10)
    assert raft.voters == {ME, A, B, C}
    raft.handle(e.Received(B, append(2, (1, 1), 2)), 20)
    assert raft.voters == {ME, A, B}


def test_4_2_2_a_leader_that_is_removed_leads_until_that_is_committed_and_has_another_stand() -> None:
    raft = leading()
    change(raft, A, B)
    assert committed(sync(raft) + ack(raft, A, 3)) == []  # its own copy counts no more
    assert raft.role is e.RaftRole.LEADER
    outputs = ack(raft, B, 3)
    assert committed(outputs) == [e.Committed(Index(3))]
    assert [o for o in of(e.Send, outputs) if isinstance(o, e.Send) and isinstance(o.message, TimeoutNow)] != []
    assert [raft.is_leader] == [False]
    assert of(e.Send, raft.handle(e.Tick(), 2 * LATE)) == []  # and stands no more


def test_4_2_2_a_voter_whose_removal_may_be_known_to_itself_alone_still_stands_without_its_own_vote() -> None:
    raft = leading(voters=(ME, A), learners=(B,))
    change(raft, A)
    sync(raft)
    raft.handle(e.Received(A, AppendAnswer(Term(9), False, Index(0), 0)), LATE)  # deposed; nobody else has the entry
    raft.handle(e.Tick(), 2 * LATE)
    assert raft.role is e.RaftRole.PRE_CANDIDATE
    raft.handle(e.Received(A, VoteAnswer(Term(10), True, pre=True)), 2 * LATE)
    raft.handle(e.Received(B, VoteAnswer(Term(10), True)), 2 * LATE)
    sync(raft, 2 * LATE)
    assert not raft.is_leader
    raft.handle(e.Received(A, VoteAnswer(Term(10), True)), 2 * LATE)
    assert raft.is_leader


def test_4_2_1_who_joins_with_an_empty_log_is_a_learner_first_and_counts_for_nothing() -> None:
    raft = leading()
    raft.handle(e.Propose((b"x",)), LATE)
    assert committed(sync(raft) + ack(raft, C, 3) + ack(raft, D, 3)) == []


def test_5_1_a_follower_behind_the_log_is_sent_a_snapshot_and_then_what_follows() -> None:
    raft = leading()
    raft.handle(e.Compacted(Index(2)), LATE)
    outputs = raft.handle(e.Propose((b"x",)), LATE)
    refused = AppendAnswer(raft.term, False, Index(2), 0, Index(0), Term(0))
    outputs += [output for _ in range(3) for output in raft.handle(e.Received(C, refused), LATE)]
    assert of(e.SendSnapshot, outputs).count(e.SendSnapshot(C, raft.term)) == 1
    assert [o for o in outputs if isinstance(o, e.SendEntries) and o.to == C] == []
    done = raft.handle(e.Received(C, InstallAnswer(raft.term, Index(2), 9, True)), LATE)
    [entries] = of(e.SendEntries, done)
    assert isinstance(entries, e.SendEntries)
    assert (entries.to, entries.first, entries.last) == (C, 3, 3)
    assert raft.peers[C].match == 2


def test_5_1_an_installed_snapshot_takes_the_logs_place_with_its_voters() -> None:
    raft = core(1)
    raft.handle(e.Received(A, append(2, (1, 1), 1, 1)), 10)
    [taken] = of(e.TakeInstall, raft.handle(e.Received(A, Install(Term(2), Index(9), Term(2), 5, 0, b"x")), 20))
    assert isinstance(taken, e.TakeInstall)
    outputs = raft.handle(e.Installed(A, Index(9), Term(2), frozenset({ME, A, B, C}), Index(8)), 30)
    [persist] = of(e.Persist, outputs)
    assert isinstance(persist, e.Persist)
    assert persist.anew == 9
    assert persist.then == (e.Send(A, InstallAnswer(Term(2), Index(9), 0, True)),)
    assert (raft.commit, raft.synced, raft.terms.last, raft.terms.last_term) == (9, 9, 9, 2)
    assert raft.voters == {ME, A, B, C}
    raft.handle(e.Persisted(raft._seq), 40)
    raft.handle(e.Received(A, append(2, (9, 2), 2)), 50)
    assert raft.terms.last == 10


def test_5_1_a_snapshot_of_what_the_log_holds_already_changes_nothing() -> None:
    raft = core(1, 1, 1)
    outputs = raft.handle(e.Installed(A, Index(2), Term(1), frozenset({A}), Index(1)), 10)
    assert [o.anew for o in outputs if isinstance(o, e.Persist)] == [None]
    assert (raft.commit, raft.terms.last) == (2, 3)
    assert raft.voters == {ME, A, B}
    answer = raft.handle(e.Received(A, Install(Term(1), Index(2), Term(1), 5, 0, b"x")), 20)
    assert of(e.TakeInstall, answer) == []


def test_an_append_that_comes_late_and_begins_before_the_cut_is_taken_from_there_on() -> None:
    raft = core(1, 1, 1, 1)
    raft.handle(e.Received(A, append(1, (4, 1), commit=4)), 10)
    raft.handle(e.Compacted(Index(3)), 10)
    outputs = raft.handle(e.Received(A, append(1, (1, 1), 1, 1, 1, 1)), 20)
    [persist] = of(e.Persist, outputs)
    assert isinstance(persist, e.Persist)
    assert (persist.first, len(persist.entries)) == (5, 1)
    again = raft.handle(e.Received(A, append(1, (1, 1), 1)), 30)
    assert again == [e.Send(A, AppendAnswer(Term(1), True, Index(3), 0))]


class NoErratum(Raft):
    """Planted: changes voters as soon as it leads, as printed in the thesis."""

    def change_refused(self, voters: frozenset[NodeId]) -> str:
        return "" if self.accepts_proposals and len(voters ^ self.voters) == 1 else "no"


def erratum(maker: type[Raft]) -> World:
    """The counterexample of the erratum: two leaders change voters, each without knowing of the other's change."""
    world = World(4, 1, learners=1, maker=maker)
    s1 = world.elect()
    world.run(500)
    s2, s3, s4 = (name for name in world.voters if name != s1)
    s5 = world.learners[0]
    world.split([s1, s5], [s2, s3, s4])
    assert world.change_voters(s1, [s1, s2, s3, s4, s5])  # D, on s1 and s5 only
    world.run(100)
    world.run_until(lambda: any(world.core(n).is_leader for n in (s2, s3, s4)))
    new = next(n for n in (s2, s3, s4) if world.core(n).is_leader)
    other = next(n for n in (s2, s3, s4) if n != new)
    world.swallows = lambda sender, _: sender == new  # before its no-op is anywhere else
    changed = world.change_voters(new, {s1, s2, s3, s4} - {next(n for n in (s2, s3, s4) if n not in (new, other))})
    world.swallows = lambda sender, message: False
    world.dose["changed before the no-op"] = int(changed)
    return world


@pytest.mark.parametrize(("maker", "changed"), [(Raft, 0), (NoErratum, 1)])
def test_a_new_leader_waits_for_its_no_op_before_it_changes_voters(maker: type[Raft], changed: int) -> None:
    assert erratum(maker).dose["changed before the no-op"] == changed


class TwoAtOnce(Raft):
    """Planted: replaces several voters in one step."""

    def change_refused(self, voters: frozenset[NodeId]) -> str:
        return "" if self.accepts_proposals and voters else "no"


def exchange(seed: int) -> None:
    """Whoever leads names three voters by chance, in one step."""
    rng = random.Random(seed)
    world = World(3, seed, learners=4, maker=TwoAtOnce)
    world.elect()
    world.run(300)
    for _ in range(60):
        names = list(world.nodes)
        rng.shuffle(names)
        if rng.random() < 0.4:
            at = rng.randint(2, 5)
            world.split(names[:at], names[at:])
        elif rng.random() < 0.3:
            world.heal()
        for name in world.up():
            if world.core(name).is_leader:
                world.propose(name, b"%d" % rng.randrange(10**6))
                world.change_voters(name, rng.sample(list(world.nodes), 3))
        world.run(rng.randint(50, 900))


def test_several_voters_changed_in_one_step_are_seen() -> None:
    """Old and new voters have majorities without a common node: two leaders, or two different entries at one place."""
    with pytest.raises(
        AssertionError, match=r"applies|two leaders|both lead|would be replaced|logs differ|was applied"
    ):
        exchange(seed=0)

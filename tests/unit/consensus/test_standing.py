# Whose word counts: a claim against what was acknowledged, boots against those seen, and what a witness keeps.
from __future__ import annotations

import random

import pytest

from idunno.base.errors import Corrupt
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.messages import Append, AppendAnswer, InstallAnswer, RaftMessage, VoteAnswer, VoteRequest
from idunno.consensus.standing import Claim, Run, Witness
from tests.unit.consensus.world import World

X = NodeId("x")


def claim(term: int, index: int) -> Claim:
    return Claim(Term(term), Index(index))


def acknowledged(term: int, index: int) -> Witness:
    witness = Witness()
    witness.heard(X, AppendAnswer(Term(term), True, Index(index), 0))
    return witness


@pytest.mark.parametrize(
    ("shown", "heard"),
    [((3, 10), True), ((3, 11), True), ((4, 2), True), ((3, 9), False), ((2, 50), False), ((0, 0), False)],
)
def test_a_claim_counts_that_is_not_below_what_was_acknowledged(shown: tuple[int, int], heard: bool) -> None:
    """Within a term a log that was acknowledged is only added to; in a later one it may have been cut before."""
    why = acknowledged(3, 10).judge(X, Run(1, 7), claim(*shown))
    assert (why == "") is heard
    assert heard or "had acknowledged entry 10 in term 3" in why


@pytest.mark.parametrize(
    ("run", "heard"),
    [(Run(5, 1), True), (Run(6, 2), True), (Run(5, 2), False), (Run(4, 1), False), (Run(1, 1), False)],
)
def test_a_boot_number_counts_once_and_never_goes_back(run: Run, heard: bool) -> None:
    witness = Witness()
    assert witness.judge(X, Run(5, 1), claim(1, 1)) == ""
    why = witness.judge(X, run, claim(1, 1))
    assert (why == "") is heard
    assert heard or "copy" in why
    assert witness.accepted(X) == (run.number if heard else Run(5, 1).number)


def test_what_a_run_said_before_its_claim_arrived_is_not_held_against_it() -> None:
    """Others proved it, it acknowledged more, and the leader told of that before its hello got here."""
    witness = acknowledged(3, 10)
    witness.learn(X, Term(3), Index(15), Run(2, 7).number)
    assert "entry 10" in witness.judge(X, Run(2, 7), claim(3, 9))  # what the run before it said is
    assert witness.judge(X, Run(2, 7), claim(3, 12)) == ""
    assert "entry 15" in witness.judge(X, Run(3, 8), claim(3, 14))
    assert witness.mark(X) == claim(3, 15)


def test_late_word_of_an_older_run_counts_against_the_newer_ones() -> None:
    witness = Witness()
    witness.learn(X, Term(4), Index(2), Run(3, 1).number)
    witness.learn(X, Term(3), Index(20), Run(2, 1).number)
    witness.learn(X, Term(3), Index(5), Run(1, 1).number)
    assert "entry 20 in term 3" in witness.judge(X, Run(3, 1), claim(3, 19))
    assert "entry 2 in term 4" in witness.judge(X, Run(4, 1), claim(3, 30))
    again = Witness()
    again.load(witness.encode("c1"), "c1", "log/marks")
    assert again.judge(X, Run(3, 1), claim(3, 20)) == ""


def test_the_boot_in_the_roster_counts_too() -> None:
    assert "boot 9 of it was seen" in Witness().judge(X, Run(8, 1), claim(1, 1), boot_seen=9)


@pytest.mark.parametrize(
    ("message", "mark"),
    [
        (AppendAnswer(Term(4), True, Index(7), 0), (4, 7)),
        (InstallAnswer(Term(4), Index(7), 9, done=True), (4, 7)),
        (VoteAnswer(Term(4), True), (4, 0)),
        (VoteRequest(Term(4), Index(7), Term(3)), (4, 0)),
        (Append(Term(4), Index(7), Term(3), Index(7), 0), (4, 0)),
        (AppendAnswer(Term(4), False, Index(7), 0), (0, 0)),
        (InstallAnswer(Term(4), Index(7), 3), (0, 0)),
        (VoteAnswer(Term(4), False), (0, 0)),
        (VoteAnswer(Term(4), True, pre=True), (0, 0)),  # the asker's next term, which nobody has synced
        (VoteRequest(Term(4), Index(7), Term(3), pre=True), (0, 0)),
    ],
)
def test_only_what_binds_is_a_mark(message: RaftMessage, mark: tuple[int, int]) -> None:
    witness = Witness()
    witness.heard(X, message)
    assert witness.mark(X) == claim(*mark)


def test_marks_only_rise_and_outlive_a_restart_but_not_a_recovery_into_another_cluster() -> None:
    witness = acknowledged(3, 10)
    witness.learn(X, Term(2), Index(99))
    witness.judge(X, Run(5, 1), claim(3, 12))
    data = witness.encode("c1")
    again, other = Witness(), Witness()
    again.load(data, "c1", "log/marks")
    assert (again.mark(X), again.accepted(X)) == (claim(3, 10), Run(5, 1).number)
    other.load(data, "c2", "log/marks")
    assert (other.mark(X), other.accepted(X)) == (claim(0, 0), 0)
    for at in range(len(data)):
        with pytest.raises(Corrupt):
            other.load(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "c1", "log/marks")
    witness.keep([])
    assert witness.mark(X) == claim(0, 0)


@pytest.mark.parametrize("seed", range(25))
def test_nobody_whose_disk_kept_its_word_is_ever_refused(seed: int) -> None:
    """Cores with loss, crashes that lose what was not synced, cut logs and snapshots; every restart shows its claim."""
    rng = random.Random(seed)
    world = World(3, seed, loss=0.1)
    witness, boots, seen = Witness(), dict.fromkeys(world.nodes, 0), 0

    def listen() -> None:
        nonlocal seen
        for sender, _, message in world.sent[seen:]:
            witness.heard(sender, message)
        seen = len(world.sent)

    def start(name: NodeId) -> None:
        listen()
        world.start(name)
        boots[name] += 1
        core = world.core(name)
        shown = Claim(world.nodes[name].store.hard.term, core.terms.last)
        assert witness.judge(name, Run(boots[name], 1), shown) == "", f"seed {seed}"

    for number in range(60):
        world.run(rng.randrange(20, 1_500))
        for name in world.up():
            if world.core(name).is_leader:
                for _ in range(rng.randrange(4)):
                    world.propose(name, b"%d" % number)
        name = rng.choice(list(world.nodes))
        if world.nodes[name].core is None:
            start(name)
            continue
        if rng.random() < 0.3 and world.core(name).commit > 0:
            world.take_snapshot(name, rng.randrange(5))
        if rng.random() < 0.5:
            world.crash(name)
    listen()
    assert sum(boots.values()) >= 10
    assert all(witness.mark(name).term > 1 for name in world.nodes)

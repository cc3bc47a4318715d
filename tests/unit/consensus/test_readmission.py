# A node that forgot what it promised: what counts of its word until its log is whole again, and that nothing is lost by it.
from __future__ import annotations

import random
from collections.abc import Callable
from copy import copy

import pytest

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import events as e
from idunno.consensus.messages import (
    Append,
    AppendAnswer,
    Install,
    InstallAnswer,
    RaftMessage,
    TimeoutNow,
    VoteAnswer,
    VoteRequest,
)
from idunno.consensus.raft import Raft
from idunno.consensus.voters import decode_voters, names_voters
from tests.unit.consensus.test_raft import LATE, A, B, ack, append, core, lead, of, sync
from tests.unit.consensus.world import Store, World


def silent(raft: Raft, sender: NodeId, message: RaftMessage) -> list[e.Output]:
    return raft.handle(e.Received(sender, message, counts=False), LATE)


def copying(*log_terms: int, term: int = 0) -> Raft:
    raft = core(*log_terms, term=term)
    raft.handle(e.Halt(True), 0)
    raft.handle(e.Copy(Term(0)), 0)
    return raft


# -- the leader --------------------------------------------------------------------------------------------------------


def test_who_only_copies_is_counted_as_a_copy_and_by_no_majority() -> None:
    raft = core(1)
    lead(raft)
    sync(raft)
    for number in range(3):
        silent(raft, A, AppendAnswer(raft.term, True, Index(2), raft._reads.round))
        assert (raft.commit, raft.copies()) == (0, [2, 2, 0]), number
    ack(raft, B, 2)
    assert raft.commit == 2
    raft.handle(e.Read(1), LATE)
    assert of(e.ReadReady, silent(raft, A, AppendAnswer(raft.term, True, Index(2), raft._reads.round))) == []
    assert of(e.ReadReady, ack(raft, B, 2, round_=raft._reads.round)) == [e.ReadReady((1,), Index(2))]


def test_a_leader_whom_only_such_a_node_answers_steps_down() -> None:
    raft = core(1)
    lead(raft)
    now = LATE
    while raft.is_leader:
        now += raft.config.heartbeat_ms
        raft.handle(e.Received(A, AppendAnswer(raft.term, True, Index(2), 0), counts=False), now)
        raft.handle(e.Tick(), now)
        assert now < LATE + 10_000


def test_what_it_had_acknowledged_before_is_forgotten_and_sent_again_and_again_when_it_loses_it_once_more() -> None:
    raft = core(1, 1, 1, 1, 1)
    lead(raft)
    ack(raft, A, 6)
    assert raft.peers[A].match == 6
    silent(raft, A, AppendAnswer(raft.term, False, Index(6), 0, Index(2), Term(1)))
    assert (raft.peers[A].match, raft.peers[A].silent) == (0, True)
    for disk in (6, 4):
        silent(raft, A, AppendAnswer(raft.term, True, Index(disk), 0))
        assert raft.peers[A].match == disk
        silent(raft, A, AppendAnswer(raft.term, False, Index(6), 0, Index(3), Term(1)))
        assert raft.peers[A].match == 0


def test_whose_log_is_found_to_be_an_old_one_has_no_copies_and_does_not_depose_the_leader() -> None:
    raft = core(1)
    lead(raft)
    sync(raft)
    ack(raft, A, 2)
    assert raft.copies() == [2, 2, 0]
    raft.handle(e.Doubted(A), LATE)
    assert (raft.copies(), raft.commit) == ([2, 0, 0], 2)
    assert raft.answering(3) == 3  # a copied directory was refused, and the node itself is well
    ack(raft, A, 2)
    assert raft.copies() == [2, 2, 0]
    raft.handle(e.Doubted(NodeId("nobody")), LATE)


def test_once_it_says_so_itself_its_word_counts_again() -> None:
    raft = core(1)
    lead(raft)
    sync(raft)
    silent(raft, A, AppendAnswer(raft.term, True, Index(2), 0))
    assert raft.commit == 0
    ack(raft, A, 2)
    assert (raft.commit, raft.peers[A].silent) == (2, False)


def test_nothing_but_how_far_it_has_come_is_heard_of_it() -> None:
    raft = core(1)
    raft.handle(e.Tick(), LATE)
    for answer in (
        VoteAnswer(Term(2), True, pre=True),
        VoteRequest(Term(9), Index(9), Term(9)),
        Append(Term(9), Index(1), Term(1), Index(0), 0),
    ):
        assert silent(raft, A, answer) == []
    assert (raft.term, raft.role) == (1, e.RaftRole.PRE_CANDIDATE)


# -- the node ----------------------------------------------------------------------------------------------------------


def test_it_takes_the_leaders_log_in_and_promises_nothing() -> None:
    raft = copying(1, 1, 1)
    (persist,) = of(e.Persist, raft.handle(e.Received(A, append(2, (2, 1), 2, 2, commit=3)), 1))
    assert isinstance(persist, e.Persist)
    assert persist.then == (e.Send(A, AppendAnswer(Term(2), True, Index(4), 0)),)
    assert (persist.hard, raft.commit) == (e.HardState(Term(2), A), 3)  # it may have voted in this term already
    assert of(e.Send, raft.handle(e.Received(B, VoteRequest(Term(9), Index(9), Term(9))), LATE)) == []
    raft.handle(e.Tick(), LATE)
    assert (raft.role, raft.term) == (e.RaftRole.FOLLOWER, 2)


def test_its_vote_in_the_leaders_term_is_used_up() -> None:
    raft = copying(1, term=3)
    raft.handle(e.Received(A, append(3, (1, 1))), 1)
    raft.handle(e.Halt(False), 2)
    sync(raft)
    (answer,) = of(e.Send, raft.handle(e.Received(B, VoteRequest(Term(3), Index(9), Term(2))), LATE))
    assert answer == e.Send(B, VoteAnswer(Term(3), False))


def test_it_takes_a_snapshot_in() -> None:
    raft = copying(1)
    offer = Install(Term(2), Index(7), Term(2), 10, 0, b"x")
    assert of(e.TakeInstall, raft.handle(e.Received(A, offer), 1)) == [e.TakeInstall(A, offer)]
    (persist,) = of(e.Persist, raft.handle(e.Installed(A, Index(7), Term(2), raft.voters, Index(0)), 2))
    assert isinstance(persist, e.Persist)
    assert persist.then == (e.Send(A, InstallAnswer(Term(2), Index(7), 0, True)),)


def test_a_term_that_others_know_it_was_in_is_its_term_again() -> None:
    """It may have voted in it: a leader of an earlier term is told so, and stands again above it."""
    raft = core(1)
    raft.handle(e.Halt(True), 0)
    (persist,) = of(e.Persist, raft.handle(e.Copy(Term(5)), 0))
    assert isinstance(persist, e.Persist)
    assert persist.hard == e.HardState(Term(5))
    sync(raft)
    (answer,) = of(e.Send, raft.handle(e.Received(A, append(2, (1, 1), 2)), 1))
    assert answer == e.Send(A, AppendAnswer(Term(5), False, Index(1), 0))
    leader = core(1)
    lead(leader)
    silent(leader, A, AppendAnswer(Term(5), False, Index(1), 0))
    assert (leader.role, leader.term) == (e.RaftRole.FOLLOWER, 5)


def test_who_is_not_halted_does_not_begin_to_copy_and_the_end_of_the_halt_ends_it() -> None:
    raft = core(1)
    raft.handle(e.Copy(Term(9)), 0)
    assert (raft.copying, raft.term) == (False, 1)
    raft = copying(1)
    assert raft.copying
    raft.handle(e.Halt(False), 0)
    assert not raft.copying


# -- worlds ------------------------------------------------------------------------------------------------------------


class Forgetful(World):
    """Disks are replaced by old images of themselves. That they are is always noticed (standing.py); `fence` says from which
    entry on a log is whole, as a leader would (readmission.py): a test may plant a mistake there."""

    fence: Callable[[Forgetful, NodeId], tuple[Term, Index]]
    late = 0.0  # how many of the messages come seconds late
    forgotten = 0.0  # how many of the votes are forgotten at once, while the candidate hangs and has yet to read them

    def __init__(self, voters: int, seed: int, *, loss: float, learners: int = 0) -> None:
        self.old: set[NodeId] = set()
        self.images: dict[NodeId, Store] = {}
        self.heard: dict[tuple[NodeId, NodeId], int] = {}  # (who hears, whom): the lowest boot
        self.asked: dict[NodeId, tuple[NodeId, Term, Index]] = {}
        super().__init__(voters, seed, loss=loss, learners=learners)

    def start(self, name: NodeId) -> None:
        super().start(name)
        self.asked.pop(name, None)
        if name in self.old:
            self.step(name, e.Halt(True))
            self.step(name, e.Copy(Term(0)))

    def _send(self, sender: NodeId, to: NodeId, message: RaftMessage) -> None:
        boot, silent_, at = self.nodes[sender].boot, sender in self.old, self.at

        def later(after_ms: int, do: Callable[[], None]) -> None:
            if self.late and self.rng.random() < self.late:
                after_ms += self.rng.randint(500, 6_000)
            at(after_ms, lambda: self._deliver(sender, to, boot, silent_, message))

        votes = isinstance(message, VoteAnswer) and message.granted and not message.pre
        forgets = votes and self.forgotten and self.rng.random() < self.forgotten
        if forgets and sender in self.images and to not in self.frozen:
            self.at(0, lambda: self.freeze(to))
            self.at(1, lambda: self.put_back(sender))
        self.at = later  # type: ignore[method-assign]
        try:
            super()._send(sender, to, message)
        finally:
            self.at = at  # type: ignore[method-assign]

    def _deliver(self, sender: NodeId, to: NodeId, boot: int, silent_: bool, message: RaftMessage) -> None:
        if to in self.frozen:  # it reads later, and judges then
            self.frozen[to].append(lambda: self._deliver(sender, to, boot, silent_, message))
            return
        lowest = self.heard.get((to, sender), 0)
        if boot > lowest if silent_ else boot < lowest:
            return
        self.step(to, e.Received(sender, message, counts=not silent_))

    def take_image(self, name: NodeId) -> None:
        self.images[name] = copy(self.nodes[name].store)
        self.images[name].entries = list(self.images[name].entries)

    def may_be_old(self, old: set[NodeId]) -> bool:
        """Whether a majority of the voters, as any log names them, have whole logs: else none may ever lead."""
        known = [self.chosen_voters()]
        for node in self.nodes.values():
            named = [decode_voters(entry.payload) for entry in node.live if names_voters(entry.payload)]
            known += named[-2:]  # the last one may be cut away
            if len(named) < 2:
                known.append(node.store.snapshot.voters if node.store.snapshot is not None else frozenset(self.voters))
        return all(len(voters & old) <= (len(voters) - 1) // 2 for voters in known)

    def put_back(self, name: NodeId) -> None:
        if name in self.images and self.may_be_old(self.old | {name}):
            self.crash(name)
            self.nodes[name].store = self.images.pop(name)
            self.old.add(name)
            self.count("old images")
            self.start(name)

    def readmit(self) -> None:
        """Who is old asks a node that leads, or thinks so; and looks whether its log is whole."""
        for name in sorted(self.old):
            if self.nodes[name].core is None or name in self.frozen:
                continue
            if name not in self.asked:
                leading = [n for n in self.up() if self.core(n).accepts_proposals and n not in self.frozen]
                leading = [n for n in leading if (n, name) not in self.cut and (name, n) not in self.cut]
                if leading:
                    leader = self.rng.choice(leading)
                    self.heard[leader, name] = self.nodes[name].boot
                    self.asked[name] = (leader, *type(self).fence(self, leader))
                continue
            leader, term, index = self.asked[name]
            leads = self.nodes[leader].core is not None and self.core(leader).is_leader
            if not leads or self.core(leader).term != term:
                del self.asked[name]
            elif self.core(leader).commit >= index and self.holds(name, term, index):
                self.whole(name)

    def holds(self, name: NodeId, term: Term, index: Index) -> bool:
        terms = self.core(name).terms
        return self.core(name).synced >= index and (terms.base >= index or terms.term(index) == term)

    def whole(self, name: NodeId) -> None:
        self.old.discard(name)
        self.asked.pop(name, None)
        self.count("whole again")
        self.step(name, e.Halt(False))
        for other in self.nodes:
            if self.rng.random() < 0.5:  # the others hear of it when they do
                self.heard[other, name] = self.nodes[name].boot


def marked(world: Forgetful, leader: NodeId) -> tuple[Term, Index]:
    """An entry of its own, behind all that its log holds."""
    assert world.propose(leader, b"")
    return world.core(leader).term, world.core(leader).terms.last


def what_is_committed(world: Forgetful, leader: NodeId) -> tuple[Term, Index]:
    """The mistake: that much the leader has anyway, and nobody was asked."""
    raft = world.core(leader)
    term = raft.terms.term(raft.commit)
    assert term is not None
    return term, raft.commit


def nothing(world: Forgetful, leader: NodeId) -> tuple[Term, Index]:
    """The mistake: at once."""
    return world.core(leader).term, Index(0)


def one_voter_more_or_less(world: Forgetful, leader: NodeId, rng: random.Random) -> None:
    """Three vote at least, and most of those who do have whole logs."""
    voters = world.core(leader).voters
    wanted = voters ^ {rng.choice(sorted(world.nodes))}
    if len(wanted) >= 3 and len(wanted & world.old) <= (len(wanted) - 1) // 2:
        world.change_voters(leader, wanted)


def storm(seed: int, fence: Callable[[Forgetful, NodeId], tuple[Term, Index]], ms: int = 30_000) -> Forgetful:
    rng = random.Random(seed ^ 0xF0)
    kind = type("Fenced", (Forgetful,), {"fence": staticmethod(fence)})
    loss, learners = rng.choice([0.0, 0.02, 0.1]), rng.choice([0, 0, 1, 2])
    world: Forgetful = kind(rng.choice([3, 4, 5]), seed, loss=loss, learners=learners)
    world.late, changes = rng.choice([0.0, 0.01, 0.05]), rng.choice([0.0, 0.03, 0.1])
    world.forgotten = rng.choice([0.0, 0.3, 0.7])
    proposed = 0
    while world.now_ms < ms:
        world.run(rng.randint(5, 120))
        world.readmit()
        for name in world.up():
            if name not in world.frozen and world.core(name).is_leader and rng.random() < 0.7:
                proposed += world.propose(name, b"%d" % proposed)
            if name not in world.frozen and world.core(name).is_leader and rng.random() < changes:
                one_voter_more_or_less(world, name, rng)
        dice, names = rng.random(), sorted(world.nodes)
        name = rng.choice(names)
        if dice < 0.03:
            rng.shuffle(names)
            at = rng.randint(1, len(names) - 1)
            world.split(names[:at], names[at:])
        elif dice < 0.08:
            world.heal()
        elif dice < 0.10:
            world.crash(name)
        elif dice < 0.16:
            for down in [name for name in names if world.nodes[name].core is None][:1]:
                world.start(down)
        elif dice < 0.19:
            world.freeze(name)
        elif dice < 0.25:
            for frozen in list(world.frozen)[:1]:
                world.thaw(frozen)
        elif dice < 0.28 and name not in world.old:
            world.take_image(name)
        elif dice < 0.32 and name not in world.frozen:
            world.put_back(name)
        elif dice < 0.34 and name in world.up() and name not in world.frozen and world.core(name).commit > 0:
            world.take_snapshot(name, rng.choice([0, 3, 30]))
        elif dice < 0.37 and name in world.up() and world.core(name).accepts_proposals:
            world.step(name, e.Transfer())
    world.heal()
    world.loss = world.late = world.forgotten = 0.0
    for name in world.nodes:
        world.thaw(name)
        if world.nodes[name].core is None:
            world.start(name)
    end = world.now_ms + 60_000
    while world.old and world.now_ms < end:
        world.run(50)
        world.readmit()
    assert not world.old, f"seed {seed}: {world.old} did not come back"
    world.run(5_000)  # a leader that was cut off has heard of the next one
    leader = world.elect()
    assert world.propose(leader, b"last")
    last = world.core(leader).terms.last
    world.run_until(lambda: all(world.core(name).commit >= last for name in world.nodes))
    world.check()
    return world


@pytest.mark.parametrize("seed", range(120))
def test_worlds_in_which_disks_are_replaced_by_old_images_lose_nothing(seed: int) -> None:
    storm(seed, marked)


@pytest.mark.parametrize(("seed", "fence"), [(86, nothing), (339, what_is_committed)])
def test_a_log_that_counts_too_early_is_seen(
    seed: int, fence: Callable[[Forgetful, NodeId], tuple[Term, Index]]
) -> None:
    with pytest.raises(AssertionError, match="without entry"):
        storm(seed, fence)


def forgotten_vote(fence: Callable[[Forgetful, NodeId], tuple[Term, Index]]) -> Forgetful:
    """The worst that can be forgotten: a vote in a term to come, which the candidate, who hangs, has yet to read."""
    kind = type("Fenced", (Forgetful,), {"fence": staticmethod(fence)})
    world: Forgetful = kind(5, 7, loss=0.0)
    leader = world.elect()
    world.run(1_000)
    voter, candidate, late, other = (name for name in world.nodes if name != leader)
    world.take_image(voter)
    requests: list[RaftMessage] = []

    def swallows(sender: NodeId, message: RaftMessage) -> bool:
        asks = sender == candidate and isinstance(message, VoteRequest)
        if asks:
            requests.append(message)
        return asks

    world.swallows = swallows
    world.step(candidate, e.Received(leader, TimeoutNow(world.core(leader).term)))
    world.run_until(lambda: requests)
    world.swallows = lambda sender, message: False
    world.freeze(candidate)
    world.cut = {(voter, name) for name in world.nodes if name != candidate}
    world.step(voter, e.Received(candidate, requests[0]))
    world.run_until(lambda: world.sent[-1][0] == voter and world.sent[-1][2] == VoteAnswer(Term(3), True))
    world.put_back(voter)
    world.heal()
    while world.old:
        world.run(20)
        world.readmit()
    world.heard[candidate, voter] = 0  # it has not heard of that

    world.cut = {(leader, late), (late, leader)}
    assert world.propose(leader, b"with the vote of who came back")
    index = world.core(leader).terms.last
    world.run_until(lambda: world.core(leader).commit >= index)
    world.split([leader, other], [voter, candidate, late])
    world.thaw(candidate)
    world.step(late, e.Received(candidate, requests[0]))  # it was long on its way
    world.run(20_000)
    return world


def test_a_vote_that_was_forgotten_helps_nobody_who_lacks_what_was_committed_since() -> None:
    world = forgotten_vote(marked)
    new = world.leader()
    assert new is not None
    assert b"with the vote of who came back" in [entry.payload for entry in world.nodes[new].live]
    with pytest.raises(AssertionError, match="without entry"):
        forgotten_vote(what_is_committed)

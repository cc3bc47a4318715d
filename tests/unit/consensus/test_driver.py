# The driver on a real loop: whole clusters in one process, over a network that can be cut, on disks that can fail.
from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from idunno.base.errors import (
    DeadlineExceeded,
    Exhausted,
    IdunnoError,
    InvalidArgument,
    NoQuorum,
    NotLeader,
    Unavailable,
    Unconfirmed,
)
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.config import RaftConfig
from idunno.consensus.driver import RaftDriver
from idunno.consensus.log import Log
from idunno.consensus.messages import PAYLOAD_BYTES_MAX, Append, RaftEnvelope, RaftMessage
from tests.unit.fakes import MemoryDisk

FAST = RaftConfig(heartbeat_ms=15, election_timeout_ms=90, election_spread_ms=90, lost_leader_spread_ms=20)
WAIT_S = 5.0


class Cluster:
    """Nodes n1.. with a log each; what they send is packed, unpacked and delivered in a later turn of the loop."""

    def __init__(self, voters: int, *, learners: int = 0, copies: int = 1, config: RaftConfig = FAST) -> None:
        names = [NodeId(f"n{i}") for i in range(1, voters + learners + 1)]
        self.voters, self.learners, self.copies, self.config = names[:voters], names[voters:], copies, config
        self.disks = {name: MemoryDisk() for name in names}
        self.drivers: dict[NodeId, RaftDriver] = {}
        self.machines: dict[NodeId, list[tuple[Index, bytes]]] = {}
        self.cut: set[NodeId] = set()
        self.roles: list[tuple[NodeId, bool, Term]] = []
        self.poison = b"\0poison"

    async def __aenter__(self) -> Cluster:
        for name, disk in self.disks.items():
            await Log.create(disk, b"first" if name in self.voters else None)
            await self.start(name)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(driver.stop(transfer=False) for driver in self.drivers.values()))

    async def start(self, name: NodeId) -> None:
        machine: list[tuple[Index, bytes]] = []
        self.machines[name], last = machine, [0]

        def apply(index: Index, payload: bytes) -> Any:
            if payload == self.poison:
                raise AssertionError("cannot apply")
            assert index == last[0] + 1, "every entry once, in order"
            last[0] = index
            if payload:  # else the no-op of a new term
                machine.append((index, payload))
            return payload.upper()

        driver = RaftDriver(
            name,
            self.disks[name],
            send=lambda to, message: self.send(name, to, message),
            apply=apply,
            config=self.config,
            rng=random.Random(name),
            voters=self.voters,
            members=[*self.voters, *self.learners],
            copies_needed=self.copies,
        )
        driver.on_role.append(lambda leads, term: self.roles.append((name, leads, term)))
        self.drivers[name] = driver
        await driver.start()

    def send(self, sender: NodeId, to: NodeId, message: RaftMessage) -> None:
        if sender in self.cut or to in self.cut or to not in self.drivers:
            return
        data = msgspec.msgpack.encode(RaftEnvelope(message))
        assert len(data) < 1024 * 1024
        arrived = msgspec.msgpack.decode(data, type=RaftEnvelope).message
        asyncio.get_running_loop().call_soon(self.drivers[to].receive, sender, arrived)

    async def kill(self, name: NodeId) -> None:
        """As kill -9: nothing more is written, and the others see the connection close."""
        driver = self.drivers.pop(name)
        self.disks[name].crash(random.Random(1))
        self.disks[name].faults.update(dict.fromkeys(("open", "replace", "rename", "remove", "sync_directory"), "dead"))
        for other in self.drivers.values():
            other.peer_lost(name)
        await driver.stop(transfer=False)
        self.disks[name].faults.clear()

    def leader(self) -> RaftDriver | None:
        leading = [d for n, d in self.drivers.items() if d.is_leader and n not in self.cut]
        return max(leading, key=lambda d: d.term, default=None)

    async def elected(self) -> RaftDriver:
        await until(lambda: self.leader() is not None)
        leader = self.leader()
        assert leader is not None
        return leader


async def until(condition: Callable[[], object]) -> None:
    """Give the loop turns until it holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def story(work: Callable[[Cluster], Awaitable[None]], voters: int, **options: Any) -> None:
    async def run() -> None:
        async with Cluster(voters, **options) as cluster:
            await work(cluster)

    asyncio.run(run())


async def outcome(work: Coroutine[Any, Any, Any]) -> IdunnoError:
    with pytest.raises(IdunnoError) as caught:
        await work
    return caught.value


@pytest.mark.parametrize("voters", [1, 2, 3, 5])
def test_a_proposal_is_applied_everywhere_in_the_same_order_and_answered_with_its_result(voters: int) -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        answers = await asyncio.gather(*(leader.propose(b"p%d" % i, WAIT_S) for i in range(50)))
        assert [value for _, _, value in answers] == [b"P%d" % i for i in range(50)]
        assert sorted({index for index, _, _ in answers}) == [index for index, _, _ in answers]
        last = answers[-1][0]
        for driver in cluster.drivers.values():
            await driver.applied(last, WAIT_S)
        machines = [machine[:51] for machine in cluster.machines.values()]
        assert machines == [machines[0]] * voters
        assert machines[0][0] == (1, b"first")
        assert len(machines[0]) == 51

    story(work, voters)


def test_the_answer_waits_for_the_wanted_copies_learners_included() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        _, copies, _ = await leader.propose(b"x", WAIT_S)
        assert copies >= 4
        cluster.cut.add(cluster.learners[0])
        error = await outcome(leader.propose(b"y", 0.2))
        assert isinstance(error, DeadlineExceeded)
        assert "is committed, 3 of 4 copies synced; no acknowledgement from n4" in str(error)
        leader.set_members(cluster.voters, 3)  # the roster let it go
        assert (await leader.propose(b"z", WAIT_S))[1] == 3

    story(work, 3, learners=1, copies=4)


def test_a_node_that_does_not_lead_says_so_and_names_the_leader() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        other = next(d for d in cluster.drivers.values() if d is not leader)
        await until(lambda: other.leader == leader.me)
        error = await outcome(other.propose(b"x", WAIT_S))
        assert isinstance(error, NotLeader)
        assert leader.me in str(error)
        assert not error.may_have_happened
        assert isinstance(await outcome(other.read_index(WAIT_S)), NotLeader)

    story(work, 3)


def test_when_the_leader_is_killed_the_rest_elects_another_at_once_and_nothing_acknowledged_is_lost() -> None:
    async def work(cluster: Cluster) -> None:
        acknowledged = []
        for number in range(3):
            leader = await cluster.elected()
            for i in range(10):
                index, _, _ = await leader.propose(b"%d.%d" % (number, i), WAIT_S)
                acknowledged.append((index, b"%d.%d" % (number, i)))
            name = leader.me
            await cluster.kill(name)
            await cluster.elected()
            await cluster.start(name)
        leader = await cluster.elected()
        end, _, _ = await leader.propose(b"end", WAIT_S)
        for name, driver in cluster.drivers.items():
            await driver.applied(end, WAIT_S)
            assert set(acknowledged) <= set(cluster.machines[name]), name

    story(work, 3)


def test_after_power_loss_everywhere_all_that_was_acknowledged_is_there() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        answers = await asyncio.gather(*(leader.propose(b"p%d" % i, WAIT_S) for i in range(40)))
        for name in list(cluster.drivers):
            await cluster.kill(name)
        for name in cluster.disks:
            await cluster.start(name)
        leader = await cluster.elected()
        index = await leader.read_index(WAIT_S)
        await leader.applied(index, WAIT_S)
        kept = dict(cluster.machines[leader.me])
        assert all(kept[at] == b"p%d" % i for i, (at, _, _) in enumerate(answers))

    story(work, 3)


def test_a_read_is_never_stale_though_a_deposed_leader_still_thinks_it_leads() -> None:
    async def work(cluster: Cluster) -> None:
        old = await cluster.elected()
        await old.propose(b"old", WAIT_S)
        cluster.cut.add(old.me)
        assert old.is_leader
        read = asyncio.ensure_future(old.read_index(1.0))
        new = await cluster.elected()
        index, _, _ = await new.propose(b"new", WAIT_S)
        assert isinstance(await outcome(asyncio.wait_for(read, WAIT_S)), NotLeader | NoQuorum)
        fresh = await new.read_index(WAIT_S)
        assert fresh >= index
        cluster.cut.clear()
        await old.applied(fresh, WAIT_S)
        assert cluster.machines[old.me][-1] == (index, b"new")

    story(work, 5)


def test_a_proposal_whose_leader_lost_its_majority_may_have_happened() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        cluster.cut.update(n for n in cluster.voters if n != leader.me)
        error = await outcome(leader.propose(b"x", WAIT_S))
        assert isinstance(error, Unconfirmed)
        assert error.may_have_happened
        assert "the leadership was lost: entry" in str(error)

    story(work, 3)


def test_a_leader_that_hears_no_majority_appends_nothing_and_says_no_quorum() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        await leader.propose(b"x", WAIT_S)
        cluster.cut.update(n for n in cluster.voters if n != leader.me)
        await until(lambda: leader.answering() == 1)
        before = leader.last_index
        error = await outcome(leader.propose(b"y", WAIT_S))
        assert isinstance(error, NoQuorum)
        assert "1 of 3 voters answer, 2 are needed" in str(error)
        assert leader.last_index == before
        await until(lambda: not leader.is_leader)
        assert isinstance(await outcome(leader.propose(b"y", WAIT_S)), NotLeader)  # soon after, an election is likely
        await until(lambda: "no leader for" in str(leader_error(leader)))

    def leader_error(driver: RaftDriver) -> IdunnoError | None:
        try:
            driver._callers.leading()
        except IdunnoError as error:
            return error
        return None

    story(work, 3)


def test_a_deadline_says_what_was_waited_for() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        cluster.cut.update(n for n in cluster.voters if n != leader.me)
        error = await outcome(leader.propose(b"x", 0.02))
        assert isinstance(error, DeadlineExceeded)
        assert "is synced on 1 nodes, not committed: 2 of 3 voters are needed" in str(error)
        error = await outcome(leader.applied(Index(10_000), 0.01))
        assert "entry 10000 not applied here after 0.01 s: applied" in str(error)
        error = await outcome(leader.read_index(0.01))
        assert "1 of 3 voters answer" in str(error) or "of 3 voters answer, committed" in str(error)
        assert leader._callers._awaited._heap == []

    story(work, 3)


def test_each_proposal_has_its_own_deadline_though_one_timer_serves_all() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        cluster.cut.update(n for n in cluster.voters if n != leader.me)
        loop, ended = asyncio.get_running_loop(), list[tuple[float, float]]()

        async def propose(timeout_s: float) -> None:
            begun_s = loop.time()
            error = await outcome(leader.propose(b"x", timeout_s))
            assert f"no answer after {timeout_s:g} s" in str(error)
            ended.append((timeout_s, loop.time() - begun_s))

        long = asyncio.create_task(propose(WAIT_S))
        await asyncio.gather(propose(0.05), propose(0.01), propose(0.03))
        assert [timeout_s for timeout_s, _ in ended] == [0.01, 0.03, 0.05]
        assert all(took_s >= timeout_s - 0.001 for timeout_s, took_s in ended)
        long.cancel()
        await asyncio.wait({long})
        assert leader._callers._proposals == {}

    story(work, 3)


def test_bounds_are_kept_and_named() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        for payload in (b"", bytes(PAYLOAD_BYTES_MAX + 1)):
            assert isinstance(await outcome(leader.propose(payload, WAIT_S)), InvalidArgument)
        await leader.propose(b"x", WAIT_S)  # nothing of the election waits any more
        answers = await asyncio.gather(*(leader.propose(b"x", WAIT_S) for _ in range(30)), return_exceptions=True)
        refused = [a for a in answers if isinstance(a, Exhausted)]
        assert len(refused) == 20
        assert "10 proposals wait" in str(refused[0])
        assert (await leader.propose(bytes(PAYLOAD_BYTES_MAX), WAIT_S))[2] == bytes(PAYLOAD_BYTES_MAX)

    story(work, 3, config=replace(FAST, proposals_max=10))


def test_what_a_leader_inherits_is_no_proposal_of_its_own() -> None:
    """After a restart of all nobody knows what is committed: with a long log the new leader refused everything until it was."""

    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        for _ in range(30):
            await leader.propose(b"x", WAIT_S)
        for name in cluster.voters:
            await cluster.kill(name)
        for name in cluster.voters:
            await cluster.start(name)
        async with asyncio.timeout(WAIT_S):
            while (new := cluster.leader()) is None:  # noqa: ASYNC110
                await asyncio.sleep(0)  # each turn is looked at
        assert new.last_index - new.commit >= 30
        answers = await asyncio.gather(*(new.propose(b"y", WAIT_S) for _ in range(30)), return_exceptions=True)
        assert [isinstance(answer, Exhausted) for answer in answers] == [False] * 10 + [True] * 20

    story(work, 3, config=replace(FAST, proposals_max=10))


def test_a_proposal_that_is_cancelled_leaves_nothing_behind() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        cluster.cut.update(n for n in cluster.voters if n != leader.me)
        task = asyncio.ensure_future(leader.propose(b"x", WAIT_S))
        await until(lambda: leader._callers._proposals)
        task.cancel()
        await asyncio.wait({task})
        assert not leader._callers._proposals

    story(work, 3)


def test_the_role_is_told_when_the_no_op_of_the_term_is_applied_and_when_it_is_lost() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        await until(lambda: (leader.me, True, leader.term) in cluster.roles)
        assert leader.applied_index >= 2
        cluster.cut.update(n for n in cluster.voters if n != leader.me)
        await until(lambda: any(name == leader.me and not leads for name, leads, _ in cluster.roles))
        told = [leads for name, leads, _ in cluster.roles if name == leader.me]
        assert told == [True, False]

    story(work, 3)


def test_who_leads_is_told_on_every_node() -> None:
    async def work(cluster: Cluster) -> None:
        told: dict[NodeId, list[tuple[NodeId | None, Term]]] = {name: [] for name in cluster.voters}
        for name, driver in cluster.drivers.items():
            driver.on_leader.append(lambda leader, term, name=name: told[name].append((leader, term)))  # type: ignore[misc]
        leader = await cluster.elected()
        await until(lambda: all(seen and seen[-1] == (leader.me, leader.term) for seen in told.values()))

    story(work, 3)


def test_before_it_is_started_it_answers_that_it_is_not_running() -> None:
    async def work() -> None:
        driver = RaftDriver(
            NodeId("n1"),
            MemoryDisk(),
            send=lambda to, message: None,
            apply=lambda index, payload: None,
            config=FAST,
            rng=random.Random(1),
            voters=[NodeId("n1")],
        )
        assert (driver.leader, driver.is_leader, driver.term, driver.last_index, driver.lag()) == (
            None,
            False,
            0,
            0,
            {},
        )
        assert "is not running" in str(await outcome(driver.propose(b"x", WAIT_S)))
        driver.peer_lost(NodeId("n1"))
        await driver.stop(transfer=True)

    asyncio.run(work())


def test_stop_hands_the_leadership_over_before_it_ends() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        await leader.propose(b"x", WAIT_S)
        term = leader.term
        await leader.stop(transfer=True)
        del cluster.drivers[leader.me]
        new = await cluster.elected()
        assert new.term == term + 1  # one election, asked for, and no other
        assert isinstance(await outcome(leader.propose(b"y", WAIT_S)), NotLeader)

    story(
        work,
        3,
        config=RaftConfig(heartbeat_ms=15, election_timeout_ms=1_000, election_spread_ms=1_000) if False else FAST,
    )


def test_a_leader_whose_disk_refuses_steps_aside_and_comes_back_when_it_works_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("idunno.consensus.health.DISK_RETRY_S", 0.02)

    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        await leader.propose(b"x", WAIT_S)
        disk = cluster.disks[leader.me]
        disk.faults["write"] = "No space left on device"
        error = await outcome(leader.propose(b"y", WAIT_S))
        assert isinstance(error, Unconfirmed)
        assert leader.problem is not None
        assert "No space left on device" in leader.problem
        assert "No space left" in str(await outcome(leader.propose(b"y", WAIT_S)))
        new = await cluster.elected()
        assert new is not leader
        index, _, _ = await new.propose(b"z", WAIT_S)
        disk.faults.clear()
        await until(lambda: leader.problem is None)
        await leader.applied(index, WAIT_S)
        await until(lambda: new.lag()[leader.me] == 0)

    story(work, 3)


def test_a_node_whose_log_cannot_be_read_for_a_while_applies_on_when_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.consensus.health.DISK_RETRY_S", 0.02)

    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        index, _, _ = await leader.propose(b"x", WAIT_S)
        name = next(name for name in cluster.drivers if name != leader.me)
        await cluster.kill(name)
        await cluster.start(name)  # what it holds already it reads from its disk again
        cluster.disks[name].faults["read"] = "Input/output error"
        restarted = cluster.drivers[name]
        await until(lambda: restarted.problem is not None)
        assert "cannot be read" in str(restarted.problem)
        cluster.disks[name].faults.clear()
        await restarted.applied(index, WAIT_S)
        await until(lambda: restarted.problem is None)

    story(work, 3)


def test_an_entry_that_cannot_be_applied_stops_the_node_and_it_says_so() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        assert isinstance(await outcome(leader.propose(cluster.poison, WAIT_S)), Unconfirmed)
        assert leader.problem is not None
        assert "cannot apply" in leader.problem
        assert isinstance(await outcome(leader.applied(Index(10_000), WAIT_S)), Unavailable)
        assert not leader.is_leader

    story(work, 3)


def test_a_follower_that_is_far_behind_is_fed_from_the_disk() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        late = next(n for n in cluster.voters if n != leader.me)
        await cluster.kill(late)
        leader._log._cache_bytes_max = 10_000
        for i in range(40):
            await leader.propose(b"%02d" % i * 1_000, WAIT_S)
        assert leader._log.cached(2, leader.last_index) is None
        await cluster.start(late)
        await cluster.drivers[late].applied(leader.last_index, WAIT_S)
        assert cluster.machines[late] == cluster.machines[leader.me]

    story(work, 3)


def test_a_leader_that_cannot_read_old_entries_for_a_while_feeds_a_late_follower_when_it_can() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        late = next(n for n in cluster.voters if n != leader.me)
        await cluster.kill(late)
        leader._log._cache_bytes_max = 10_000
        for i in range(40):
            await leader.propose(b"%02d" % i * 1_000, WAIT_S)
        tried = asyncio.Event()
        read = leader._log.read

        async def refused(first: int, last: int) -> list[bytes]:
            tried.set()
            return await read(first, last)

        leader._log.read = refused  # type: ignore[method-assign]
        cluster.disks[leader.me].faults["open"] = "Too many open files"
        await cluster.start(late)
        await tried.wait()
        cluster.disks[leader.me].faults.clear()
        await cluster.drivers[late].applied(leader.last_index, WAIT_S)
        assert leader.problem is None

    story(work, 3)


def test_while_one_sync_runs_all_that_comes_shares_the_next() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        disk = cluster.disks[leader.me]
        await leader.propose(b"x", WAIT_S)
        gate = disk.sync_gate = asyncio.Event()
        proposals = []
        for i in range(50):
            proposals.append(asyncio.ensure_future(leader.propose(b"%d" % i, WAIT_S)))
            await asyncio.sleep(0)
        before = disk.syncs
        gate.set()
        await asyncio.gather(*proposals)
        assert disk.syncs - before <= 3

    story(work, 3)


def test_idle_nodes_say_little() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        await leader.propose(b"x", WAIT_S)
        await until(lambda: all(d.applied_index == leader.applied_index for d in cluster.drivers.values()))
        sent: list[bytes] = []
        real = cluster.send

        def count(sender: NodeId, to: NodeId, message: RaftMessage) -> None:
            assert not isinstance(message, Append) or not message.entries
            sent.append(msgspec.msgpack.encode(RaftEnvelope(message)))
            real(sender, to, message)

        cluster.send = count  # type: ignore[method-assign]
        await until(lambda: len(sent) >= 8)
        assert max(len(data) for data in sent) < 120

    story(work, 3)

# Snapshots and changes of voters with whole drivers on a real loop: taken, sent, installed, interrupted.
from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from idunno.base.errors import Conflict, Corrupt, DecodeError, InvalidArgument, NotLeader, Unavailable
from idunno.base.ids import Index, NodeId
from idunno.consensus import snapshot as files
from idunno.consensus.config import RaftConfig
from idunno.consensus.driver import RaftDriver
from idunno.consensus.messages import Install, InstallAnswer, RaftMessage
from idunno.consensus.voters import encode_voters, names_voters
from tests.unit.consensus.test_driver import WAIT_S, Cluster, outcome, until

CONFIG = RaftConfig(
    heartbeat_ms=15,
    election_timeout_ms=90,
    election_spread_ms=90,
    lost_leader_spread_ms=20,
    snapshot_entries=20,
    keep_entries=3,
    segment_bytes=64 * 1024,
)
BIG = bytes(60_000)  # a few entries make a snapshot of several messages


class Machine:
    """Holds every payload; the snapshot leaves out `small` ones, which are to be fetched."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, bytes]] = []
        self.last = 0
        self.restored = self.captured = self.last_captured = 0
        self.settlements: list[int] = []
        self.secured = asyncio.Event()
        self.secured.set()
        self.unreachable = 0  # so often fetching fails
        self.offered: list[list[bytes]] = []  # of the log, for each snapshot

    def apply(self, index: Index, payload: bytes) -> Any:
        assert index == self.last + 1, "every entry once, in order"
        self.last = index
        if payload and not names_voters(payload):
            self.entries.append((index, payload))
        return payload.upper()

    def capture(self) -> Iterator[bytes]:
        self.captured += 1
        self.last_captured = self.last
        taken, last = list(self.entries), self.last
        rows = (msgspec.msgpack.encode((last, entry)) for entry in [*taken, (0, b"")])
        return (len(row).to_bytes(4, "big") + row for row in rows)

    async def room(self) -> None:
        pass

    async def secure(self, payloads: AsyncGenerator[bytes]) -> None:
        self.offered.append([payload async for payload in payloads])
        await self.secured.wait()

    async def settled(self) -> None:
        self.settlements.append(self.last_captured)

    def restore(self) -> Restoring:
        return Restoring(self)


class Restoring:
    def __init__(self, machine: Machine) -> None:
        self._machine, self._data = machine, bytearray()

    def feed(self, piece: bytes) -> None:
        self._data += piece

    async def finish(self) -> None:
        self._rows: list[tuple[int, tuple[int, bytes]]] = []
        at = 0
        while at < len(self._data):
            end = at + 4 + int.from_bytes(self._data[at : at + 4], "big")
            row = msgspec.msgpack.decode(self._data[at + 4 : end], type=tuple[int, tuple[int, bytes]])
            self._rows.append(row)
            at = end
        if not self._rows or self._rows[-1][1] != (0, b""):
            raise DecodeError("no machine")

    async def complete(self, leader: NodeId) -> None:
        if self._machine.unreachable:
            self._machine.unreachable -= 1
            raise Unavailable("a small content is missing")

    def install(self) -> None:
        self._machine.entries = [(at, payload) for _, (at, payload) in self._rows[:-1]]
        self._machine.last = self._rows[0][0]
        self._machine.restored += 1


class Snapshotting(Cluster):
    def __init__(self, voters: int, *, config: RaftConfig = CONFIG, **options: Any) -> None:
        super().__init__(voters, config=config, **options)
        self.holders: dict[NodeId, Machine] = {}
        self.swallows: Callable[[NodeId, RaftMessage], bool] = lambda to, message: False

    async def start(self, name: NodeId) -> None:
        machine = self.holders[name] = Machine()
        driver = RaftDriver(
            name,
            self.disks[name],
            send=lambda to, message: None if self.swallows(to, message) else self.send(name, to, message),
            apply=machine.apply,
            config=self.config,
            rng=random.Random(name),
            voters=self.voters,
            members=[*self.voters, *self.learners],
            copies_needed=self.copies,
            machine=machine,
        )
        self.drivers[name] = driver
        await driver.start()

    async def fill(self, count: int, payload: bytes = b"x") -> Index:
        """On whoever leads."""
        index = Index(0)
        for number in range(count):
            leader = await self.elected()
            index, _, _ = await leader.propose(b"%d" % number + payload, WAIT_S)
        return index

    async def left_behind(self) -> NodeId:
        """A follower that was away while the log was cut."""
        leader = await self.elected()
        late = next(name for name in self.drivers if name != leader.me)
        await self.kill(late)
        await self.fill(60, BIG)
        leader = await self.elected()
        await until(lambda: leader._core.terms.base > 5)
        return late

    async def sending(self) -> tuple[RaftDriver, Index]:
        """A leader that sends a snapshot, and which. One just elected learns by what it cuts that somebody lacks it."""
        async with asyncio.timeout(WAIT_S):
            while True:
                leader = await self.elected()
                snapshots = leader._snapshots
                assert snapshots is not None
                if snapshots._sending:
                    return leader, snapshots.index
                await self.fill(20)

    async def same(self, name: NodeId) -> None:
        """`name` has all that the leader has."""
        leader = await self.elected()
        index = await leader.read_index(WAIT_S)
        await leader.applied(index, WAIT_S)
        await self.drivers[name].applied(index, WAIT_S)
        assert self.holders[name].entries == self.holders[leader.me].entries


def story(work: Callable[[Snapshotting], Awaitable[None]], voters: int = 3, **options: Any) -> None:
    async def run() -> None:
        cluster = Snapshotting(voters, **options)
        async with cluster:
            await work(cluster)

    asyncio.run(run())


def test_a_snapshot_is_taken_the_log_is_cut_and_a_restart_goes_on_from_both() -> None:
    async def work(cluster: Snapshotting) -> None:
        await cluster.fill(100)
        await until(lambda: all(d._core.terms.base > 20 for d in cluster.drivers.values()))
        before = cluster.holders[NodeId("n1")].entries
        for name in list(cluster.drivers):
            await cluster.kill(name)
        for name in cluster.disks:
            await cluster.start(name)
            assert cluster.holders[name].restored == 1
        await cluster.fill(1)
        for name in cluster.drivers:
            await cluster.same(name)
        assert cluster.holders[NodeId("n1")].entries[: len(before)] == before

    story(work)


def test_who_was_away_while_the_log_was_cut_is_sent_a_snapshot_in_pieces_and_goes_on() -> None:
    async def work(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        sent: list[Install] = []

        def watch(to: NodeId, message: RaftMessage) -> bool:
            if isinstance(message, Install):
                sent.append(message)
            return False

        cluster.swallows = watch
        await cluster.start(late)
        await until(lambda: cluster.holders[late].restored)
        await cluster.same(late)
        assert len(sent) >= 4  # how much is in it depends on when it was taken
        assert max(len(message.data) for message in sent) <= 256 * 1024
        await cluster.fill(5)
        await cluster.same(late)

    story(work)


def test_who_was_away_for_so_long_that_the_snapshot_begun_for_it_is_too_old_is_sent_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("idunno.consensus.install.RESEND_S", 0.02)

    async def work(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        leader, begun = await cluster.sending()
        await cluster.fill(200)
        await until(lambda: leader._core.terms.base > begun)  # what was begun ends before the log
        await cluster.start(late)
        await cluster.same(late)

    story(work)


def test_lost_pieces_and_lost_answers_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.consensus.install.RESEND_S", 0.02)

    async def work(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        rng = random.Random(1)
        cluster.swallows = lambda to, m: isinstance(m, Install | InstallAnswer) and rng.random() < 0.3
        await cluster.start(late)
        await until(lambda: cluster.holders[late].restored)
        await cluster.same(late)

    story(work)


def test_a_follower_that_is_killed_at_any_moment_of_an_installation_gets_there_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("idunno.consensus.install.RESEND_S", 0.02)

    async def work(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        for turns in (1, 5, 20, 40, 60, 80, 100, 120, 150, 200):
            await cluster.start(late)
            for _ in range(turns):
                await asyncio.sleep(0)
            await cluster.kill(late)
        await cluster.start(late)
        await cluster.same(late)

    story(work)


def test_a_snapshot_counts_only_when_what_it_refers_to_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.consensus.install.RESEND_S", 0.05)

    async def work(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        await cluster.start(late)
        cluster.holders[late].unreachable = 3
        await until(lambda: cluster.holders[late].unreachable < 3)
        assert not cluster.holders[late].restored
        assert files.PATH not in cluster.disks[late].paths() or cluster.drivers[late].snapshot_index < 30
        await until(lambda: cluster.holders[late].restored)
        assert cluster.holders[late].unreachable == 0
        await cluster.same(late)

    story(work)


def test_who_cannot_complete_a_snapshot_keeps_its_leader_from_letting_go_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("idunno.consensus.install.RESEND_S", 0.02)
    monkeypatch.setattr("idunno.consensus.install.COMPLETE_S", 0.3)
    monkeypatch.setattr("idunno.consensus.install.INCOMPLETE_RETRY_S", 0.5)

    async def work(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        leader = await cluster.elected()
        machine = cluster.holders[leader.me]
        await cluster.start(late)
        cluster.holders[late].unreachable = 1_000_000
        snapshots = leader._snapshots
        assert snapshots is not None
        await until(lambda: cluster.holders[late].unreachable < 1_000_000)
        await until(lambda: late not in snapshots._silent)
        settled = len(machine.settlements)
        await until(lambda: late in snapshots._silent)
        async with asyncio.timeout(WAIT_S):
            while len(machine.settlements) == settled:
                await cluster.fill(5)
        cluster.holders[late].unreachable = 0
        await cluster.same(late)

    story(work)


def test_who_waits_with_a_snapshot_for_one_of_its_own_says_that_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.consensus.install.RESEND_S", 0.02)

    async def work(cluster: Snapshotting) -> None:
        late, at_it = await cluster.left_behind(), 0

        def heard(to: NodeId, message: RaftMessage) -> bool:
            nonlocal at_it
            at_it += isinstance(message, InstallAnswer) and not message.done and message.offset > 0
            return False

        await cluster.start(late)
        snapshots = cluster.drivers[late]._snapshots
        assert snapshots is not None
        async with snapshots._lock:
            await until(lambda: snapshots._part is not None and snapshots._part.have > 0 and not snapshots._inbox)
            cluster.swallows = heard
            await until(lambda: at_it > 20)
            assert not cluster.holders[late].restored
        await cluster.same(late)

    story(work)


def test_the_log_is_not_cut_before_what_it_brought_is_secured() -> None:
    async def work(cluster: Snapshotting) -> None:
        machine = cluster.holders[NodeId("n1")]
        machine.secured.clear()
        await cluster.fill(80)
        await until(lambda: machine.captured)
        driver = cluster.drivers[NodeId("n1")]
        assert (driver.snapshot_index, driver._core.terms.base) == (0, 0)
        machine.secured.set()
        await until(lambda: driver.snapshot_index > 0)
        await cluster.fill(60)
        await until(lambda: driver._core.terms.base > 0)

    story(work, voters=1)


def test_a_snapshot_is_offered_all_entries_since_the_last_one_while_the_log_has_them() -> None:
    async def work(cluster: Snapshotting) -> None:
        await cluster.fill(130, BIG)
        machine = cluster.holders[NodeId("n1")]
        await until(lambda: len(machine.offered) >= 3)
        assert cluster.drivers[NodeId("n1")]._core.terms.base > 0
        offered = dict.fromkeys(
            payload for payloads in machine.offered for payload in payloads if len(payload) > len(BIG)
        )
        brought = [payload for _, payload in machine.entries if len(payload) > len(BIG)]
        assert list(offered) == brought[: len(offered)]
        assert len(offered) >= 50

    story(work, voters=1)


def test_what_a_snapshot_does_not_refer_to_is_let_go_of_when_it_counts_and_nobody_wants_an_older_one() -> None:
    async def work(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        leader = await cluster.elected()
        machine = cluster.holders[leader.me]
        await until(lambda: machine.settlements)
        # One takes a snapshot in and answers, but never has all of it: the leader takes more itself.
        cluster.swallows = lambda to, message: (
            isinstance(message, Install) and message.offset + len(message.data) == message.size
        )
        await cluster.start(late)
        await until(lambda: leader.busy_with_snapshot)
        before, index = len(machine.settlements), leader.snapshot_index
        await cluster.fill(100)
        await until(lambda: leader.snapshot_index > index)
        assert len(machine.settlements) == before
        cluster.swallows = lambda to, message: False
        await cluster.same(late)
        await until(lambda: not leader.busy_with_snapshot)
        await cluster.fill(60)
        await until(lambda: machine.settlements[before:] and machine.settlements[-1] == leader.snapshot_index)

    story(work)


def test_a_snapshot_that_does_not_count_lets_nothing_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.consensus.install.RETRY_S", 0.02)

    async def work(cluster: Snapshotting) -> None:
        name = NodeId("n1")
        cluster.disks[name].faults["rename"] = "No space left on device"
        await cluster.fill(60)
        await until(lambda: cluster.holders[name].captured and not cluster.drivers[name].busy_with_snapshot)
        assert cluster.drivers[name].snapshot_index == 0
        assert cluster.holders[name].settlements == []

    story(work, voters=1)


def test_a_damaged_snapshot_on_disk_is_named_at_start() -> None:
    async def work(cluster: Snapshotting) -> None:
        name = NodeId("n1")
        await cluster.fill(60)
        await until(lambda: cluster.drivers[name].snapshot_index > 0)
        await cluster.kill(name)
        cluster.disks[name].flip(files.PATH, 100)
        with pytest.raises(Corrupt, match=files.PATH):
            await cluster.start(name)
        cluster.drivers.clear()

    story(work, voters=1)


def test_a_full_disk_takes_no_snapshot_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.consensus.install.RETRY_S", 0.02)

    async def work(cluster: Snapshotting) -> None:
        disk = cluster.disks[NodeId("n1")]
        disk.faults["rename"] = "No space left on device"
        await cluster.fill(60)
        driver = cluster.drivers[NodeId("n1")]
        await until(lambda: cluster.holders[NodeId("n1")].captured and not driver.busy_with_snapshot)
        assert driver.snapshot_index == 0
        assert files.NEW_PATH not in disk.paths()  # what it took is free again
        disk.faults.clear()
        async with asyncio.timeout(WAIT_S):
            while cluster.drivers[NodeId("n1")].snapshot_index == 0:
                await cluster.fill(1)

    story(work, voters=1)


def test_a_disk_that_refuses_everything_for_a_moment_ends_no_taking_and_no_taking_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file cannot be written, and then what is there of it and the reserve cannot be removed either."""
    monkeypatch.setattr("idunno.consensus.install.RETRY_S", 0.02)
    monkeypatch.setattr("idunno.consensus.install.RESEND_S", 0.02)

    async def taking(cluster: Snapshotting) -> None:
        name = NodeId("n1")
        cluster.disks[name].faults.update(rename="Input/output error", remove="Input/output error")
        await cluster.fill(60)
        async with asyncio.timeout(WAIT_S):
            while cluster.holders[name].captured < 2:  # tried again: the first attempt has come to its end
                await cluster.fill(1)
        cluster.disks[name].faults.clear()
        await until(lambda: cluster.drivers[name].problem is None)
        async with asyncio.timeout(WAIT_S):
            while cluster.drivers[name].snapshot_index == 0:
                await cluster.fill(1)

    async def taking_in(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        tried = 0

        def refuse(to: NodeId, message: RaftMessage) -> bool:
            nonlocal tried
            if to == late and isinstance(message, Install) and not tried:
                cluster.disks[late].faults.update(rename="Input/output error", remove="Input/output error")
            tried += isinstance(message, Install)
            return False

        cluster.swallows = refuse
        await cluster.start(late)
        await until(lambda: tried > 20)
        cluster.disks[late].faults.clear()
        await until(lambda: cluster.holders[late].restored)
        await cluster.same(late)

    story(taking, voters=1)
    story(taking_in)


def test_the_log_does_not_grow_from_snapshot_to_snapshot_when_bytes_make_them_due() -> None:
    config = replace(CONFIG, snapshot_entries=1_000_000, snapshot_bytes=400_000, snapshot_rest=0)  # when, not how fast

    async def work(cluster: Snapshotting) -> None:
        await cluster.fill(1)
        driver, machine, sizes = cluster.drivers[NodeId("n1")], cluster.holders[NodeId("n1")], list[int]()
        for _ in range(12):
            await cluster.fill(8, BIG)
            sizes.append(driver._log.size_bytes)
            machine.entries.clear()  # it stays small
        assert machine.captured >= 8  # one each 400 kB of 5.8 MB, but for those that came too late
        assert max(sizes) < 1_300_000, sizes  # one that is due, one that is being taken, the tail

    story(work, voters=1, config=config)


@pytest.mark.parametrize("entries", [4, 1_000_000])
def test_the_larger_the_last_snapshot_the_later_the_next_one(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that only grows is written when it has doubled, or more; also one that was restarted."""
    monkeypatch.setattr("idunno.consensus.install.LIGHT_BYTES", 4 * len(BIG))
    log_bytes = 2 * 4 * len(BIG) if entries > 4 else 1_000_000_000
    config = replace(CONFIG, keep_entries=0, snapshot_rest=0, snapshot_entries=entries, snapshot_bytes=log_bytes)

    async def work(cluster: Snapshotting) -> None:
        name = NodeId("n1")

        async def grow(entries: int) -> int:
            """How many snapshots were taken meanwhile."""
            before = cluster.holders[name].captured
            for _ in range(entries):
                await cluster.fill(1, BIG)
                await until(lambda: not cluster.drivers[name].busy_with_snapshot)
            return cluster.holders[name].captured - before

        assert 3 <= await grow(120) <= 6  # behind 4 or 5, 8 to 10, 16 to 20, ..., not 30 times
        await cluster.kill(name)
        await cluster.start(name)
        await grow(1)
        assert await grow(20) == 0

    story(work, voters=1, config=config)


def test_a_node_that_restarts_again_and_again_takes_snapshots_by_bytes_all_the_same() -> None:
    config = replace(CONFIG, keep_bytes=0, snapshot_rest=0, snapshot_entries=1_000_000, snapshot_bytes=400_000)

    async def work(cluster: Snapshotting) -> None:
        name, captured = NodeId("n1"), 0
        for _ in range(30):
            await cluster.fill(2, BIG)
            await until(lambda: not cluster.drivers[name].busy_with_snapshot)
            captured += cluster.holders[name].captured
            await cluster.kill(name)
            await cluster.start(name)
        assert captured >= 2

    story(work, voters=1, config=config)


def test_a_disk_too_full_for_a_new_segment_is_no_reason_to_keep_the_old_ones() -> None:
    async def work(cluster: Snapshotting) -> None:
        name = NodeId("n1")
        await cluster.fill(10, BIG)  # a segment each
        cluster.disks[name].faults["allocate"] = "No space left on device"
        await cluster.fill(15)
        driver = cluster.drivers[name]
        await until(lambda: driver._core.terms.base > 5)

    story(work, voters=1)


def test_who_was_away_for_long_is_sent_the_newest_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not keep the leader from taking them, nor an old file's space from being freed."""
    monkeypatch.setattr("idunno.consensus.install.RESEND_S", 0.02)

    async def work(cluster: Snapshotting) -> None:
        late = await cluster.left_behind()
        offered: list[int] = []

        def lost(to: NodeId, message: RaftMessage) -> bool:
            if isinstance(message, Install):
                offered.append(message.index)
            return isinstance(message, Install)

        cluster.swallows = lost
        await cluster.start(late)
        await until(lambda: offered)
        for _ in range(3):
            begun = (await cluster.elected()).snapshot_index
            async with asyncio.timeout(WAIT_S):
                while (await cluster.elected()).snapshot_index <= begun or offered[-1] <= begun:
                    await cluster.fill(5)
        cluster.swallows = lambda to, message: False
        await cluster.same(late)

    story(work)


# -- voters ------------------------------------------------------------------------------------------------------------


def test_voters_join_and_go_one_at_a_time_and_stay_so_after_a_restart() -> None:
    async def work(cluster: Snapshotting) -> None:
        leader = await cluster.elected()
        await leader.propose(b"x", WAIT_S)
        one, two, three = (NodeId(f"n{i}") for i in (1, 2, 3))
        assert leader.voters == {one}
        await leader.change_voters([one, two], WAIT_S)
        await leader.change_voters([one, two, three], WAIT_S)
        await until(lambda: all(driver.voters == {one, two, three} for driver in cluster.drivers.values()))
        await cluster.kill(one)
        leader = await cluster.elected()
        assert leader.me in (two, three)
        await leader.propose(b"y", WAIT_S)  # the no-op of its term is committed: only then may voters change
        await leader.change_voters([two, three], WAIT_S)
        await cluster.fill(60)
        await cluster.start(one)
        await cluster.same(one)
        assert cluster.drivers[one].voters == {two, three}

    story(work, voters=1, learners=2)


def test_a_leader_that_removes_itself_hands_over() -> None:
    async def work(cluster: Snapshotting) -> None:
        leader = await cluster.elected()
        await leader.propose(b"x", WAIT_S)
        rest = leader.voters - {leader.me}
        await leader.change_voters(rest, WAIT_S)
        await until(lambda: not leader.is_leader)
        await until(lambda: (new := cluster.leader()) is not None and new.me in rest)
        await cluster.fill(3)
        await cluster.same(leader.me)

    story(work)


def test_what_cannot_be_a_change_of_voters_is_refused_and_nothing_happens() -> None:
    async def work(cluster: Snapshotting) -> None:
        leader = await cluster.elected()
        await leader.propose(b"x", WAIT_S)
        other = next(driver for driver in cluster.drivers.values() if driver is not leader)
        last = leader.last_index
        assert isinstance(await outcome(leader.change_voters([leader.me], WAIT_S)), Conflict)
        assert isinstance(await outcome(leader.change_voters([], WAIT_S)), Conflict)
        assert isinstance(await outcome(leader.change_voters(leader.voters, WAIT_S)), Conflict)
        assert isinstance(await outcome(other.change_voters([other.me], WAIT_S)), NotLeader)
        assert isinstance(await outcome(leader.propose(encode_voters([leader.me]), WAIT_S)), InvalidArgument)
        assert leader.last_index == last

    story(work)

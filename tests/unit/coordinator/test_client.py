"""Proposing and reading from any node: forwarding, following the leader, retrying what may be retried, and giving up."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest

from idunno.base.errors import (
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    Exhausted,
    IdunnoError,
    Incompatible,
    InvalidArgument,
    NoQuorum,
    NotFound,
    NotReady,
    PermissionDenied,
    Unavailable,
    Unconfirmed,
)
from idunno.base.ids import NodeId
from idunno.coordinator import commands as c
from idunno.coordinator import reads
from idunno.coordinator.applier import Applier
from idunno.coordinator.client import is_idempotent
from idunno.coordinator.effects import Effect
from idunno.coordinator.machine import Machine
from idunno.coordinator.messages import PROPOSE, Propose
from idunno.coordinator.names import output_name
from idunno.coordinator.namespace import small_block
from idunno.coordinator.results import PutDone, PutOpen, convert
from idunno.coordinator.service import CoordinatorService
from idunno.wire.calls import Empty, Peer
from idunno.wire.security import make_ca
from tests.unit.coordinator.fakes import FakeCluster, until
from tests.unit.coordinator.world import ALICE, BOB, N1, N2, N3, READER, SYSTEM, World, block

CA_PEM, CA_KEY_PEM = make_ca()


def cluster(leader: Any = N1) -> FakeCluster:
    made = FakeCluster()
    made.begin([N1, N2, N3])
    for node in made.nodes.values():
        CoordinatorService(node.coordinator, node, ca_pem=CA_PEM, ca_key_pem=lambda: CA_KEY_PEM)
    made.lead(leader)
    return made


def small(put: str = "p1", name: str = "a") -> c.PutSmall:
    return c.PutSmall(put, name, small_block(b"x").block, b"x")


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


def test_a_command_reaches_the_leader_from_any_node_and_its_result_comes_back_typed() -> None:
    async def story() -> None:
        world = cluster()
        for i, node in enumerate((N1, N2, N3)):
            result, copies = await world.nodes[node].coordinator.propose(small(f"p{i}"), actor=ALICE, timeout_s=5)
            assert (result, copies) == (PutDone("a", i + 1, 1, 1_000), 3)
        assert world.calls == [(N2, N1, "coordinator.propose"), (N3, N1, "coordinator.propose")]

    run(story())


def test_nested_records_survive_the_way_back() -> None:
    async def story() -> None:
        world = cluster()
        node = world.nodes[N2].coordinator
        await node.propose(small(), actor=ALICE, timeout_s=5)
        result, _ = await node.propose(c.BeginPut("p1", "a"), actor=ALICE, timeout_s=5)
        assert isinstance(result, PutOpen)
        assert result.committed == world.nodes[N1].driver.machine.namespace.latest("a")

    run(story())


def test_a_refusal_arrives_as_the_class_that_was_raised_and_enters_no_log() -> None:
    async def story() -> None:
        world = cluster()
        node = world.nodes[N3].coordinator
        await node.propose(small(), actor=ALICE, timeout_s=5)
        logged = len(world.log)
        with pytest.raises(PermissionDenied, match="a belongs to alice"):
            await node.propose(small("p2"), actor=BOB, timeout_s=5)
        with pytest.raises(PermissionDenied, match="takes the role user"):
            await node.propose(small("p2"), actor=READER, timeout_s=5)
        with pytest.raises(InvalidArgument):
            await node.propose(small("p2", "a\u200bb"), actor=ALICE, timeout_s=5)
        assert len(world.log) == logged
        with pytest.raises(Conflict, match="not open"):
            await node.propose(c.CommitPut("p9", "a", 10, (block("x"),)), actor=ALICE, timeout_s=5)

    run(story())


def test_a_leader_that_is_behind_refuses_only_by_what_is_true() -> None:
    async def story() -> None:
        world = cluster()
        await world.nodes[N1].coordinator.propose(small(), actor=ALICE, timeout_s=5)
        world.catch_up(N2)
        await world.nodes[N1].coordinator.propose(c.DeleteFile("a"), actor=ALICE, request="d", timeout_s=5)
        world.lead(N2)  # its machine still shows alice's file
        result, _ = await world.nodes[N2].coordinator.propose(small("p2"), actor=BOB, timeout_s=5)
        assert result.version == 2

    run(story())


def test_a_proposer_waits_for_a_leader_to_be_known() -> None:
    async def story() -> None:
        world = cluster(leader=None)
        node = world.nodes[N2].coordinator
        asked = asyncio.create_task(node.propose(small(), actor=ALICE, timeout_s=5))
        await until(lambda: bool(node._waiters))
        assert not asked.done()
        world.lead(N3)
        assert (await asked)[0].version == 1

    run(story())


def test_a_proposer_follows_from_a_deposed_leader_to_the_new_one() -> None:
    async def story() -> None:
        world = cluster()
        world.lead(N3, known_to=[N1, N3])  # N2 still believes in N1, which answers NotLeader
        asked = asyncio.create_task(world.nodes[N2].coordinator.propose(small(), actor=ALICE, timeout_s=5))
        await until(lambda: bool(world.calls))
        world.lead(N3, known_to=[N2])
        assert (await asked)[0].version == 1
        assert [to for _, to, _ in world.calls] == [N1, N3]

    run(story())


def test_a_frozen_leader_is_left_as_soon_as_another_is_known() -> None:
    async def story() -> None:
        world = cluster()
        world.frozen.add(N1)
        asked = asyncio.create_task(world.nodes[N2].coordinator.propose(small(), actor=ALICE, timeout_s=60))
        await until(lambda: bool(world.calls))
        world.lead(N3)
        assert (await asked)[0].version == 1

    run(story())


def test_what_may_have_happened_is_sent_again_and_happens_once() -> None:
    async def story() -> None:
        world = cluster()
        world.trouble = [ConnectionLost("cut"), Unconfirmed("leadership lost"), Unavailable("away")]
        result, _ = await world.nodes[N2].coordinator.propose(small(), actor=ALICE, timeout_s=10)
        assert result.version == 1
        assert world.nodes[N1].driver.machine.namespace.latest("a").version == 1

    run(story())


def test_without_a_request_id_an_uncertain_delete_is_not_sent_again() -> None:
    async def story() -> None:
        world = cluster()
        node = world.nodes[N2].coordinator
        await node.propose(small(), actor=ALICE, timeout_s=5)
        world.trouble = [ConnectionLost("cut")]
        with pytest.raises(ConnectionLost):
            await node.propose(c.DeleteFile("a"), actor=ALICE, timeout_s=5)
        await node.propose(small("p2"), actor=ALICE, timeout_s=5)
        world.trouble = [ConnectionLost("cut")]
        result, _ = await node.propose(c.DeleteFile("a"), actor=ALICE, request="d1", timeout_s=5)
        assert result.versions == 1

    run(story())


def test_giving_up_says_why_and_whether_it_may_have_happened() -> None:
    async def story() -> None:
        world = cluster(leader=None)
        node = world.nodes[N2].coordinator
        with pytest.raises(NoQuorum, match="no leader is known"):
            await node.propose(small(), actor=ALICE, timeout_s=0.02)
        world.lead(N1)
        world.down.add(N1)
        with pytest.raises(NoQuorum, match=f"{N1} cannot be reached; see `idunno status`; .* `idunno recover`"):
            await node.propose(small(), actor=ALICE, timeout_s=0.02)
        world.down.clear()
        world.trouble = [ConnectionLost("cut in the middle")] * 100
        with pytest.raises(DeadlineExceeded, match="cut in the middle"):
            await node.propose(small(), actor=ALICE, timeout_s=0.02)

    run(story())


@pytest.mark.parametrize(
    "second",
    [
        Exhausted("queue is full"),
        NotReady("starting"),
        Incompatible("old"),
        Conflict("another version"),  # the first may be held up by the network, and find that version gone
        NotFound("no file"),
    ],
)
def test_a_refusal_of_the_second_try_says_nothing_of_the_first(second: IdunnoError) -> None:
    async def story() -> None:
        world = cluster()
        world.trouble = [ConnectionLost("cut"), second]
        with pytest.raises(DeadlineExceeded, match=f"its answer was lost; asked again: {second}"):
            await world.nodes[N2].coordinator.propose(small(), actor=ALICE, timeout_s=5)
        assert world.nodes[N1].driver.machine.namespace.latest("a").version == 1  # it did happen

    run(story())


def test_what_makes_no_sense_was_refused_the_first_time_as_well() -> None:
    async def story() -> None:
        world = cluster()
        world.trouble = [ConnectionLost("cut"), InvalidArgument("no such thing")]
        with pytest.raises(InvalidArgument, match="no such thing"):
            await world.nodes[N2].coordinator.propose(small(), actor=ALICE, timeout_s=5)

    run(story())


def test_a_full_leader_is_not_pressed() -> None:
    async def story() -> None:
        world = cluster()
        world.trouble = [Exhausted("queue is full")]
        with pytest.raises(Exhausted):
            await world.nodes[N2].coordinator.propose(small(), actor=ALICE, timeout_s=5)

    run(story())


def test_only_what_leaves_no_trace_of_its_own_needs_a_request_id() -> None:
    for command in (c.DeleteFile("a"), c.Undeploy("m"), c.ForgetJob("j"), c.RevokeUser("u")):
        assert (is_idempotent(command, ""), is_idempotent(command, "r")) == (False, True)
    for named in (small(), c.BeginPut("p", "a"), c.CancelJob("j"), c.PlanJob("j", 1, 1)):
        assert is_idempotent(named, "")


def test_commands_come_from_nodes_only() -> None:
    async def story() -> None:
        world = cluster()
        command = Propose(c.encode_command(small()))
        for peer in (Peer(ALICE), Peer(ALICE, local=True)):
            with pytest.raises(PermissionDenied, match="commands come from nodes"):
                await world.nodes[N1].ask(PROPOSE, command, ALICE, peer)
        with pytest.raises(DecodeError):
            await world.nodes[N1].ask(PROPOSE, Propose(b"junk"), SYSTEM, Peer(SYSTEM, node=N2))

    run(story())


def test_a_read_sees_what_was_acknowledged_before_it() -> None:
    async def story() -> None:
        world = cluster()
        await world.nodes[N1].coordinator.propose(small(), actor=ALICE, timeout_s=5)
        assert world.nodes[N2].driver.machine.namespace.find("a") is None
        machine = await world.nodes[N2].coordinator.read(5)
        assert machine.namespace.latest("a").version == 1

    run(story())


@pytest.mark.parametrize(("reader", "rounds"), [(N1, 3), (N2, 2)])  # at the leader the very first asks for itself
def test_reads_that_come_during_a_round_share_the_next_one(reader: NodeId, rounds: int) -> None:
    async def story() -> None:
        world = cluster()
        node, leader = world.nodes[reader], world.nodes[N1].driver
        first = [asyncio.create_task(node.coordinator.read(5)) for _ in range(50)]
        await until(lambda: leader.rounds == rounds - 1)
        later = [asyncio.create_task(node.coordinator.read(5)) for _ in range(50)]
        await asyncio.gather(*first, *later)
        assert leader.rounds == rounds
        await node.coordinator.read(5)
        assert leader.rounds == rounds + 1

    run(story())


def test_a_read_is_asked_again_after_trouble_and_gives_up_with_the_reason() -> None:
    async def story() -> None:
        world = cluster()
        world.trouble = [NoQuorum("1 of 3 voters answer")]
        await world.nodes[N2].coordinator.read(5)
        world.lead(None)
        with pytest.raises(NoQuorum, match=r"no consistent read within .* `idunno recover`"):
            await world.nodes[N2].coordinator.read(0.02)
        with pytest.raises(NoQuorum, match=r"no consistent read: no leader is known: .* `idunno recover`") as later:
            await world.nodes[N2].coordinator.read(4)  # more than one round: what the last one said
        assert str(later.value).count("idunno recover") == 1
        await world.nodes[N2].coordinator.close()

    run(story())


def test_reads_are_bounded_and_end_when_the_node_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        monkeypatch.setattr(reads, "READERS_MAX", 2)
        world = cluster(leader=None)
        node = world.nodes[N2].coordinator
        waiting = asyncio.create_task(node.read(60))
        await until(lambda: node._rounds._round is not None)
        others = [asyncio.create_task(node.read(60)) for _ in range(3)]
        await until(lambda: len(node._rounds._waiting) == 2 and any(other.done() for other in others))
        await node.close()
        ended = await asyncio.gather(waiting, *others, return_exceptions=True)
        assert sorted(type(error).__name__ for error in ended) == ["Exhausted", *["Unavailable"] * 3]

    run(story())


def test_a_bug_in_a_round_is_told_to_those_who_wait() -> None:
    async def story() -> None:
        async def broken(timeout_s: float) -> Any:
            raise AssertionError("a bug")

        rounds = reads.ReadRounds(broken)
        with pytest.raises(Exception, match="a read round failed"):
            await rounds.join(5)

    run(story())


def test_results_convert_or_say_they_do_not() -> None:
    assert convert(c.PutSmall, {"name": "a", "version": 1, "size": 2, "created_ms": 3}) == PutDone("a", 1, 2, 3)
    with pytest.raises(DecodeError, match="PutSmall"):
        convert(c.PutSmall, {"name": 1})


def test_followers_hear_every_effect_in_order_and_a_bad_one_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    world, heard = World(), list[tuple[int, Effect]]()
    applier = Applier(Machine())

    def bad(index: int, effect: Effect) -> None:
        raise ValueError("a bug")

    applier.subscribe(bad)
    applier.subscribe(lambda index, effect: heard.append((index, effect)))
    world.put("a")
    world.put(output_name("job1", 0), actor=SYSTEM)
    for index, payload in enumerate(world.log, 1):
        applier(index, payload)  # type: ignore[arg-type]
    assert [index for index, _ in heard] == [1, 3, 5]
    assert applier.machine.digest() == world.machine.digest()
    assert caplog.messages == ["follower failed"] * 3


def test_a_call_that_fails_when_it_is_given_up_leaves_no_error_behind() -> None:
    async def story() -> None:
        node = cluster(N2).nodes[N1].coordinator
        left: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: left.append(context))
        begun = asyncio.Event()
        calls: list[weakref.ref[Any]] = []

        async def call() -> Empty:
            calls.append(weakref.ref(asyncio.current_task()))
            begun.set()
            try:
                await loop.create_future()
            except asyncio.CancelledError:
                raise ConnectionLost("gone") from None
            return Empty()

        asker = loop.create_task(node._while_led_by(N2, call()))
        await begun.wait()
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        del (
            asker
        )  # what it raised holds its frame, and that the call; an error that nobody asked for is told when it goes
        await until(lambda: gc.collect() >= 0 and (calls[0]() is None or left != []))
        assert left == []

    run(story())


def test_a_leader_that_lives_on_its_reserve_begins_nothing_and_still_deletes() -> None:
    async def story() -> None:
        made = cluster()
        ask = made.nodes[N2].coordinator
        await ask.propose(small(), actor=ALICE, timeout_s=1)
        made.nodes[N1].driver.short_of_space = True
        for command in (small("p2", "b"), c.BeginPut("p3", "c")):
            with pytest.raises(Exhausted, match="only what frees space"):
                await ask.propose(command, actor=ALICE, timeout_s=1)
        await ask.propose(c.DeleteFile("a"), actor=ALICE, request="r1", timeout_s=1)

    run(story())

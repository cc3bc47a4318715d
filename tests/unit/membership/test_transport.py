# tests/unit/membership/test_transport.py: the detector on real sockets of the loopback, with short times.
from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from idunno.base.errors import DecodeError, Unavailable
from idunno.base.ids import NodeId
from idunno.membership.config import SwimConfig
from idunno.membership.events import Changed, Seed, Self
from idunno.membership.messages import Gossip, State, encode
from idunno.membership.talks import EXCHANGES_MAX, PROBES_MAX, ExchangeBytes, Talks, TcpProbe
from idunno.membership.transport import (
    EVENTS_MAX,
    SOURCE_RATE_MAX,
    Membership,
    SourceRates,
    join_address,
    split_address,
)
from idunno.wire.sealed import Opener, Sealer
from tests.unit.membership.net import node_id

FAST = SwimConfig(
    period_ms=60,
    retry_ms=20,
    tcp_ms=30,
    probe_ms=50,
    look_ms=5,
    introduce_ms=600,
    t_fail_ms=120,
    t_fail_lone_ms=240,
    bystander_ms=30,
    t_delete_ms=60,
    gossip_ms=10,
    random_ms=100,
    exchange_ms=100,
)


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def opened(datagram: bytes) -> tuple[NodeId, int, bytes]:
    if not datagram.startswith(b"seal"):
        raise DecodeError("not sealed")
    return NodeId(datagram[4:20].decode()), datagram[20], datagram[21:]


def make(
    number: int,
    port: int,
    boot: int = 1,
    host: str = "127.0.0.1",
    tcp_probe: TcpProbe | None = None,
    exchange: ExchangeBytes | None = None,
) -> Membership:
    me = Self(node_id(number), f"n{number}", f"{host}:{port}", boot)
    head = b"seal" + me.node.encode() + bytes([boot])
    return Membership(
        me,
        FAST,
        random.Random(number),
        lambda payload: head + payload,
        opened,
        lambda _: True,
        lambda: 1_700_000_000_000,
        tcp_probe=tcp_probe,
        exchange=exchange,
    )


def states(membership: Membership) -> dict[str, str]:
    return {view.name: view.state for view in membership.view()}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  a poll, bounded by the timeout
            await asyncio.sleep(0.005)


@asynccontextmanager
async def ring(size: int, host: str = "127.0.0.1") -> AsyncIterator[list[Membership]]:
    nodes = [make(number, free_port(), host=host) for number in range(1, size + 1)]
    try:
        for node in nodes:
            node.seeds([Seed(other.me.node, other.me.name, other.me.address) for other in nodes])
            await node.start("127.0.0.1", int(node.me.address.rsplit(":", 1)[1]))
        await until(lambda: all(list(states(node).values()) == ["active"] * size for node in nodes))
        yield nodes
    finally:
        for node in nodes:
            await node.stop()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await story()

    asyncio.run(main())


def test_a_silent_member_is_failed_and_a_stopped_one_is_stopped() -> None:
    async def story() -> None:
        async with ring(4) as nodes:
            seen: list[Changed] = []
            nodes[0].subscribe(seen.append)
            await nodes[3].stop()
            await until(lambda: all(states(node)["n4"] == "failed" for node in nodes[:3]))
            await nodes[2].announce_stopped()
            await until(lambda: all(states(node)["n3"] == "stopped" for node in nodes[:2]))
            news = [change.new for change in seen if change.member.name == "n4"]
            assert news[-1] is State.FAILED
            assert set(news) <= {State.SUSPICIOUS, State.FAILED}
            assert abs(seen[0].member.since_ms - 1_700_000_000_000) < 10_000  # the wall clock's, not the loop's

    run(story)


def test_a_restarted_member_is_known_by_its_boot() -> None:
    async def story() -> None:
        async with ring(3) as nodes:
            old = nodes[2]
            await old.stop()
            port = int(old.me.address.rsplit(":", 1)[1])
            nodes[2] = make(3, port, boot=2)
            nodes[2].seeds([Seed(node.me.node, node.me.name, node.me.address) for node in nodes])
            await nodes[2].start("127.0.0.1", port)
            await until(lambda: all({v.boot for v in node.view() if v.name == "n3"} == {2} for node in nodes))
            await until(lambda: all(set(states(node).values()) == {"active"} for node in nodes))

    run(story)


def test_members_may_be_named_by_host_names() -> None:
    async def story() -> None:
        async with ring(2, host="localhost") as nodes:
            await until(lambda: nodes[0].counters["received"] > 3)

    run(story)


def test_what_does_not_open_decode_or_fit_is_counted_and_dropped() -> None:
    async def story() -> None:
        async with ring(2) as nodes:
            target = nodes[0]
            head = b"seal" + node_id(2).encode() + b"\x01"
            before = states(target)
            source = ("127.0.0.1", 9)
            target.received(b"junk", source)
            target.received(head + b"junk", source)
            target.received(head + b"x" * 1_400, source)
            target.received(b"seal" + node_id(1).encode() + b"\x01" + encode(Gossip("n1", "h:1")), source)
            for name in ("dropped-not-opened", "dropped-not-decoded", "dropped-too-long", "own-id"):
                assert target.counters[name] == 1, name
            for _ in range(SOURCE_RATE_MAX + 50):
                target.received(b"junk", source)
            assert target.counters["dropped-too-fast"] >= 40
            assert states(target) == before

    run(story)


def test_a_bad_subscriber_stops_neither_the_detector_nor_the_others() -> None:
    async def story() -> None:
        async with ring(2) as nodes:
            seen: list[Changed] = []

            def bad(_: Changed) -> None:
                raise RuntimeError("a bug")

            nodes[0].subscribe(bad)
            nodes[0].subscribe(seen.append)
            await nodes[1].announce_left()
            await until(lambda: bool(seen))
            assert seen[0].new is State.LEFT

    run(story)


def test_a_port_in_use_is_said_with_a_next_step() -> None:
    async def story() -> None:
        async with ring(1) as nodes:
            port = nodes[0].port
            with pytest.raises(Unavailable, match=f"{port}.*--listen"):
                await make(2, port).start("127.0.0.1", port)

    run(story)


def test_a_removed_member_disappears() -> None:
    async def story() -> None:
        async with ring(3) as nodes:
            await nodes[2].stop()
            for node in nodes[:2]:
                node.forget(node_id(3))
            assert states(nodes[0]) == {"n1": "active", "n2": "active"}

    run(story)


def test_sources_are_bounded_one_by_one() -> None:
    rates = SourceRates()
    a, b = ("10.0.0.1", 1), ("10.0.0.2", 1)
    assert sum(rates.take(a, 0.0) for _ in range(1_000)) == SOURCE_RATE_MAX
    assert rates.take(b, 0.0)
    assert sum(rates.take(a, 0.1) for _ in range(1_000)) == SOURCE_RATE_MAX // 10


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:0", "host:65536", "host:x", "host:-1", "host:²"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(DecodeError):
        split_address(text)


def test_addresses_with_brackets() -> None:
    assert split_address("[::1]:7400") == ("::1", 7400)
    assert join_address("::1", 7400) == "[::1]:7400"
    assert split_address(join_address("10.0.0.1", 1)) == ("10.0.0.1", 1)


def test_a_ring_under_the_real_seal() -> None:
    async def story() -> None:
        ports = {number: free_port() for number in (1, 2)}
        nodes = []
        for number, port in ports.items():
            me = Self(node_id(number), f"n{number}", f"127.0.0.1:{port}", 1)
            sealer, opener = Sealer([b"k" * 32], me.node, me.boot, bytes([number]) * 16), Opener([b"k" * 32])
            node = Membership(me, FAST, random.Random(1), sealer.seal, opener.open, lambda _: True, lambda: 0)
            node.seeds([Seed(node_id(other), f"n{other}", f"127.0.0.1:{ports[other]}") for other in ports])
            await node.start("127.0.0.1", port)
            nodes.append(node)
        await until(lambda: all(set(states(node).values()) == {"active"} for node in nodes))
        assert all(node.counters.get("dropped-not-opened", 0) == 0 for node in nodes)
        for node in nodes:
            await node.stop()

    run(story)


def test_who_answers_only_over_tcp_lives_and_hears_all_by_exchanges() -> None:
    """Node 3 sends and receives datagrams to and from nobody after the start."""

    async def story() -> None:
        nodes: dict[NodeId, Membership] = {}
        asked: list[NodeId] = []

        async def probe(node: NodeId) -> bool:
            asked.append(node)
            if nodes[node]._transport is None:
                raise Unavailable("stopped")
            return True

        def exchange_of(me: NodeId) -> ExchangeBytes:
            async def exchange(node: NodeId, ours: bytes) -> bytes:
                return nodes[node].exchanged(me, ours)

            return exchange

        for number in (1, 2, 3):
            id_ = node_id(number)
            nodes[id_] = make(number, free_port(), tcp_probe=probe, exchange=exchange_of(id_))
        seeds = [Seed(node.me.node, node.me.name, node.me.address) for node in nodes.values()]
        for node in nodes.values():
            node.seeds(seeds)
            await node.start("127.0.0.1", int(node.me.address.rsplit(":", 1)[1]))
        await until(lambda: all(set(states(node).values()) == {"active"} for node in nodes.values()))
        first, second, third = nodes.values()
        third.received = lambda *_: None  # type: ignore[method-assign]
        await until(lambda: asked.count(third.me.node) >= 8)
        assert "failed" not in states(first).values()
        assert any("answered only over TCP" in view.problem for view in first.view())
        await second.announce_left()
        await second.stop()
        await until(lambda: states(third)["n2"] == "left")
        for node in (first, third):
            await node.stop()

    run(story)


def test_a_probe_and_an_exchange_that_fail_or_hang_stop_nothing() -> None:
    async def story() -> None:
        async def probe(_: NodeId) -> bool:
            await asyncio.Event().wait()
            return True

        async def exchange(_: NodeId, __: bytes) -> bytes:
            return b"junk"

        nodes = [make(number, free_port(), tcp_probe=probe, exchange=exchange) for number in (1, 2)]
        for node in nodes:
            node.seeds([Seed(other.me.node, other.me.name, other.me.address) for other in nodes])
            await node.start("127.0.0.1", int(node.me.address.rsplit(":", 1)[1]))
        await until(lambda: all(set(states(node).values()) == {"active"} for node in nodes))
        await nodes[1].stop()
        await until(lambda: states(nodes[0])["n2"] == "failed")
        await nodes[0].stop()
        with pytest.raises(Unavailable):
            nodes[0].exchanged(node_id(2), encode(nodes[1]._core.whole_list()))
        with pytest.raises(DecodeError):
            nodes[0].exchanged(node_id(2), b"junk")

    run(story)


def test_exchanges_that_hang_leave_room_for_probes() -> None:
    async def story() -> None:
        probed = asyncio.Event()

        async def probe(_: NodeId) -> bool:
            return True

        async def exchange(_: NodeId, __: bytes) -> bytes:
            await asyncio.Event().wait()
            return b""

        talks = Talks(probe, exchange)
        ours = make(1, 1)._core.whole_list()
        for number in range(2, 2 * PROBES_MAX):  # a switch has died
            talks.exchange(node_id(number), ours, lambda _: None, lambda: None)
        assert len(talks._tasks) == EXCHANGES_MAX
        talks.probe(node_id(2), 1_000, probed.set)
        async with asyncio.timeout(5):
            await probed.wait()
        await talks.stop()

    run(story)


def test_a_host_name_that_is_not_found_is_not_looked_up_with_every_datagram() -> None:
    async def story() -> None:
        async with ring(1) as (node,):
            node._loop = asyncio.get_running_loop()
            for _ in range(3):
                node._where("no-such-host.invalid:7400", b"")
                await until(lambda: not node._lookups)
            assert node._addresses["no-such-host.invalid:7400"][0] is None
            assert node.counters["dropped-no-address"] == 3
            assert not node._lookups

    run(story)


def test_a_doubt_finds_a_dead_member_before_its_turn_and_events_tell_the_story() -> None:
    async def story() -> None:
        async with ring(4) as nodes:
            await nodes[3].stop()
            nodes[0].doubt(node_id(4))
            await until(lambda: states(nodes[0])["n4"] == "failed")
            told = [(event.kind, event.accuser != "") for event in nodes[0].events() if event.name == "n4"]
            assert told == [("joined", False), ("suspicious", True), ("failed", True)]
            assert nodes[0].counters["event-failed"] == 1
            assert all(event.at_ms == 1_700_000_000_000 for event in nodes[0].events())
            assert nodes[0]._events.maxlen == EVENTS_MAX

    run(story)

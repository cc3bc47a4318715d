# tests/unit/membership/test_worlds.py: the figures of bench/membership.py, in worlds short enough for every run of the tests.
from __future__ import annotations

import random
import statistics
from collections.abc import Iterable
from itertools import combinations

import pytest

from idunno.membership.config import SwimConfig
from idunno.membership.messages import State
from tests.unit.membership.net import SimNet, node_id


def detection(dead: tuple[int, ...], worlds: int, first: int = 0, *, connections: bool = False) -> list[int]:
    """ms from the deaths of 10 members until all others hold each for failed."""
    took = []
    for seed in range(first, first + worlds):
        net = SimNet(10, seed=seed)
        net.run(2_000 + seed % 50 * 137)
        began_ms = net.now_ms
        net.crash(*dead)
        if connections:
            for number in dead:
                net.doubt(number)
        net.run(4_000)
        assert {who for _, _, who in net.failures()} == set(dead)
        assert all(net.seen(number) == {"failed"} for number in dead)
        took += [max(at for at, _, who in net.failures() if who == number) - began_ms for number in dead]
    return took


@pytest.mark.parametrize("dead", [(4,), (4, 5, 6), (10, 1, 2), (2, 5, 8)])
def test_deaths_of_ten_members_are_known_within_two_seconds_and_three_at_the_most(dead: tuple[int, ...]) -> None:
    took = detection(dead, 20)
    assert statistics.median(took) <= 2_000
    assert max(took) <= 3_200


THREE_OF_TEN = sorted(
    {
        min(tuple(sorted((place + turn) % 10 for place in some)) for turn in range(10))
        for some in combinations(range(10), 3)
    }
)
"""Every choice of three places on a ring of ten, but for where the ring begins."""


def test_three_deaths_at_once_anywhere_in_the_ring_keep_the_bounds_of_one() -> None:
    assert len(THREE_OF_TEN) == 12
    took = []
    for number, places in enumerate(THREE_OF_TEN):
        took += detection(tuple(place + 1 for place in places), 1, 7 * number)
    assert statistics.median(took) <= 2_000
    assert max(took) <= 3_200


def test_a_lost_connection_is_looked_into_at_once() -> None:
    assert max(detection((4,), 10, connections=True)) <= 1_600


def test_a_doubt_without_reason_accuses_nobody() -> None:
    net = SimNet(10, seed=1)
    for _ in range(20):
        net.doubt(4)
        net.run(100)
    assert net.log == []


@pytest.mark.parametrize("loss", [0.03, 0.10, 0.20])
def test_ten_minutes_of_loss_of_every_packet_fail_nobody(loss: float) -> None:
    net = SimNet(10, seed=5)
    net.loss = loss
    net.run(600_000)
    assert net.failures() == []
    net.loss = 0.0
    net.run(5_000)
    assert len({core.book.digest for core in net.cores.values()}) == 1
    assert all(set(net.states(number).values()) == {"active"} for number in net.cores)


@pytest.mark.parametrize("pair", [(3, 4), (3, 8)])
def test_udp_blocked_between_two_fails_nobody_and_the_view_of_both_names_it(pair: tuple[int, int]) -> None:
    net = SimNet(10, seed=2)
    net.udp_cut = {frozenset(pair)}
    net.run(600_000)
    assert net.failures() == []
    a, b = pair
    for one, other in ((a, b), (b, a)):
        assert "UDP to 10.0.0." in net.view(one, of=other).problem
        assert "answered only through n" in net.view(one, of=other).problem
    assert not any(net.view(one, of=5).problem for one in pair)
    net.udp_cut.clear()
    net.run(120_000)
    assert net.view(a, of=b).problem == ""


def test_who_is_reached_over_tcp_only_lives_hears_the_news_and_is_named() -> None:
    net = SimNet(7, seed=3)
    net.deaf.add(3)
    net.run(20_000)
    net.crash(6)
    net.run(20_000)
    assert net.seen(3) == {"active"}
    assert {who for _, _, who in net.failures()} == {6}
    assert net.states(3)[6] == "failed"
    assert any("answered only over TCP" in net.view(one, of=3).problem for one in (1, 2, 4, 5, 7))


def freezing(net: SimNet, numbers: Iterable[int], ms: int) -> None:
    rng = random.Random(7)
    todo = []
    for number in numbers:
        at_ms = net.now_ms
        while at_ms < net.now_ms + ms:
            at_ms += rng.randint(200, 3_000)
            spell_ms = rng.randint(200, 900)
            todo += [(at_ms, True, number), (at_ms + spell_ms, False, number)]
            at_ms += spell_ms
    for at_ms, stops, number in sorted(todo):
        net.run(at_ms - net.now_ms)
        if stops:
            net.frozen.add(number)
        else:
            net.thaw(number)


def test_three_of_ten_that_freeze_again_and_again_fail_nobody() -> None:
    net = SimNet(10, seed=3)
    freezing(net, (2, 5, 6), 300_000)
    assert net.failures() == []


def test_a_freeze_below_the_probes_time_accuses_nobody() -> None:
    for seed in range(10):
        net = SimNet(10, seed=seed)
        net.frozen.add(3)
        net.run(SwimConfig().probe_ms - 150)
        net.thaw(3)
        net.run(3_000)
        assert net.log == []


def test_an_idle_node_sends_the_same_in_a_small_and_in_a_large_cluster_and_little() -> None:
    sent = []
    for size in (10, 200):
        net = SimNet(size, seed=1, settle=False)
        net.know_all()
        net.bytes.clear()
        net.run(20_000)
        sent.append(sum(net.bytes.values()) / size / 20)
    assert sent[0] <= 1_200
    assert sent[1] <= 2 * sent[0]


def test_two_hundred_members_hear_of_a_death_and_a_join_within_seconds() -> None:
    net = SimNet(200, seed=1, settle=False)
    net.know_all()
    net.log.clear()
    net.crash(77)
    assert net.until(lambda: net.seen(77) == {"failed"}, 4_000, 50) <= 4_000
    assert {who for _, _, who in net.failures()} == {77}
    net.allowed.add(node_id(201))
    net.start(201, seeds=[5])
    others = [core for number, core in net.cores.items() if number != 201]

    def known_to_all() -> bool:
        return all(node_id(201) in core.members for core in others)

    assert net.until(known_to_all, 2_000) <= 1_000
    net.run(3_000)
    assert len(net.cores[201].members) == 200
    assert net.exchanges == 0  # gossip was enough


@pytest.mark.parametrize("tcp", [True, False])
def test_a_difference_that_lasts_is_exchanged_as_a_whole_list(tcp: bool) -> None:
    net = SimNet(10, seed=4, tcp=tcp)
    net.run(5_000)
    missing = net.cores[7].members[node_id(2)]  # as if node 7 had missed all news of it
    net.cores[7].book.forget(node_id(2), net.now_ms - 60_000)
    net.cut = {frozenset((2, 7))}  # and as if it never spoke to it
    net.run(8_000)
    assert (net.exchanges > 0) is tcp  # without TCP the list comes in datagrams
    assert net.cores[7].members[node_id(2)].version == missing.version
    assert len({core.book.digest for core in net.cores.values()}) == 1


@pytest.mark.parametrize(("size", "left", "tcp"), [(10, 5, True), (20, 3, False), (24, 12, True), (30, 1, True)])
def test_a_partition_heals_by_itself_and_fails_nobody_on_the_own_side(size: int, left: int, tcp: bool) -> None:
    net = SimNet(size, seed=8, tcp=tcp)
    side = {number: number <= left for number in range(1, size + 1)}
    net.partition([n for n in side if side[n]], [n for n in side if not side[n]])
    net.run(20_000)
    assert all(side[by] != side[who] for _, by, who in net.failures())
    assert net.states(size)[1] == "failed"
    net.log.clear()
    net.cut.clear()

    def whole() -> bool:
        return all(m.state is State.ACTIVE for core in net.cores.values() for m in core.members.values())

    net.until(whole, 10_000, 50)
    net.run(5_000)
    assert net.failures() == []
    assert whole()


def test_a_clock_that_is_off_by_more_than_a_second_is_a_warning_only() -> None:
    net = SimNet(5, seed=6)
    net.skew_ms = {2: 3_000, 3: -700}
    net.run(60_000)
    assert net.log == []
    assert net.view(1, of=2).problem == "its clock is 3.0 s ahead of this node's; set both by NTP"
    assert net.view(1, of=3).problem == ""
    assert abs(net.cores[1].skew()[node_id(3)] + 700) <= 50
    assert "3.0 s behind" in net.view(2, of=4).problem


def chaos(seed: int, ms: int = 60_000) -> SimNet:
    """Deaths, restarts, freezes, cuts, loss and goodbyes, drawn from the seed; then all faults end."""
    rng, size = random.Random(seed), 8
    net = SimNet(size, seed=seed, tcp=rng.random() < 0.7)
    end_ms = net.now_ms + ms
    while net.now_ms < end_ms:
        number = rng.randint(1, size)
        match rng.randrange(7):
            case 0 if number in net.cores and len(net.cores) > 2:
                net.thaw(number)
                net.crash(number)
            case 1 if number not in net.cores:
                net.start(number)
            case 2 if number in net.cores:
                net.frozen.add(number)
            case 3:
                net.thaw(*net.frozen)
            case 4:
                left = set(rng.sample(range(1, size + 1), rng.randint(1, size - 1)))
                net.partition(left, set(range(1, size + 1)) - left)
            case 5:
                net.cut.clear()
                net.loss = rng.choice((0.0, 0.05, 0.3))
            case 6 if number in net.cores and number not in net.frozen and len(net.cores) > 2:
                net.announce(number, State.STOPPED)
                net.run(300)
                net.crash(number)
        net.run(rng.randint(10, 3_000))
    net.cut.clear()
    net.loss = 0.0
    net.thaw(*net.frozen)
    for number in range(1, size + 1):
        if number not in net.cores:
            net.start(number)
    return net


@pytest.mark.parametrize("seed", range(12))
def test_after_any_faults_all_agree_that_all_live(seed: int) -> None:
    net = chaos(seed)

    def whole() -> bool:
        return all(m.state is State.ACTIVE for core in net.cores.values() for m in core.members.values())

    net.until(whole, 20_000, 100)
    net.run(3_000)
    net.log.clear()
    net.run(20_000)
    assert net.log == []
    assert len({core.book.digest for core in net.cores.values()}) == 1

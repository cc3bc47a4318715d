# tests/unit/membership/test_stories.py: what a whole ring does, on a simulated network.
from __future__ import annotations

import pytest

from idunno.membership.messages import State
from tests.unit.membership.net import SimNet, node_id


@pytest.mark.parametrize("size", [2, 3, 5, 10])
def test_a_crash_is_failed_everywhere_within_four_seconds(size: int) -> None:
    for seed in range(12):
        net = SimNet(size, seed=seed)
        net.run(seed * 137)  # the crash falls into different places of the period
        net.crash(2)
        net.run(4_000)
        assert net.seen(2) == {"failed"}, f"seed {seed}: {[net.states(number)[2] for number in net.cores]}"
        assert {who for _, _, who in net.failures()} == {2}, f"seed {seed}"


def test_fifty_nodes_hear_of_a_crash_within_five_seconds() -> None:
    net = SimNet(50, seed=3)
    net.crash(17)
    net.run(5_000)
    assert net.seen(17) == {"failed"}
    assert {who for _, _, who in net.failures()} == {17}


@pytest.mark.parametrize("size", [7, 10])
def test_three_adjacent_deaths_at_once_are_seen_across(size: int) -> None:
    for seed in range(4):
        net = SimNet(size, seed=seed)
        net.crash(3, 4, 5)
        net.run(5_500)
        assert net.seen(3) == net.seen(4) == net.seen(5) == {"failed"}, f"seed {seed}"
        assert {who for _, _, who in net.failures()} == {3, 4, 5}, f"seed {seed}"


def test_any_run_of_dead_neighbours_is_noticed() -> None:
    net = SimNet(10, seed=1)
    net.crash(2, 3, 4, 5, 6, 7, 8)
    net.run(15_000)
    assert net.states(1) == {1: "active", 9: "active", 10: "active", **dict.fromkeys(range(2, 9), "failed")}


def test_a_deleted_member_leaves_the_ring_but_stays_failed_in_the_view() -> None:
    net = SimNet(5)
    net.crash(2)
    net.run(6_000)
    assert {core.members[node_id(2)].state for core in net.cores.values()} == {State.DELETED}
    assert net.seen(2) == {"failed"}


def test_a_restart_is_active_again_at_once_under_its_higher_boot() -> None:
    net = SimNet(5, seed=4)
    net.crash(2)
    net.run(6_000)
    net.start(2)
    net.run(700)
    assert net.seen(2) == {"active"}
    assert {net.view(number, 2).boot for number in net.cores} == {2}
    assert set(net.states(2).values()) == {"active"}


def test_a_restart_faster_than_the_detector_is_told_as_a_restart_and_is_no_failure() -> None:
    net = SimNet(5, seed=5)
    net.crash(2)
    net.run(300)
    net.start(2)
    net.run(3_000)
    assert net.failures() == []
    restarts = [(by, c) for _, by, c in net.log if c.old is c.new is State.ACTIVE]
    assert {by for by, _ in restarts} == {1, 3, 4, 5}
    assert all("restarted (boot 2)" in c.reason for _, c in restarts)


@pytest.mark.parametrize("state", [State.STOPPED, State.LEFT])
def test_who_announces_its_end_has_not_failed(state: State) -> None:
    net = SimNet(10, seed=6)
    before_ms = net.now_ms
    net.announce(4, state)
    net.run(1_000)
    (at_ms, by, announced) = net.announced[0]
    assert (by, announced.told, announced.answered) == (4, 5, 5)
    assert at_ms - before_ms < 200
    net.crash(4)
    net.run(20_000)
    assert net.seen(4) == {state.value}
    assert net.failures() == []


def test_an_announcement_to_the_dead_ends_after_a_second() -> None:
    net = SimNet(3)
    net.crash(1, 2)
    before_ms = net.now_ms
    net.announce(3, State.STOPPED)
    net.run(3_000)
    ((at_ms, by, announced),) = net.announced
    assert (at_ms - before_ms, by, announced.answered) == (1_000, 3, 0)


def test_a_stopped_member_that_starts_again_is_active() -> None:
    net = SimNet(5)
    net.announce(4, State.STOPPED)
    net.run(300)
    net.crash(4)
    net.run(5_000)
    net.start(4)
    net.run(700)
    assert net.seen(4) == {"active"}


def test_a_pause_of_a_second_accuses_nobody_and_fails_nobody() -> None:
    for seed in range(5):
        net = SimNet(5, seed=seed)
        net.frozen.add(3)
        net.run(900)
        net.thaw(3)
        net.run(10_000)
        assert net.failures() == [], f"seed {seed}"


def test_a_long_pause_is_a_failure_that_heals_by_itself_and_the_paused_one_accuses_nobody() -> None:
    net = SimNet(5, seed=2)
    net.frozen.add(3)
    net.run(8_000)
    assert net.seen(3) == {"failed"}
    net.thaw(3)
    net.run(5_000)
    assert net.seen(3) == {"active"}
    assert {who for _, _, who in net.failures()} == {3}  # what it missed while it was held up proved nothing


def test_who_hears_nothing_fails_alone() -> None:
    net = SimNet(7, seed=3, tcp=False)
    net.deaf.add(3)
    net.run(20_000)
    assert net.seen(3) == {"failed"}
    assert {who for _, by, who in net.failures() if by != 3} == {3}


def test_a_healed_partition_finds_together_by_itself() -> None:
    for size in (5, 20):
        net = SimNet(size, seed=8)
        left = range(1, size // 2 + 1)
        right = range(size // 2 + 1, size + 1)
        net.partition(left, right)
        net.run(12_000)
        assert {net.states(1)[other] for other in right} == {"failed"}
        assert {net.states(1)[other] for other in left} == {"active"}
        net.cut.clear()
        net.run(15_000)
        assert all(set(net.states(number).values()) == {"active"} for number in net.cores), f"size {size}"


def test_a_newcomer_with_one_seed_learns_all_and_all_learn_it() -> None:
    net = SimNet(20, settle=False, seed=9)
    for number in range(1, 20):
        net.start(number)
    net.run(3_000)
    net.start(20, seeds=[7])
    net.run(1_000)
    assert set(net.states(20).values()) == {"active"}
    assert len(net.states(20)) == 20
    assert net.seen(20) == {"active"}


def test_a_member_of_the_roster_that_never_answers_counts_as_failed() -> None:
    net = SimNet(5, settle=False)
    for number in (1, 2, 3):
        net.start(number)
    net.run(300)
    assert net.states(1)[5] == "suspicious"
    net.run(4_500)
    assert net.states(1)[4] == "suspicious"  # a process needs time to start after its name is known
    net.run(4_000)
    assert net.states(1) == {1: "active", 2: "active", 3: "active", 4: "failed", 5: "failed"}
    net.start(5)
    net.run(700)
    assert net.seen(5) == {"active"}


def test_a_removed_member_is_gone_and_late_rumours_do_not_bring_it_back() -> None:
    net = SimNet(5)
    net.crash(2)
    net.run(2_500)  # the others still talk about it
    net.forget(2)
    net.run(10_000)
    assert all(2 not in net.states(number) for number in net.cores)


def test_fifty_nodes_with_ten_percent_loss_fail_nobody() -> None:
    net = SimNet(50, seed=7, loss=0.10)
    net.run(60_000)
    assert net.failures() == []


def test_a_quiet_ring_says_nothing_but_five_datagrams_per_node_and_second() -> None:
    net = SimNet(5)
    net.run(5_000)  # the news of the start are spread
    net.datagrams = 0
    net.run(60_000)
    assert net.log == []
    assert net.datagrams <= 60 * 5 * 5 + 10


def test_a_run_is_its_seed() -> None:
    runs = [SimNet(6, seed=11, loss=0.2) for _ in range(2)]
    for net in runs:
        net.crash(3)
        net.run(20_000)
    assert runs[0].log == runs[1].log

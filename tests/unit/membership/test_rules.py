# tests/unit/membership/test_rules.py: the detector's rules, one by one, on one core.
from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idunno.base.errors import InvalidArgument
from idunno.base.ids import NodeId
from idunno.membership.config import SwimConfig
from idunno.membership.events import (
    Announce,
    Doubt,
    Forget,
    Received,
    Seed,
    Seeds,
    Self,
    Send,
    Tick,
)
from idunno.membership.gossip import News, sends_wanted
from idunno.membership.health import suspicion_ms
from idunno.membership.messages import (
    NUMBER_MAX,
    RUMOR_BYTES_BUDGET,
    Ack,
    Gossip,
    Ping,
    Rumor,
    State,
    encode,
    rumor_bytes,
)
from idunno.membership.ring import Ring
from idunno.membership.states import LIFE, STEP_MAX, overrides, runs_ahead
from idunno.membership.swim import Swim
from idunno.wire.sealed import PAYLOAD_BYTES_MAX
from tests.unit.membership.lone import ORDER, Lone, address, changes, rumor
from tests.unit.membership.net import node_id, seed_of

# -- order of statements ----------------------------------------------------------------------------------------------


def test_at_one_version_the_worse_news_wins_and_a_newer_version_beats_everything() -> None:
    for i, known in enumerate(ORDER):
        for j, told in enumerate(ORDER):
            assert overrides(told, (1, 5), known, (1, 5)) is (j > i)
            assert overrides(told, (1, 6), known, (1, 5))
            assert overrides(told, (2, 0), known, (1, 5))  # a restart: any incarnation of a higher boot
            assert not overrides(told, (1, 4), known, (1, 5))
            assert not overrides(told, (0, 99), known, (1, 5))


def test_a_late_rumour_of_the_death_does_not_bring_a_deleted_member_back() -> None:
    assert not overrides(State.FAILED, (1, 5), State.DELETED, (1, 5))
    assert not overrides(State.SUSPICIOUS, (1, 5), State.DELETED, (1, 5))
    assert State.DELETED in LIFE[State.FAILED]
    assert all(State.UNKNOWN not in after for after in LIFE.values())


# -- accusing ---------------------------------------------------------------------------------------------------------


def test_one_unanswered_ping_accuses_nobody() -> None:
    node = Lone(others=1)
    node.wait(550, answering=set())
    assert node_id(2) in node.core._prober.open
    node.wait(5_000)
    assert node.state(2) is State.ACTIVE
    assert node.core.counters["became-suspicious"] == 0


def test_a_probe_in_vain_accuses_then_the_suspect_fails_then_it_is_deleted() -> None:
    node = Lone(others=1, now_ms=0)
    story: list[tuple[int, State]] = []
    while not story or story[-1][1] is not State.DELETED:
        node.wait(10, answering=set())
        if not story or story[-1][1] is not node.state(2):
            story.append((node.now_ms, node.state(2)))
        assert node.now_ms < 10_000
    (_, active), (suspected, suspicious), (failed, fails), (deleted, _) = story
    assert (active, suspicious, fails) == (State.ACTIVE, State.SUSPICIOUS, State.FAILED)
    assert suspected <= 500 + 430  # at most a period until it is pinged, then the probe
    assert failed - suspected == 2_000 + 30  # a lone accusation, and the last look
    assert deleted - failed == 1_000


def test_the_suspects_time_shrinks_with_independent_accusers() -> None:
    assert [suspicion_ms(1_000, 2_000, c, 2) for c in range(4)] == [2_000, 1_369, 1_000, 1_000]
    for accusers, wait_ms in ([3], 2_000), ([3, 4], 1_369), ([3, 4, 5], 1_000):
        node = Lone(others=6, config=SwimConfig(bystander_ms=0))
        node.core._prober.start = lambda *_: None  # type: ignore[method-assign]  # this node itself does not look
        for accuser in accusers:
            node.tell(accuser, rumor(2, State.SUSPICIOUS, accusers=(accuser,)))
        node.wait(wait_ms - 10, answering={3, 4, 5, 6, 7})
        assert node.state(2) is State.SUSPICIOUS
        node.wait(50, answering={3, 4, 5, 6, 7})
        assert node.state(2) is State.FAILED


def test_a_suspect_is_told_first() -> None:
    node = Lone()
    out = node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,))) + node.wait(600)
    to_suspect = [o.message for o in out if isinstance(o, Send) and o.address == address(2)]
    assert any(isinstance(message, Ping) for message in to_suspect)
    assert all(message.rumors[0].node == node_id(2) for message in to_suspect)
    assert all(message.rumors[0].state is State.SUSPICIOUS for message in to_suspect)


def test_an_answer_alone_does_not_refute_but_a_higher_incarnation_does() -> None:
    node = Lone()
    node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    node.say(2, Ack(0, "n2", address(2), incarnation=0))
    assert node.state(2) is State.SUSPICIOUS
    out = node.say(2, Ack(0, "n2", address(2), incarnation=1))
    assert changes(out) == [("n2", State.ACTIVE)]


def test_nobody_else_can_clear_a_suspect_at_the_same_incarnation() -> None:
    node = Lone()
    node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    node.tell(4, rumor(2, State.ACTIVE))
    assert node.state(2) is State.SUSPICIOUS
    node.tell(4, rumor(2, State.ACTIVE, incarnation=1))
    assert node.state(2) is State.ACTIVE


def test_the_accusations_and_verdicts_of_the_failed_are_not_heard() -> None:
    node = Lone()
    node.tell(2, rumor(3, State.SUSPICIOUS, accusers=(2,)))
    node.wait(600, answering={2, 4, 5})
    node.tell(2, rumor(3, State.FAILED))
    node.tell(3, rumor(4, State.SUSPICIOUS, accusers=(3,)), rumor(5, State.FAILED))
    assert (node.state(4), node.state(5)) == (State.ACTIVE, State.ACTIVE)
    assert node.core.counters["accuser-not-alive"] == 2


def test_a_timer_that_fired_late_discards_the_verdict_and_gives_suspects_the_time_back() -> None:
    node = Lone(others=1)
    node.wait(550, answering=set())
    node.now_ms += 3_000  # held up: nothing was read, the answers may lie in the socket
    node.feed(Tick())
    assert node.state(2) is State.ACTIVE
    assert node.core.counters["late-ticks"] == 1
    assert node.core.health.score == 1

    suspecting = Lone()
    suspecting.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    suspecting.now_ms += 10_000
    suspecting.feed(Tick())
    assert suspecting.state(2) is State.SUSPICIOUS


def test_a_long_pause_gives_a_suspect_its_time_back_once_however_often_its_deadline_was_set() -> None:
    node = Lone()
    node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    node.tell(4, rumor(2, State.SUSPICIOUS, accusers=(4,)))
    node.tell(5, rumor(2, State.SUSPICIOUS, accusers=(5,)))
    node.now_ms += 60_000  # stopped for a minute
    node.feed(Tick())
    node.wait(2_500, answering={3, 4, 5})
    assert node.state(2) in (State.FAILED, State.DELETED)  # and not minutes later


def test_another_accuser_does_not_take_back_the_time_that_a_pause_has_given() -> None:
    node = Lone()
    node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    node.wait(1_000, answering={3, 4, 5})
    node.now_ms += 1_500  # held up: the suspect's refutation may have been dropped by a full socket meanwhile
    node.feed(Tick())
    node.tell(4, rumor(2, State.SUSPICIOUS, accusers=(4,)))
    node.wait(200, answering={3, 4, 5})
    assert node.state(2) is State.SUSPICIOUS
    node.tell(5, rumor(2, State.ACTIVE, incarnation=1))  # told once more by who has heard it
    assert node.state(2) is State.ACTIVE


@pytest.mark.parametrize("news", ["restarted", "refuted", "restarted, says n3", "refuted, says n3"])
def test_a_probe_that_began_before_a_restart_or_a_refutation_does_not_accuse(news: str) -> None:
    node = Lone(others=2)
    node.feed(Doubt(node_id(2)))
    node.wait(300, answering=set())
    assert node_id(2) in node.core._prober.open
    boot, incarnation = (2, 0) if news.startswith("restarted") else (1, 1)
    if news.endswith("n3"):
        node.tell(3, rumor(2, State.ACTIVE, incarnation, boot))
    else:
        node.say(2, Gossip("n2", address(2), incarnation), boot=boot)
    assert node_id(2) not in node.core._prober.open
    assert changes(node.wait(140, answering={3})) == []


def test_the_rosters_old_address_does_not_replace_what_a_restarted_member_said() -> None:
    node = Lone(others=0)
    node.feed(Seeds((seed_of(2), seed_of(3))))
    node.say(2, Gossip("n2", "10.0.9.2:7400"), boot=2)
    node.tell(3, rumor(2, State.SUSPICIOUS, boot=2, accusers=(3,)))
    node.feed(Seeds((seed_of(2), seed_of(3))))  # the roster changed elsewhere, and still has the old address
    assert node.core.members[node_id(2)].address == "10.0.9.2:7400"
    moved = Seed(node_id(2), "n2", "10.0.8.2:7400")
    node.feed(Seeds((moved, seed_of(3))))
    assert node.core.members[node_id(2)].address == "10.0.8.2:7400"


def test_a_verdict_waits_for_what_lies_in_the_socket_unread() -> None:
    node = Lone()
    node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3, 4, 5)))
    node.wait(1_500)
    node.now_ms += 20  # a little late, as a busy loop is
    node.feed(Tick())
    assert node.state(2) is State.SUSPICIOUS
    node.say(2, Ack(0, "n2", address(2), incarnation=1))  # read after the timer had fired
    node.wait(1_000)
    assert node.state(2) is State.ACTIVE


def test_hearsay_of_a_death_accuses_whom_this_node_believes_to_live() -> None:
    node = Lone()
    out = node.tell(3, rumor(2, State.FAILED))
    assert node.state(2) is State.SUSPICIOUS
    told = [o.message for o in out if isinstance(o, Send) and o.address == address(2)]
    assert any(r.node == node_id(2) and r.state is State.SUSPICIOUS for m in told for r in m.rumors)
    node.tell(4, rumor(2, State.FAILED))
    assert node.state(2) is State.SUSPICIOUS  # it had no time to answer
    node.wait(500)
    node.tell(4, rumor(2, State.FAILED))
    assert node.state(2) is State.FAILED


def test_who_counts_as_dead_does_not_pass_its_own_accusations_on() -> None:
    node = Lone()
    node.wait(3_000)
    node.wait(1_500, answering={5})
    suspects = {number for number in (2, 3, 4) if node.state(number) is State.SUSPICIOUS}
    assert suspects
    node.tell(5, rumor(1, State.FAILED))
    assert not any(node_id(number) in node.core.book.news._queue for number in suspects)
    node.wait(1_000, answering={5})
    assert {node.state(number) for number in suspects} == {State.SUSPICIOUS}  # they got time to be heard again


# -- being accused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.SUSPICIOUS, State.FAILED, State.STOPPED, State.LEFT])
def test_the_accused_answers_at_once_with_the_next_incarnation(state: State) -> None:
    node = Lone()
    out = node.tell(3, rumor(1, state, accusers=(2,)))
    assert node.core.incarnation == 1
    told = [o for o in out if isinstance(o, Send) and o.address == address(3)]
    assert told[0].message.incarnation == 1
    assert rumor(1, State.ACTIVE, incarnation=1) in told[0].message.rumors


def test_an_accusation_of_an_older_incarnation_or_boot_needs_no_answer() -> None:
    node = Lone()
    node.tell(3, rumor(1, State.SUSPICIOUS, accusers=(2,)))
    node.tell(3, rumor(1, State.SUSPICIOUS, accusers=(4,)))
    node.tell(3, rumor(1, State.FAILED, boot=0, incarnation=7))
    assert node.core.incarnation == 1


def test_a_packet_cannot_drive_an_incarnation_to_its_end() -> None:
    node = Lone()
    node.tell(3, rumor(1, State.SUSPICIOUS, incarnation=NUMBER_MAX - 1, accusers=(3,)))
    assert node.core.incarnation == 0
    node.tell(3, rumor(2, State.SUSPICIOUS, incarnation=NUMBER_MAX - 1, accusers=(3,)))
    node.tell(3, rumor(2, State.FAILED, boot=1 + STEP_MAX + 1))
    assert node.state(2) is State.ACTIVE
    assert node.core.counters["implausible"] == 3
    # Believed once (nothing was known to compare with), it still falls when the member speaks for itself.
    node.tell(3, rumor(9, State.FAILED, incarnation=NUMBER_MAX - 1))
    assert node.state(9) is State.FAILED
    node.say(9, Gossip("n9", address(9), incarnation=3))
    assert (node.state(9), node.core.members[node_id(9)].version) == (State.ACTIVE, (1, 3))


def test_how_far_hearsay_may_run_ahead() -> None:
    assert not runs_ahead((1, STEP_MAX), (1, 0))
    assert runs_ahead((1, STEP_MAX + 1), (1, 0))
    assert not runs_ahead((2, STEP_MAX), (1, 0))
    assert runs_ahead((2, STEP_MAX + 1), (1, 0))  # a boot begins with incarnation 0
    assert runs_ahead((STEP_MAX + 2, 0), (1, 0))


def test_a_packet_about_the_next_boot_cannot_drive_its_incarnation_to_the_end_either() -> None:
    node = Lone()
    node.tell(3, rumor(2, State.FAILED, boot=2, incarnation=NUMBER_MAX - 1))
    assert node.core.members[node_id(2)].version == (1, 0)
    # What a member itself says is believed, and a process of the past is not, however far the incarnations lie apart.
    node.say(2, Gossip("n2", address(2), incarnation=2 * STEP_MAX), boot=2)
    node.say(2, Gossip("n2", address(2)), boot=1)
    assert node.core.members[node_id(2)].version == (2, 2 * STEP_MAX)


# -- boots, members, roster -------------------------------------------------------------------------------------------


def test_a_process_of_the_past_is_not_heard() -> None:
    node = Lone()
    node.say(2, Gossip("n2", address(2)), boot=3)
    out = node.say(2, Ping(7, "n2", address(2)), boot=2)
    assert out == []
    assert node.core.counters["older-boot"] == 1


def test_rumours_about_those_who_are_not_in_the_roster_are_ignored() -> None:
    allowed = {node_id(1), node_id(2)}
    core = Swim(Self(node_id(1), "n1", address(1), 1), SwimConfig(), random.Random(1), allowed.__contains__)
    core.handle(Received(node_id(2), 1, address(2), Gossip("n2", address(2), 0, (rumor(3, State.ACTIVE),))), 0)
    core.handle(Received(node_id(3), 1, address(3), Ping(1, "n3", address(3))), 0)
    assert set(core.members) == {node_id(2)}
    assert core.counters["not-allowed"] == 2


def test_a_forgotten_member_comes_back_only_by_the_roster() -> None:
    node = Lone()
    node.feed(Forget(node_id(2)))
    node.tell(3, rumor(2, State.ACTIVE, incarnation=5))
    node.say(2, Ping(1, "n2", address(2)))
    assert node_id(2) not in node.core.members
    node.feed(Seeds((seed_of(2),)))
    assert node.state(2) is State.UNKNOWN


def test_a_newcomer_is_sent_the_list_at_most_once_a_second() -> None:
    node = Lone(others=40)
    asked = Ping(1, "n50", address(50), wants_list=True)

    def told() -> set[NodeId]:
        out = node.say(50, asked)
        lists = [o.message for o in out if isinstance(o, Send) and isinstance(o.message, Gossip)]
        assert all(len(encode(message)) <= PAYLOAD_BYTES_MAX for message in lists)
        return {r.node for message in lists for r in message.rumors}

    assert told() >= {node_id(number) for number in range(2, 42)}
    assert told() == set()
    node.now_ms += 1_000
    assert told()


def test_records_are_bounded() -> None:
    node = Lone(others=0, config=SwimConfig(members_max=10))
    for number in range(2, 100):
        node.say(number, Gossip(f"n{number}", address(number)))
    assert len(node.core.members) == 10
    assert node.core.counters["no-room"] == 88


def test_an_announced_end_is_carried_on_every_message_and_not_refuted() -> None:
    node = Lone()
    node.feed(Announce(State.STOPPED))
    (answer,) = node.say(3, Ping(1, "n3", address(3), 0, False, (rumor(1, State.STOPPED),)))
    assert isinstance(answer, Send)
    assert rumor(1, State.STOPPED) in answer.message.rumors
    assert node.core.incarnation == 0
    assert node.core.view()[0].state == "stopped"


# -- ring and gossip --------------------------------------------------------------------------------------------------


def test_the_ring_watches_predecessor_successor_and_super_successor_across_the_dead() -> None:
    states = dict.fromkeys((node_id(n) for n in range(2, 10)), State.ACTIVE)
    ring = Ring(node_id(5))
    for number in (9, 2, 8, 3, 7, 4, 6):
        ring.add(node_id(number))
    assert ring.watched(states.__getitem__) == ([node_id(4), node_id(6), node_id(7)], [])
    states[node_id(4)] = states[node_id(6)] = State.FAILED
    states[node_id(7)] = State.SUSPICIOUS
    assert ring.watched(states.__getitem__) == ([node_id(3), node_id(8), node_id(9)], [node_id(7)])
    for number in (3, 8, 9):
        states[node_id(number)] = State.STOPPED
    assert ring.watched(states.__getitem__) == ([node_id(2)], [node_id(7)])


@given(st.sets(st.integers(2, 60), max_size=30))
def test_every_active_member_is_watched_by_three_others(numbers: set[int]) -> None:
    ids = [node_id(number) for number in sorted(numbers | {1})]
    watchers = dict.fromkeys(ids, 0)
    for me in ids:
        ring = Ring(me)
        for other in ids:
            if other != me:
                ring.add(other)
        for target in ring.watched(lambda _: State.ACTIVE)[0]:
            watchers[target] += 1
    assert set(watchers.values()) == {min(3, len(ids) - 1)}


def test_each_change_is_sent_three_log_n_times_least_sent_first() -> None:
    assert [sends_wanted(others) for others in (1, 4, 9, 49)] == [6, 9, 12, 18]
    news = News()
    news.add(rumor(2, State.ACTIVE))
    assert news.take(4)[0].node == node_id(2)
    news.add(rumor(3, State.ACTIVE))
    assert [r.node for r in news.take(4)] == [node_id(3), node_id(2)]  # less often sent goes first
    for _ in range(7):
        assert len(news.take(4)) == 2
    assert [r.node for r in news.take(4)] == [node_id(3)]
    assert not news
    assert news.take(4) == ()


def test_what_rides_on_a_message_fits_its_datagram() -> None:
    news = News()
    for number in range(200):
        long = Rumor(node_id(number), 1, 1, State.ACTIVE, "n" * 63, "h" * 120 + ":65535")
        news.add(long)
    taken = news.take(200)
    assert RUMOR_BYTES_BUDGET - 230 < sum(map(rumor_bytes, taken)) <= RUMOR_BYTES_BUDGET
    assert len(encode(Ping(NUMBER_MAX - 1, "n" * 63, "h" * 128, NUMBER_MAX - 1, True, taken))) <= PAYLOAD_BYTES_MAX


def test_a_contradictory_configuration_is_refused_with_its_numbers() -> None:
    with pytest.raises(InvalidArgument, match="retry_ms=600"):
        SwimConfig(retry_ms=600)
    with pytest.raises(InvalidArgument, match="t_fail_ms=900"):
        SwimConfig(t_fail_ms=900)

# tests/unit/membership/test_papers.py: what the papers promise, one test a rule, named by its section.
#
# SWIM: Das, Gupta, Motivala, DSN 2002. Lifeguard: Dadgar, Phillips, Currey, arXiv 1707.00788.
from __future__ import annotations

import random
from math import ceil, log2

import pytest

from idunno.membership.config import SwimConfig
from idunno.membership.events import Exchange, ProbeTcp, Received, Send, TcpProbed, Tick
from idunno.membership.gossip import News, Pool
from idunno.membership.health import SCORE_MAX, LocalHealth, suspicion_ms
from idunno.membership.messages import Ack, Gossip, Ping, PingReq, Relayed, State
from idunno.membership.states import overrides
from tests.unit.membership.lone import Lone, address, rumor
from tests.unit.membership.net import SimNet, node_id


def settled(others: int = 6) -> Lone:
    node = Lone(others=others)
    node.wait(5_000)
    return node


def probe_of(node: Lone, number: int) -> list[object]:
    """Have `number` probed and never answered; returns everything sent until the verdict, with times."""
    node.core._prober.drop_all()
    out: list[object] = []
    node.core._prober.start(node.core.members[node_id(number)], node.now_ms, out)  # type: ignore[arg-type]
    return out


def messages(out: list[object], kind: type) -> list[Send]:
    return [o for o in out if isinstance(o, Send) and isinstance(o.message, kind)]


# -- SWIM -------------------------------------------------------------------------------------------------------------


def test_swim_3_1_a_missed_ack_leads_to_k_indirect_probes() -> None:
    node = settled()
    probe_of(node, 2)
    out = node.wait(160, answering={3, 4, 5, 6, 7})
    asked = [o for o in out if isinstance(o, Send) and isinstance(o.message, PingReq)]
    assert len({o.address for o in asked}) == SwimConfig().helpers == 3
    assert address(2) not in {o.address for o in asked}
    assert {o.message.target for o in asked if isinstance(o.message, PingReq)} == {node_id(2)}


def test_swim_3_1_the_period_is_at_least_three_round_trips() -> None:
    """A round trip is taken to be over after `retry_ms`: what is not answered by then is asked again."""
    assert SwimConfig().period_ms >= 3 * SwimConfig().retry_ms


def test_swim_3_2_a_failed_direct_ping_costs_a_few_messages_whatever_the_size() -> None:
    """At most 4k more in the whole group: to each of k helpers, from it to the target, and both ways back."""
    for others in (6, 40):
        node = settled(others)
        probe_of(node, 2)
        out = [o for o in node.wait(480, answering=set(range(3, others + 2))) if isinstance(o, Send)]
        more = [
            o
            for o in out
            if isinstance(o.message, PingReq) or (isinstance(o.message, Ping) and o.address == address(2))
        ]
        assert 2 * len(more) <= 4 * SwimConfig().helpers  # half of it is sent by others


def test_swim_3_1_a_helper_pings_the_target_and_passes_its_ack_on() -> None:
    helper = settled()
    out = helper.say(3, PingReq(77, node_id(2), "n3", address(3)))
    (ping,) = [o for o in out if isinstance(o, Send) and isinstance(o.message, Ping)]
    assert ping.address == address(2)
    assert isinstance(ping.message, Ping)
    out = helper.say(2, Ack(ping.message.seq, "n2", address(2)))
    (told,) = [o for o in out if isinstance(o, Send) and isinstance(o.message, Relayed)]
    assert isinstance(told.message, Relayed)
    assert (told.address, told.message.seq, told.message.target, told.message.alive) == (
        address(3),
        77,
        node_id(2),
        True,
    )


def test_swim_3_1_an_indirect_ack_ends_the_probe() -> None:
    node = settled()
    probe_of(node, 2)
    out = node.wait(160, answering={3, 4, 5, 6, 7})
    asked = next(o.message for o in out if isinstance(o, Send) and isinstance(o.message, PingReq))
    assert isinstance(asked, PingReq)
    node.say(3, Relayed(asked.seq, node_id(2), "n3", address(3), 0, True))
    assert node_id(2) not in node.core._prober.open
    assert node.core.members[node_id(2)].detours == 1


def test_swim_3_2_the_load_of_a_member_does_not_grow_with_the_group() -> None:
    sent = []
    for size in (10, 40):
        net = SimNet(size, seed=1)
        net.run(4_000)
        net.datagrams = 0
        net.run(20_000)
        sent.append(net.datagrams / size / 20)
    assert sent[1] <= sent[0] * 1.05


def test_swim_4_1_news_ride_on_the_detectors_own_messages() -> None:
    node = settled()
    node.tell(3, rumor(9, State.ACTIVE))
    out = node.say(4, Ping(5, "n4", address(4)))
    (ack,) = messages([*out], Ack)
    assert node_id(9) in {r.node for r in ack.message.rumors}


def test_swim_4_1_each_piece_of_news_is_sent_lambda_log_n_times_and_the_least_sent_first() -> None:
    news, others = News(), 100
    for number in range(2, 60):
        news.add(rumor(number, State.ACTIVE))
    sent: dict[str, int] = {}
    while news:
        for told in news.take(others):
            sent[told.node] = sent.get(told.node, 0) + 1
        assert max(sent.values()) - min(sent.get(node_id(n), 0) for n in range(2, 60)) <= 2
    assert set(sent.values()) == {3 * ceil(log2(others + 1))}


def test_swim_4_2_the_order_of_statements() -> None:
    alive, suspect, confirm = State.ACTIVE, State.SUSPICIOUS, State.FAILED
    for i in range(3):
        for j in range(3):
            assert overrides(alive, (1, j), suspect, (1, i)) is (j > i)
            assert overrides(alive, (1, j), alive, (1, i)) is (j > i)
            assert overrides(suspect, (1, j), suspect, (1, i)) is (j > i)
            assert overrides(suspect, (1, j), alive, (1, i)) is (j >= i)
        assert overrides(confirm, (1, i), alive, (1, i))
        assert overrides(confirm, (1, i), suspect, (1, i))


def test_swim_4_2_only_the_member_itself_raises_its_incarnation() -> None:
    node = settled()
    before = node.core.incarnation
    node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    assert node.core.incarnation == before
    node.tell(3, rumor(1, State.SUSPICIOUS, accusers=(3,)))
    assert node.core.incarnation == before + 1


def test_swim_4_3_the_time_to_the_first_probe_of_a_dead_member_is_bounded() -> None:
    config = SwimConfig()
    for seed in range(10):
        net = SimNet(12, seed=seed)
        net.run(seed * 137)
        net.crash(5)
        began_ms = net.now_ms
        bound_ms = 3 * config.period_ms + config.probe_ms + config.look_ms
        net.run(bound_ms)
        first_ms = min(at for at, _, c in net.log if c.new is State.SUSPICIOUS)
        assert first_ms - began_ms <= bound_ms


def test_swim_5_infection_reaches_all_in_logarithmic_time() -> None:
    took = []
    for size in (16, 64):
        net = SimNet(size, seed=2)
        net.run(4_000)
        net.announce(3, State.STOPPED)
        took.append(net.until(lambda net=net: net.seen(3) == {"stopped"}, 5_000))  # type: ignore[misc]
    assert took[1] <= took[0] + 2 * 100 + 40  # four times the members: two more rounds of gossip, and their way


# -- beyond SWIM: TCP -------------------------------------------------------------------------------------------------


def test_a_tcp_probe_comes_before_the_accusation_and_its_answer_prevents_it() -> None:
    node = settled()
    probe_of(node, 2)
    out = node.wait(260, answering={3, 4, 5, 6, 7})
    (probe,) = [o for o in out if isinstance(o, ProbeTcp)]
    assert probe.node == node_id(2)
    assert probe.timeout_ms == 150 + 30
    assert node.state(2) is State.ACTIVE
    out = node.feed(TcpProbed(probe.node, probe.seq))
    assert out == [Exchange(node_id(2))]  # news cannot reach it in datagrams
    node.wait(300, answering={3, 4, 5, 6, 7})
    assert node.state(2) is State.ACTIVE


def test_the_accused_is_told_by_datagram_and_over_tcp_at_once() -> None:
    node = settled()
    probe_of(node, 2)
    out = node.wait(440, answering={3, 4, 5, 6, 7})
    assert node.state(2) is State.SUSPICIOUS
    assert Exchange(node_id(2)) in out
    told = [o for o in out if isinstance(o, Send) and o.address == address(2) and isinstance(o.message, Gossip)]
    assert told[0].message.rumors[0] == rumor(2, State.SUSPICIOUS, accusers=(1,))


# -- Lifeguard --------------------------------------------------------------------------------------------------------


def test_lifeguard_3a_the_score_stays_between_0_and_s() -> None:
    health = LocalHealth()
    health.better()
    assert health.score == 0
    for _ in range(20):
        health.worse()
    assert (health.score, health.stretch) == (SCORE_MAX, 9)
    health.better()
    assert health.score == SCORE_MAX - 1


def test_lifeguard_3a_a_probe_for_which_no_helper_said_a_word_speaks_against_the_prober() -> None:
    node = settled()
    probe_of(node, 2)
    node.wait(440, answering=set())
    assert node.core.health.score >= 1


def test_lifeguard_3a_nacks_speak_for_the_prober() -> None:
    node = settled()
    probe_of(node, 2)
    out = node.wait(160, answering={3, 4, 5, 6, 7})
    for o in out:
        if isinstance(o, Send) and isinstance(o.message, PingReq):
            number = int(o.address.split(":")[0].rsplit(".", 1)[1])
            node.say(number, Relayed(o.message.seq, node_id(2), f"n{number}", address(number)))
    node.wait(300, answering={3, 4, 5, 6, 7})
    assert node.state(2) is State.SUSPICIOUS
    assert node.core.health.score == 0


def test_lifeguard_3a_a_helper_sends_a_nack_at_80_percent_of_its_time() -> None:
    helper = settled()
    helper.say(3, PingReq(77, node_id(2), "n3", address(3)))
    out = helper.wait(190, answering={3, 4, 5, 6, 7})
    assert not messages([*out], Relayed)
    out = helper.wait(20, answering={3, 4, 5, 6, 7})
    (nack,) = messages([*out], Relayed)
    assert isinstance(nack.message, Relayed)
    assert (nack.address, nack.message.seq, nack.message.alive) == (address(3), 77, False)


def test_lifeguard_3a_a_suspicion_that_must_be_refuted_speaks_against_the_suspect() -> None:
    node = settled()
    node.tell(3, rumor(1, State.SUSPICIOUS, accusers=(3,)))
    assert node.core.health.score == 1


def test_lifeguard_3a_the_score_stretches_the_probes_of_an_ill_node() -> None:
    node = settled()
    node.core.health.score = 2
    probe_of(node, 2)
    node.wait(3 * 430 - 10, answering={3, 4, 5, 6, 7})
    assert node.state(2) is State.ACTIVE
    node.wait(20, answering={3, 4, 5, 6, 7})
    assert node.state(2) is State.SUSPICIOUS


def test_lifeguard_3b_the_suspicion_timeout_falls_with_the_logarithm_of_the_confirmations() -> None:
    # the paper's example: K = 3
    assert [suspicion_ms(5_000, 30_000, c, 3) for c in range(5)] == [30_000, 17_500, 10_188, 5_000, 5_000]


def test_lifeguard_3b_the_same_accuser_twice_is_no_confirmation() -> None:
    node = settled()
    node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    node.tell(4, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    assert node.core.members[node_id(2)].accusers == (node_id(3),)


def test_lifeguard_3c_a_suspect_is_told_with_the_ping() -> None:
    node = settled()
    node.tell(3, rumor(2, State.SUSPICIOUS, accusers=(3,)))
    out = node.wait(600, answering={3, 4, 5, 6, 7})
    pings = [o for o in out if isinstance(o, Send) and isinstance(o.message, Ping) and o.address == address(2)]
    assert pings
    assert all(o.message.rumors[0].node == node_id(2) for o in pings)


def test_lifeguard_4_a_few_overloaded_members_fail_no_healthy_one() -> None:
    rng = random.Random(4)
    net = SimNet(16, seed=4)
    for _ in range(150):
        slow = rng.sample(range(1, 5), rng.randint(1, 4))
        net.frozen.update(slow)
        net.run(rng.randint(200, 900))
        net.thaw(*slow)
        net.run(rng.randint(50, 500))
    assert [who for _, _, who in net.failures() if who > 4] == []


# -- what keeps it cheap ----------------------------------------------------------------------------------------------


def test_members_are_drawn_evenly_and_never_those_left_out() -> None:
    pool, rng = Pool(), random.Random(1)
    nodes = [node_id(number) for number in range(10)]
    for node in nodes:
        pool.keep(node, True)
    for node in nodes[:3]:
        pool.keep(node, False)
    drawn = [node for _ in range(3_000) for node in pool.draw(rng, 2, without=nodes[3:5])]
    assert set(drawn) == set(nodes[5:])
    assert all(1_000 < drawn.count(node) < 1_400 for node in nodes[5:])
    assert len(pool.draw(rng, 99)) == 7


@pytest.mark.parametrize("dead", [(3, 4, 5, 6, 7), (8, 9, 10, 1, 2)])
def test_five_adjacent_deaths_of_ten_are_seen_across(dead: tuple[int, ...]) -> None:
    for seed in range(3):
        net = SimNet(10, seed=seed)
        net.crash(*dead)
        net.until(lambda net=net: all(net.seen(number) == {"failed"} for number in dead), 4_000)  # type: ignore[misc]
        assert {who for _, _, who in net.failures()} == set(dead)


def test_twenty_adjacent_deaths_of_fifty_are_seen_across() -> None:
    net = SimNet(50, seed=2)
    dead = tuple(range(11, 31))
    net.crash(*dead)
    net.until(lambda: all(net.seen(number) == {"failed"} for number in dead), 10_000)
    assert {who for _, _, who in net.failures()} == set(dead)


def test_a_tick_before_its_time_does_nothing() -> None:
    node = settled()
    due = node.core.due_ms()
    assert due is not None
    assert node.core.handle(Tick(), due - 1) == []


def test_what_a_member_says_is_heard_only_from_itself() -> None:
    node = settled()
    out = node.feed(Received(node_id(3), 1, address(3), Relayed(12_345, node_id(2), "n3", address(3), 0, True)))
    assert out == []  # nothing of that number was asked
    assert node.core.members[node_id(2)].detours == 0

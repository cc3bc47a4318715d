# Whom a proposal waits for (gathering.py, and Callers that ask it).
from __future__ import annotations

import asyncio
import random

from idunno.consensus.gathering import COMPANY_MIN, QUIET_S, STALE_S, WAIT_MAX_S, Gathering
from idunno.consensus.messages import Append
from tests.unit.consensus.test_driver import WAIT_S, Cluster, story


def answered(callers: int, at_s: float = 1.0) -> Gathering:
    gathering = Gathering()
    gathering.answered(callers, at_s)
    return gathering


def test_nobody_waits_where_nobody_was_answered_or_few_were() -> None:
    assert Gathering().first(1.0) == 0
    assert answered(COMPANY_MIN - 1).first(1.0) == 0


def test_those_who_were_answered_are_waited_for_until_all_are_back() -> None:
    gathering = answered(COMPANY_MIN)
    assert gathering.first(1.0) == QUIET_S
    assert [gathering.another() for _ in range(COMPANY_MIN - 1)] == [False] * (COMPANY_MIN - 2) + [True]


def test_it_waits_on_only_while_they_keep_coming() -> None:
    gathering = answered(100)
    gathering.first(1.0)
    gathering.another()
    assert gathering.on(1.0 + QUIET_S) == QUIET_S
    assert gathering.on(1.0 + 2 * QUIET_S) == 0


def test_it_never_waits_longer_than_the_bound() -> None:
    gathering = answered(1_000_000)
    now_s = 1.0
    wait_s = gathering.first(now_s)
    while wait_s:
        now_s += wait_s
        gathering.another()
        wait_s = gathering.on(now_s)
    assert WAIT_MAX_S <= now_s - 1.0 < WAIT_MAX_S + 2 * QUIET_S


def test_who_did_not_come_back_is_not_expected_by_the_next() -> None:
    gathering = answered(100)
    gathering.first(1.0)
    gathering.appended()
    assert gathering.first(1.001) == 0
    assert answered(100).first(1.0 + 2 * STALE_S) == 0


def test_answers_of_long_ago_add_nothing_to_those_of_now() -> None:
    gathering = answered(100)
    gathering.answered(COMPANY_MIN - 1, 1.0 + 2 * STALE_S)
    assert gathering.first(1.0 + 2 * STALE_S) == 0


def test_callers_that_ask_again_share_appends_though_they_come_back_one_after_another() -> None:
    async def work(cluster: Cluster) -> None:
        leader = await cluster.elected()
        follower = next(name for name in cluster.voters if name != leader.me)
        appends, send = 0, cluster.send

        def counted(sender: str, to: str, message: object) -> None:
            nonlocal appends
            appends += to == follower and isinstance(message, Append) and bool(message.entries)
            send(sender, to, message)  # type: ignore[arg-type]

        cluster.send = counted  # type: ignore[method-assign]
        rng = random.Random(7)

        async def caller(number: int) -> None:
            for i in range(20):
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
                await leader.propose(b"%d-%d" % (number, i), WAIT_S)

        await asyncio.gather(*(caller(number) for number in range(16)))
        assert 20 <= appends <= 60, "320 proposals of 16 callers"

    story(work, 3)

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from idunno.base.ids import NodeId
from idunno.scheduler.dispatch import Answer, Dispatch, Lease, Polled
from idunno.scheduler.explain import Decisions
from idunno.scheduler.fairness import FairClock
from idunno.scheduler.messages import Held
from idunno.scheduler.queues import JobHead
from tests.unit.scheduler.ready import Readies


@dataclass
class Bench:
    """Workers that run tasks of known cost on a virtual clock, each with one task at a time, around the real dispatcher."""

    cost_us: dict[str, int]
    workers: int
    batch: dict[str, int]
    weight: dict[str, int] = field(default_factory=dict)
    noise: float = 0.0
    seed: int = 0
    done: list[tuple[int, str, int]] = field(default_factory=list)  # (us, model, queries)

    def run(self, seconds: float) -> Bench:
        rng = random.Random(self.seed)
        tasks = Readies()
        dispatch = Dispatch(0, [], Decisions(), tasks)
        for order, model in enumerate(self.cost_us):
            dispatch.queues.set_weight(model, self.weight.get(model, 1000))
            tasks.set(f"job-{model}", range(20_000))
            dispatch.open(JobHead(f"job-{model}", model, "ann", order, self.batch[model]), old=False)
        ready = tuple((model, 1) for model in self.cost_us)
        events: list[tuple[int, int, str]] = [(0, n, "") for n in range(self.workers)]
        running: dict[int, Lease] = {}
        while events:
            now_us, worker, _ = heapq.heappop(events)
            if now_us > seconds * 1e6:
                break
            lease = running.pop(worker, None)
            if lease is not None:
                tasks.over(lease.head.job, lease.task)
                dispatch.completed(lease.head.job, lease.task, now_us // 1000)
                self.done.append((now_us, lease.head.model, lease.queries))
            node = NodeId(f"n{worker}")
            answers = dispatch.poll(Polled(node, node, 1, 1, 1, ready, ()), now_us // 1000)
            assert len(answers) == 1, "a worker stays idle while there is work"
            answer = answers[0]
            assert isinstance(answer, Answer)
            lease = running[worker] = answer.leases[0][0]
            cost = self.cost_us[lease.head.model] * lease.queries * (1 + self.noise * (2 * rng.random() - 1))
            heapq.heappush(events, (now_us + int(cost) + 1, worker, ""))
        return self

    def spread(self, from_s: float, to_s: float) -> float:
        rates = dict.fromkeys(self.cost_us, 0.0)
        for at_us, model, queries in self.done:
            if from_s * 1e6 < at_us <= to_s * 1e6:
                rates[model] += queries * 1000 / self.weight.get(model, 1000)
        return 1 - min(rates.values()) / max(rates.values())

    def window_s(self) -> float:
        """Long enough for twenty tasks of each model, whatever order they come in."""
        queries = max(self.batch.values())
        per_round_us = sum(c * queries * self.weight.get(m, 1000) / 1000 for m, c in self.cost_us.items())
        return 22 * per_round_us / self.workers / 1e6


@pytest.mark.parametrize("seed", range(24))
def test_query_rates_are_equal_whatever_a_query_costs(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"m{i}" for i in range(rng.randint(2, 8))]
    cheapest = rng.randint(1_000, 5_000)
    cost = {name: cheapest * rng.randint(1, 50) for name in names}
    batch = {name: max(1, 250_000 // cost[name]) for name in names}
    bench = Bench(cost, rng.randint(1, 16), batch, noise=0.3, seed=seed)
    window = bench.window_s()
    bench.run(4 * window)
    for k in (1, 2, 3):
        spread = bench.spread(k * window, (k + 1) * window)
        assert spread <= 0.20, f"seed {seed}, window {k} of {window:.0f} s: spread {spread:.0%}"


def test_rates_follow_the_weights() -> None:
    weight = {"a": 1000, "b": 1000, "c": 1000, "d": 2000, "e": 4000}
    bench = Bench(dict.fromkeys(weight, 10_000), 4, dict.fromkeys(weight, 8), weight, noise=0.3)
    bench.run(60)
    assert bench.spread(10, 30) <= 0.10
    assert bench.spread(30, 50) <= 0.10


def test_fairness_by_tasks_would_be_caught() -> None:
    bench = Bench({"cheap": 1_000, "dear": 50_000}, 4, {"cheap": 250, "dear": 5})
    bench.run(120)
    tasks = {m: sum(1 for _, model, _ in bench.done if model == m) for m in bench.cost_us}
    assert tasks["dear"] > 40 * tasks["cheap"]  # equal queries are very unequal tasks here
    assert bench.spread(40, 120) <= 0.20


def test_an_idle_model_comes_back_at_the_present_not_with_saved_credit() -> None:
    clock: FairClock[str] = FairClock()
    clock.wake("a")
    clock.wake("b")
    clock.rest("b")
    for _ in range(1_000):
        clock.charge("a", 10)
    clock.wake("b")
    turns = []
    for _ in range(10):
        first = clock.order()[0]
        turns.append(first)
        clock.charge(first, 10)
    assert turns.count("b") in (5, 6)


def test_a_model_that_could_not_be_served_catches_up_two_tasks_and_no_more() -> None:
    clock: FairClock[str] = FairClock()
    clock.wake("blocked")
    clock.wake("served")
    for _ in range(1_000):
        clock.charge("served", 10)
        clock.order()
    turns = []
    for _ in range(10):
        first = clock.order()[0]
        turns.append(first)
        clock.charge(first, 10)
    assert turns[:2] == ["blocked", "blocked"]
    assert 5 <= turns.count("blocked") <= 7


def test_what_was_served_beyond_the_share_is_remembered_over_a_pause() -> None:
    clock: FairClock[str] = FairClock()
    clock.wake("a")
    clock.wake("b")
    clock.charge("a", 100)
    clock.rest("a")
    clock.wake("a")
    assert clock.order() == ["b", "a"]
    assert clock.time("a") == 100


def test_what_is_remembered_of_idle_keys_is_bounded() -> None:
    clock: FairClock[str] = FairClock()
    for i in range(5_000):
        clock.wake(f"c{i}")
        clock.charge(f"c{i}", 1)
        clock.rest(f"c{i}")
    assert len(clock._shares) <= 300


def test_a_flood_by_one_client_delays_another_by_one_task() -> None:
    ready = Readies()
    dispatch = Dispatch(0, [], Decisions(), ready)
    for n in range(50):
        ready.set(f"flood-{n}", range(100))
        dispatch.open(JobHead(f"flood-{n}", "m", "bob", n, 32), old=False)
    ready.set("small", range(2))
    dispatch.open(JobHead("small", "m", "ann", 99, 32), old=False)
    jobs, held = [], list[Held]()
    for turn in range(6):
        [answer] = dispatch.poll(Polled(NodeId("n1"), "n1", 1, 1, 1, (("m", 1),), tuple(held)), turn)
        assert isinstance(answer, Answer)
        lease = answer.leases[0][0]
        jobs.append(lease.head.job)
        ready.over(lease.head.job, lease.task)
        dispatch.completed(lease.head.job, lease.task, turn)
    assert jobs[:4].count("small") == 2
    assert jobs[4:] == ["flood-0", "flood-0"]

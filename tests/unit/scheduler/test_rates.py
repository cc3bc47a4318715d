from __future__ import annotations

import pytest

from idunno.scheduler.explain import ABOUT_MAX, Decisions
from idunno.scheduler.rates import BUCKET_MS, WINDOW_MS, RateWindow
from idunno.scheduler.sizing import QUERIES_MAX, QUERIES_UNMEASURED, task_queries


def test_the_rate_is_of_the_last_ten_seconds_in_machine_time() -> None:
    window = RateWindow()
    skew = 1_700_000_000_000  # machine time against this node's steady clock
    for second in range(30):
        window.completed("m", 50, skew + second * 1_000, second * 1_000)
    assert window.rates(29_000) == {"m": 50.0}
    assert window.rates(29_000 + WINDOW_MS // 2)["m"] == pytest.approx(25.0, abs=5.0)
    assert window.rates(29_000 + 2 * WINDOW_MS) == {}


def test_a_replayed_log_makes_no_present_rate() -> None:
    window = RateWindow()
    for second in range(30):
        window.completed("m", 50, second * 1_000, 7)  # hours ago, replayed within a moment
    window.observe(3_600_000, 9)  # the first entry of the new leader
    assert window.rates(10) == {}


def test_what_is_kept_is_bounded() -> None:
    window = RateWindow()
    for ms in range(60_000):
        window.completed("m", 1, ms, ms)
    assert len(window._sums["m"]) <= WINDOW_MS // BUCKET_MS + 1
    assert window.rates(59_999)["m"] == pytest.approx(1_000, rel=0.01)


def test_the_spread_is_over_models_that_had_work_all_the_time_by_weight() -> None:
    window = RateWindow()
    window.waiting("a", True, 0)
    window.waiting("b", True, 0)
    window.waiting("late", True, 15_000)
    for ms in range(0, 20_000, 100):
        window.completed("a", 10, ms, ms)
        window.completed("b", 16, ms, ms)
        window.completed("late", 1, ms, ms)
        window.completed("idle", 1, ms, ms)
    weights = {"a": 1_000, "b": 2_000, "late": 1_000, "idle": 1_000}
    assert window.spread(weights, 20_000) == pytest.approx(0.2, abs=0.01)
    window.waiting("b", False, 20_000)
    assert window.spread(weights, 20_000) == 0.0  # a model alone is fair
    window.waiting("b", True, 20_100)
    assert window.spread(weights, 20_100) == 0.0  # not yet a whole window


@pytest.mark.parametrize(
    ("job", "model", "timed", "sum_us", "expected"),
    [
        (7, 64, 100, 100_000, 7),  # the job's own
        (0, 64, 100, 100_000, 64),  # the model's
        (0, 0, 0, 0, QUERIES_UNMEASURED),
        (0, 0, 100, 100_000, 250),  # 1 ms a query: a quarter of a second
        (0, 0, 10, 10_000_000, 1),  # 1 s a query
        (0, 0, 1_000, 10, QUERIES_MAX),
        (0, 0, 1_000, 0, QUERIES_MAX),
        (100_000, 0, 0, 0, QUERIES_MAX),
    ],
)
def test_how_many_queries_make_a_task(job: int, model: int, timed: int, sum_us: int, expected: int) -> None:
    assert task_queries(job, model, timed, sum_us) == expected


def test_decisions_about_many_things_are_bounded_and_the_same_one_is_kept_once() -> None:
    decisions = Decisions()
    for n in range(2 * ABOUT_MAX):
        decisions.record(n, "because", f"job-{n}", "model")
        decisions.record(n, "because", f"job-{n}", "model")
    assert len(decisions) <= ABOUT_MAX
    assert [d.at_ms for d in decisions.about("model")] == [0]
    assert decisions.about("job-0") == []

from __future__ import annotations

import math
import random
import statistics

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idunno.base.errors import InvalidArgument
from idunno.coordinator import timing as t
from idunno.coordinator.records import Timing


def test_bucket_bounds_rise_by_five_percent_in_whole_numbers() -> None:
    assert t.BOUNDS_US[:5] == (0, 1, 2, 3, 4)
    for low, high in zip(t.BOUNDS_US, t.BOUNDS_US[1:], strict=False):
        assert low < high <= max(low + 1, low * 105 // 100)
    assert t.BUCKETS < 600


@given(st.integers(-5, 10**13))
def test_a_duration_lies_in_its_bucket(us: int) -> None:
    bucket = t.bucket_of(us)
    assert 0 <= bucket < t.BUCKETS
    assert t.BOUNDS_US[bucket] <= max(0, us)
    assert bucket == t.BUCKETS - 1 or us < t.BOUNDS_US[bucket + 1]


Pairs = list[tuple[int, int]]

durations = st.lists(st.tuples(st.integers(0, 10**10), st.integers(1, 1000)), max_size=30)


@given(durations, durations, durations)
def test_merging_is_the_same_in_any_order(a: Pairs, b: Pairs, c: Pairs) -> None:
    x, y, z = t.timing_of(a), t.timing_of(b), t.timing_of(c)
    assert t.merge(t.merge(x, y), z) == t.merge(x, t.merge(z, y)) == t.timing_of([*a, *b, *c])


def test_what_people_see_is_close_to_the_truth() -> None:
    rng = random.Random(7)
    sample = [int(rng.lognormvariate(9, 0.6)) for _ in range(20_000)]
    timing = t.timing_of((us, 1) for us in sample)
    assert timing.count == 20_000
    assert math.isclose(t.mean_s(timing), statistics.fmean(sample) / 1e6, rel_tol=1e-9)
    assert math.isclose(t.std_s(timing), statistics.pstdev(sample) / 1e6, rel_tol=1e-9)
    sample.sort()
    for permille in (500, 900, 950, 990):
        truth = sample[len(sample) * permille // 1000 - 1] / 1e6
        assert math.isclose(t.percentile_s(timing, permille), truth, rel_tol=0.03)


def test_full_sums_still_encode_and_the_deviation_comes_from_the_buckets() -> None:
    timing = t.timing_of([(t.DURATION_US_MAX, 10**6), (t.DURATION_US_MAX // 2, 10**6)])
    assert timing.sum_squares_us2 == t.SUM_MAX
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(timing), type=Timing) == timing
    assert math.isclose(t.std_s(timing), 250_000, rel_tol=0.05)
    total = t.TimingTotal(timing)
    total.add(timing)
    assert total.sum_us <= t.SUM_MAX


def test_nothing_measured_is_zero() -> None:
    assert (t.mean_s(Timing()), t.std_s(Timing()), t.percentile_s(Timing(), 500)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "bad",
    [
        Timing(1, 1, 1, ()),
        Timing(1, 1, 1, ((-1, 1),)),
        Timing(1, 1, 1, ((t.BUCKETS, 1),)),
        Timing(2, 1, 1, ((3, 1), (3, 1))),
        Timing(0, 0, 0, ((3, 0),)),
        Timing(1, -1, 1, ((3, 1),)),
        Timing(1, 1, 2**63, ((3, 1),)),
    ],
)
def test_a_timing_nobody_measured_is_refused(bad: Timing) -> None:
    with pytest.raises(InvalidArgument):
        t.check_timing(bad)

# idunno/coordinator/timing.py: how long queries took, as counts in buckets that grow by 5 %.
#
# Rule 1: the machine merges these, so bucket numbers are found with whole numbers only: a logarithm may differ in its last
#         bit between two processors, and with it the machines.
# Rule 2: floats are for people: only the *_s functions make them, and nothing they return goes back into a record.
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

from idunno.base.errors import InvalidArgument
from idunno.coordinator.records import Timing

DURATION_US_MAX: Final = 10**12
"""Eleven days for one query. Longer counts as this long."""


def _bounds() -> tuple[int, ...]:
    bounds = [0]
    while bounds[-1] < DURATION_US_MAX:
        bounds.append(max(bounds[-1] + 1, bounds[-1] * 105 // 100))
    return tuple(bounds)


BOUNDS_US: Final = _bounds()
"""Bucket i counts durations of BOUNDS_US[i] up to, not including, BOUNDS_US[i + 1] microseconds. 1 us wide up to 40 us."""
BUCKETS: Final = len(BOUNDS_US)
SUM_MAX: Final = 2**63 - 1
"""MessagePack carries 64 bits. Sums stop here, on every node alike; the deviation is then taken from the buckets."""


def bucket_of(duration_us: int) -> int:
    """The bucket of a duration in whole microseconds, 0 <= bucket < BUCKETS."""
    return bisect_right(BOUNDS_US, max(0, duration_us)) - 1


class TimingTotal:
    """A Timing that grows: what `add` costs depends on what is added, not on what is there."""

    __slots__ = ("_buckets", "count", "sum_squares_us2", "sum_us")

    def __init__(self, start: Timing | None = None) -> None:
        self.count, self.sum_us, self.sum_squares_us2 = 0, 0, 0
        self._buckets: dict[int, int] = {}
        if start is not None:
            self.add(start)

    def add(self, timing: Timing) -> None:
        self.count += timing.count
        self.sum_us = min(self.sum_us + timing.sum_us, SUM_MAX)
        self.sum_squares_us2 = min(self.sum_squares_us2 + timing.sum_squares_us2, SUM_MAX)
        for bucket, count in timing.buckets:
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count

    def measure(self, duration_us: int, count: int = 1) -> None:
        """Count `count` queries that took `duration_us` each (whole microseconds, clamped to what a bucket can hold)."""
        us = min(max(0, duration_us), DURATION_US_MAX)
        sums = min(us * count, SUM_MAX), min(us * us * count, SUM_MAX)
        self.add(Timing(count, *sums, ((bucket_of(us), count),)))

    def record(self) -> Timing:
        return Timing(self.count, self.sum_us, self.sum_squares_us2, tuple(sorted(self._buckets.items())))


def timing_of(durations: Iterable[tuple[int, int]]) -> Timing:
    """The Timing of (duration in whole microseconds, how many queries took so long) pairs."""
    total = TimingTotal()
    for duration_us, count in durations:
        total.measure(duration_us, count)
    return total.record()


def merge(a: Timing, b: Timing) -> Timing:
    total = TimingTotal(a)
    total.add(b)
    return total.record()


def check_timing(timing: Timing) -> None:
    """Raises InvalidArgument for a Timing that `timing_of` could not have made: it would spoil a model's figures for ever."""
    last, counted = -1, 0
    for bucket, count in timing.buckets:
        if not last < bucket < BUCKETS or count < 1:
            raise InvalidArgument(
                f"timing has bucket {bucket} with count {count}: buckets rise below {BUCKETS}, counts are 1 or more"
            )
        last, counted = bucket, counted + count
    if counted != timing.count:
        raise InvalidArgument(f"timing of {timing.count} queries has {counted} in its buckets")
    if not 0 <= timing.sum_us <= SUM_MAX or not 0 <= timing.sum_squares_us2 <= SUM_MAX:
        raise InvalidArgument(
            f"timing has sums {timing.sum_us} us, {timing.sum_squares_us2} us^2: 0 to {SUM_MAX} are possible"
        )


def mean_s(timing: Timing) -> float:
    return timing.sum_us / timing.count / 1e6 if timing.count else 0.0


def std_s(timing: Timing) -> float:
    """The standard deviation over all queries, in seconds. Exact until a sum is full, then from the buckets' middles."""
    n = timing.count
    if not n:
        return 0.0
    if timing.sum_us < SUM_MAX and timing.sum_squares_us2 < SUM_MAX:
        return math.sqrt(max(0, n * timing.sum_squares_us2 - timing.sum_us**2)) / n / 1e6
    middles = [(_middle_us(bucket), count) for bucket, count in timing.buckets]
    mean_us = sum(middle * count for middle, count in middles) / n
    return math.sqrt(sum((middle - mean_us) ** 2 * count for middle, count in middles) / n) / 1e6


def percentile_s(timing: Timing, permille: int) -> float:
    """The duration, in seconds, that `permille` thousandths of the queries did not exceed (500: the median).

    The middle of its bucket: at most 2.5 % off, or half a microsecond.
    """
    rank, seen = -(-timing.count * permille // 1000), 0
    for bucket, count in timing.buckets:
        seen += count
        if seen >= rank:
            return _middle_us(bucket) / 1e6
    return 0.0


def _middle_us(bucket: int) -> float:
    high = BOUNDS_US[bucket + 1] if bucket + 1 < BUCKETS else BOUNDS_US[bucket] + 1
    return (BOUNDS_US[bucket] + high - 1) / 2

# Many deadlines, one timer: each call hears of its own in time, and nobody hears too early.
from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from idunno.wire.deadlines import Deadlines
from tests.unit.wire.support import LOOPS, run, until

ROUNDED_S = 0.001
"""uvloop's timers count in milliseconds."""


@dataclass
class Waiting:
    number: int
    deadline: float


class Calls:
    """Calls under way, and those that were late, with the moment when they heard of it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.calls: dict[int, Waiting] = {}
        self.late: list[tuple[int, float]] = []
        self.deadlines = Deadlines(self.calls, self._late)

    def add(self, number: int, in_s: float) -> None:
        deadline = self.loop.time() + in_s
        self.calls[number] = Waiting(number, deadline)
        self.deadlines.added(deadline)

    def _late(self, call: Waiting) -> None:
        del self.calls[call.number]
        self.late.append((call.number, self.loop.time() - call.deadline))

    def timers(self) -> list[asyncio.TimerHandle]:
        timer = self.deadlines._timer
        return [] if timer is None or timer.cancelled() else [timer]


@pytest.mark.parametrize("loop", LOOPS)
def test_each_call_hears_of_its_own_deadline(loop: str) -> None:
    async def main() -> None:
        calls = Calls()
        for number, in_s in enumerate((0.03, 0.01, 0.05, 0.02, 60.0)):
            calls.add(number, in_s)
        await until(lambda: len(calls.late) == 4)
        assert [number for number, _ in calls.late] == [1, 3, 0, 2]
        assert all(after_s >= -ROUNDED_S for _, after_s in calls.late)
        assert list(calls.calls) == [4]
        calls.deadlines.stop()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_calls_that_end_in_time_hear_nothing_and_leave_no_timer(loop: str) -> None:
    async def main() -> None:
        calls = Calls()
        calls.add(1, 0.01)
        calls.add(2, 0.02)
        del calls.calls[1]
        await until(lambda: bool(calls.late))
        assert [number for number, _ in calls.late] == [2]
        assert not calls.timers()
        calls.add(3, 0.0)  # and the next one is watched all the same
        await until(lambda: len(calls.late) == 2)

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_call_that_stays_after_its_deadline_keeps_nobody_awake(loop: str) -> None:
    async def main() -> None:
        calls = Calls()
        told: list[int] = []
        calls.deadlines = Deadlines(calls.calls, lambda call: told.append(call.number))  # as a handler that cleans up
        calls.add(1, 0.0)
        await until(lambda: told == [1])
        assert not calls.timers()
        calls.add(2, 60.0)
        assert calls.timers()
        calls.deadlines.stop()
        assert not calls.timers()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_error_in_one_end_leaves_the_later_deadlines(loop: str) -> None:
    async def main() -> None:
        calls = Calls()
        calls.loop.set_exception_handler(lambda *_: None)
        calls.add(1, 0.0)
        del calls.calls[1]
        calls.calls[7] = Waiting(1, 0.0)  # its number is not its place: telling of it fails
        await until(lambda: not calls.timers())
        del calls.calls[7]
        calls.add(2, 0.01)
        await until(lambda: bool(calls.late))

    run(loop, main)

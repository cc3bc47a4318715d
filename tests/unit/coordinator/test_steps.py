# What is done to a million things in steps comes out as if it had been done at once.
from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from idunno.coordinator import steps
from idunno.coordinator.machine import Machine
from idunno.coordinator.steps import free, in_order
from tests.unit.coordinator.replay import history


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 150, 1_000, 20_000])
@pytest.mark.parametrize(
    "name",
    [
        lambda number, rng: f"data/{rng.random()}",
        lambda number, rng: f"{number:08d}",
        lambda number, rng: f"{-number}",
        lambda number, rng: f"{number % 100:04d}/{number}",  # the sample sees one folder only
        lambda number, rng: "same",
    ],
)
def test_names_come_out_sorted(
    monkeypatch: pytest.MonkeyPatch, count: int, name: Callable[[int, random.Random], str]
) -> None:
    monkeypatch.setattr(steps, "AT_ONCE", 100)
    rng = random.Random(count)
    names = [name(number, rng) for number in range(count)]
    assert in_order(list(names)) == sorted(names)


def test_no_sort_is_of_many_more_than_are_sorted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(names: list[str]) -> list[str]:
        sizes.append(len(names))
        return sorted(names)

    monkeypatch.setattr(steps, "sorted", watched, raising=False)
    names = [f"{number}" for number in range(200_000)]
    random.Random(1).shuffle(names)
    assert in_order(names) == sorted(names)
    assert max(sizes) <= 2 * steps.AT_ONCE


def test_what_is_freed_is_empty() -> None:
    table, rows = {number: str(number) for number in range(25_000)}, list(range(25_000))
    free(table)
    free(rows)
    assert (table, rows) == ({}, [])


def test_a_machine_whose_place_was_taken_is_not_the_one_that_is_freed() -> None:
    wanted = history(1, 300).machine.snapshot()
    machine = Machine()
    assert machine.become(Machine.restore(wanted)).namespace.files == 0
    was = machine.become(Machine.restore(wanted))
    was.free()
    assert machine.snapshot() == wanted
    assert (len(was.references), list(was.namespace.each())) == (0, [])

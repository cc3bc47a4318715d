# Names in order, against one sorted list.
from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from idunno.coordinator import ordered
from idunno.coordinator.ordered import OrderedNames

NAMES = st.text("ab/\0é", max_size=4)


class Ordered(RuleBasedStateMachine):
    """With parts of at most four names, so that they are cut, and go, all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.small = mock.patch.object(ordered, "PART_MAX", 4)
        self.small.start()

    def teardown(self) -> None:
        self.small.stop()

    @initialize(names=st.sets(NAMES, max_size=20))
    def begin(self, names: set[str]) -> None:
        self.names, self.model = OrderedNames(list(names)), sorted(names)

    @rule(name=NAMES)
    def turn(self, name: str) -> None:
        if name in self.model:
            self.names.remove(name)
            self.model.remove(name)
        else:
            self.names.add(name)
            insort(self.model, name)

    @rule()
    def clear(self) -> None:
        for name in self.model:
            self.names.remove(name)
        self.model = []

    @rule(begin=NAMES, end=st.none() | NAMES)
    def span(self, begin: str, end: str | None) -> None:
        stop = len(self.model) if end is None else bisect_left(self.model, end)
        assert list(self.names.span(begin, end)) == self.model[bisect_left(self.model, begin) : stop]

    @invariant()
    def same(self) -> None:
        if hasattr(self, "model"):
            assert list(self.names) == self.model
            assert all(len(part) <= 4 for part in self.names._parts)


TestOrdered = Ordered.TestCase


class Counted(str):
    """Counts how often it is looked at."""

    looks = 0
    __slots__ = ()
    __hash__ = str.__hash__

    def __lt__(self, other: str) -> bool:
        Counted.looks += 1
        return str.__lt__(self, other)


@pytest.fixture
def many() -> Iterator[OrderedNames]:
    names = OrderedNames([f"{number:07}" for number in range(0, 200_000, 2)])
    yield names
    names.free()


def test_one_more_name_moves_few_others(many: OrderedNames) -> None:
    before = [len(part) for part in many._parts]
    Counted.looks = 0
    many.add(Counted("0000001"))
    assert sum(before) == 100_000
    assert max(before) <= ordered.PART_MAX
    assert 0 < Counted.looks <= 40
    assert sum(abs(a - b) for a, b in zip([len(part) for part in many._parts], before, strict=True)) == 1


def test_nothing_is_left_of_what_was_let_go(many: OrderedNames) -> None:
    many.free()
    assert list(many) == []

# A table in the order in which its items came, against one dict.
from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from idunno.coordinator import aged
from idunno.coordinator.aged import Aged

KEYS = st.integers(0, 20)
MANY = 20_000


class Table(RuleBasedStateMachine):
    """With parts of at most three items, so that they fill, and go, all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.small = mock.patch.object(aged, "PART_MAX", 3)
        self.small.start()
        self.table, self.model = Aged[int, int](), dict[int, int]()
        self.captured = list[tuple[list[dict[int, int]], list[tuple[int, int]]]]()

    def teardown(self) -> None:
        self.small.stop()

    @rule(key=KEYS, value=KEYS)
    def set(self, key: int, value: int) -> None:
        self.table[key] = self.model[key] = value
        assert self.table[key] == value

    @rule(key=KEYS)
    def pop(self, key: int) -> None:
        assert self.table.pop(key) == self.model.pop(key, None)

    @precondition(lambda self: self.model)
    @rule()
    def pop_oldest(self) -> None:
        assert self.table.oldest() == next(iter(self.model))
        self.table.pop(self.table.oldest())
        del self.model[next(iter(self.model))]

    @rule()
    def clear(self) -> None:
        self.table.free()
        self.model.clear()

    @rule()
    def capture(self) -> None:
        self.captured.append((self.table.capture(), list(self.model.items())))

    @invariant()
    def same(self) -> None:
        assert list(self.table) == list(self.model)
        assert list(self.table.items()) == list(self.model.items())
        assert list(self.table.values()) == list(self.model.values())
        assert len(self.table) == len(self.model)
        assert [(key in self.table, self.table.get(key)) for key in range(21)] == [
            (key in self.model, self.model.get(key)) for key in range(21)
        ]
        assert all(part.items for part in self.table._parts)

    @invariant()
    def captures_stay_as_they_were(self) -> None:
        for parts, items in self.captured:
            assert [item for part in parts for item in part.items()] == items


TestAged = Table.TestCase


class Counted(dict[int, int]):
    """Counts the items that are walked over."""

    walked = 0

    def __iter__(self) -> Iterator[int]:
        for key in super().__iter__():
            Counted.walked += 1
            yield key


def test_what_is_behind_a_key_is_found_by_looking_at_few() -> None:
    table = Aged((key, -key) for key in range(0, MANY, 2))
    looked = 0
    for part in table._parts:
        part.items = Counted(part.items)
    for key in (-1, 0, 1, MANY // 2, MANY - 3, MANY):
        assert list(table.behind(key)) == [-other for other in range(0, MANY, 2) if other > key]
        Counted.walked = 0
        next(table.behind(key), None)
        looked = max(looked, Counted.walked)
    assert looked <= 10


def test_the_oldest_is_found_though_all_before_it_are_gone_and_a_capture_copies_nothing() -> None:
    table = Aged((key, key) for key in range(MANY))
    parts = [part.items for part in table._parts]
    captured = table.capture()
    assert all(part is items for part, items in zip(captured, parts, strict=True))
    for key in range(MANY - 1):
        assert table.oldest() == key
        table.pop(key)
        assert len(table._parts) <= (MANY - key) // aged.PART_MAX + 2
    table[MANY] = MANY
    assert list(table) == [MANY - 1, MANY]
    assert sum(map(len, captured)) == MANY

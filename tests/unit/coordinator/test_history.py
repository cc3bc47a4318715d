# The versions of a file against one tuple, and what one more of many copies.
from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idunno.coordinator import history
from idunno.coordinator.history import History, Versions
from idunno.coordinator.namespace import Namespace
from idunno.coordinator.records import VersionRecord


def record(number: int) -> VersionRecord:
    return VersionRecord(number, number, (), 1_000 + number, "ann", f"put-{number}", False)


def numbers(versions: Versions) -> list[int]:
    return [one.version for one in versions]


STEPS = st.lists(st.one_of(st.just("add"), st.sets(st.integers(0, 60), max_size=20)), max_size=60)
SLICES = st.builds(slice, *[st.one_of(st.none(), st.integers(-12, 12))] * 2, st.sampled_from([None, 1, -1, 3, -2]))


@given(begin=st.integers(0, 30), steps=STEPS, cut=SLICES)
def test_it_is_what_one_tuple_is(begin: int, steps: list[str | set[int]], cut: slice) -> None:
    with mock.patch.object(history, "PART", 3):
        model = tuple(record(n) for n in range(1, begin + 1))
        versions, last = history.of(model), begin
        for step in steps:
            before, was = versions, tuple(versions)
            if isinstance(step, str):
                last += 1
                versions, model = history.and_one(versions, record(last)), (*model, record(last))
            else:
                versions, gone = history.without(versions, frozenset(step))
                assert numbers(gone) == [one.version for one in model if one.version in step]
                model = tuple(one for one in model if one.version not in step)
            assert tuple(before) == was  # a capture may hold it
            assert (tuple(versions), len(versions)) == (model, len(model))
            assert isinstance(versions, History) or len(versions) <= 3
        assert tuple(versions[at] for at in range(-len(model), len(model))) == model * 2
        assert tuple(versions[cut]) == model[cut]
        for at in (len(model), -len(model) - 1):
            with pytest.raises(IndexError):
                versions[at]


def test_one_more_of_many_copies_a_part_at_most() -> None:
    versions = history.of(record(n) for n in range(1, 10_001))
    assert isinstance(versions, History)
    more: Versions = versions
    for number in range(10_001, 10_301):
        was, more = more, history.and_one(more, record(number))
        assert isinstance(was, History)
        assert isinstance(more, History)
        assert all(one is other for one, other in zip(was.full, more.full, strict=False))
        assert len(more.parts()[-1]) <= history.PART
    kept, gone = history.without(more, frozenset(range(1, 101)))
    assert isinstance(kept, History)
    assert isinstance(more, History)
    assert (numbers(gone), len(kept)) == (list(range(1, 101)), 10_200)
    assert all(one is other for one, other in zip(kept.full[1:], more.full[1:], strict=True))


def test_a_file_of_many_versions_is_found_and_kept_as_one_of_few() -> None:
    namespace = Namespace(version=3)
    for number in range(1, 701):
        namespace.add("log", number, (), "ann", f"put-{number}", 1_000 + number, small=False)
    again = Namespace(namespace.state(), version=3)
    for one in (namespace, again):
        assert one.latest("log") == one.version("log", 700) == record(700)
        assert one.version("log", 257) == one.as_of("log", 1_257) == record(257)
        assert numbers(one.last("log", 3)) == [700, 699, 698]
        done, gone = one.expire("log", (*range(1, 601), 700), "ann", 9_000)
        assert (done.changed, gone, numbers(tuple(one.history("log")))) == (True, [], list(range(601, 701)))
        assert one.restore("log") == 600
        assert one.delete("log", "d1", "ann", 9_001)[0].versions == 700
    assert namespace.state() == again.state()

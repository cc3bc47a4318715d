# The rule of who votes, as a table; and that it always comes to rest where it should.
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.ids import NodeId
from idunno.coordinator.electorate import Change, next_change, voters_of

ALL = [NodeId(name) for name in "abcdefghij"]


def nodes(text: str) -> list[NodeId]:
    return [NodeId(name) for name in text]


def step(
    roster: str, voters: str, *, ready: str = "", silent: str = "", away: str = "", leaving: str = "", leader: str = "a"
) -> str:
    """ "+x" or "-x", or "" for nothing."""
    change = next_change(
        nodes(roster),
        nodes(voters),
        NodeId(leader),
        ready=nodes(ready),
        silent=nodes(silent),
        away=nodes(silent + away),
        leaving=nodes(leaving),
    )
    return "" if change is None else ("+" if change.joins else "-") + change.node


@pytest.mark.parametrize(
    ("count", "voters"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (7, 7), (8, 7), (10, 7), (100, 7)]
)
def test_the_largest_odd_number_up_to_seven(count: int, voters: int) -> None:
    assert voters_of(count) == voters


@pytest.mark.parametrize(
    ("why", "state", "expected"),
    [
        ("one node alone", {"roster": "a", "voters": "a"}, ""),
        ("two nodes have one voter", {"roster": "ab", "voters": "a", "ready": "b"}, ""),
        ("three have three", {"roster": "abc", "voters": "a", "ready": "bc"}, "+b"),
        ("not even half-way before both are ready", {"roster": "abc", "voters": "a", "ready": "b"}, ""),
        ("the second step", {"roster": "abc", "voters": "ab", "ready": "c"}, "+c"),
        ("in the order in which they joined", {"roster": "abcde", "voters": "abc", "ready": "ed"}, "+d"),
        ("enough is enough", {"roster": "abcdefghij", "voters": "abcdefg", "ready": "hij"}, ""),
        (
            "a silent one is replaced: first one joins",
            {"roster": "abcd", "voters": "abc", "ready": "d", "silent": "b"},
            "+d",
        ),
        ("then it goes", {"roster": "abcd", "voters": "abcd", "silent": "b"}, "-b"),
        ("nobody can replace it: it stays", {"roster": "abcde", "voters": "abcde", "silent": "b"}, ""),
        (
            "two of five silent: one more may die without them",
            {"roster": "abcde", "voters": "abcde", "silent": "be"},
            "-b",
        ),
        ("and the other", {"roster": "abcde", "voters": "acde", "silent": "e"}, "-e"),
        ("three are left whatever dies", {"roster": "abc", "voters": "abc", "silent": "bc"}, ""),
        ("a silent one of two stays", {"roster": "abc", "voters": "ab", "silent": "b"}, ""),
        ("back again, both", {"roster": "abcde", "voters": "acd", "ready": "be"}, "+b"),
        ("back again, one", {"roster": "abcde", "voters": "acd", "ready": "b"}, ""),
        (
            "the leader is not silent, whatever it counts",
            {"roster": "abcd", "voters": "abc", "ready": "d", "silent": "a"},
            "",
        ),
        ("who leaves is replaced", {"roster": "abcd", "voters": "abc", "ready": "d", "leaving": "b"}, "+d"),
        ("and goes", {"roster": "abcd", "voters": "abcd", "leaving": "b"}, "-b"),
        ("three to two nodes: it goes", {"roster": "abc", "voters": "abc", "leaving": "b"}, "-b"),
        ("and one voter is left, the leader", {"roster": "ab", "voters": "ab"}, "-b"),
        ("the leader leaves: the other first", {"roster": "ab", "voters": "a", "ready": "b", "leaving": "a"}, "+b"),
        ("the last voter stays", {"roster": "ab", "voters": "a", "leaving": "a"}, ""),
        ("not while the rest could not commit it", {"roster": "abc", "voters": "abc", "leaving": "b", "away": "c"}, ""),
        ("but without the silent one", {"roster": "abc", "voters": "abc", "leaving": "b", "silent": "c"}, "-c"),
        (
            "nobody joins that the rest could not commit",
            {"roster": "abcd", "voters": "abc", "ready": "d", "silent": "bc"},
            "",
        ),
        ("then the leader", {"roster": "ab", "voters": "ab", "leaving": "a"}, "-a"),
        ("of several that leave the leader is last", {"roster": "abcde", "voters": "abcde", "leaving": "ab"}, "-b"),
        ("who leaves does not join", {"roster": "abc", "voters": "a", "ready": "bc", "leaving": "c"}, ""),
        ("a voter that is not in the roster goes", {"roster": "abc", "voters": "abcx"}, "-x"),
        ("too many: the silent first", {"roster": "abcd", "voters": "abcd", "silent": "c"}, "-c"),
        ("too many: the youngest", {"roster": "abcd", "voters": "abcd"}, "-d"),
        ("too many: never the leader", {"roster": "abcd", "voters": "abcd", "leader": "d"}, "-c"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_rule(why: str, state: dict[str, str], expected: str) -> None:
    assert step(**state) == expected


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_it_comes_to_rest_and_never_gives_up_a_majority_of_the_living_on_the_way(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 10))
    roster = ALL[:size]
    count = data.draw(st.integers(1, min(8, size)))
    voters = set(data.draw(st.permutations(roster))[:count])
    leader = data.draw(st.sampled_from(sorted(voters)))
    down = set(data.draw(st.sets(st.sampled_from(roster)))) - {leader}
    leaving = set(data.draw(st.sets(st.sampled_from(roster), max_size=1))) - ({leader} if size == 1 else set())
    alive = voters - down
    if len(alive) <= len(voters) // 2:
        return  # nothing can be changed without a majority
    began = len(voters)
    for _ in range(30):
        ready = [node for node in roster if node not in voters and node not in down]
        gone = voters & down
        change = next_change(roster, voters, leader, ready=ready, silent=gone, away=gone, leaving=leaving)
        if change is None:
            break
        assert isinstance(change, Change)
        voters ^= {change.node}
        assert len(voters - down) > len(voters) // 2, "the step itself can be committed"
        if not leaving and len(roster) >= 3:
            assert len(voters) >= min(3, began)
    else:
        raise AssertionError("it never comes to rest")
    staying = [node for node in roster if node not in leaving]
    if not down:
        assert not voters & leaving
        assert len(voters) == voters_of(len(staying))

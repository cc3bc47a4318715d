# What the leader knows of copies: each node's own word, of this term.
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idunno.base.errors import InvalidArgument, StaleTerm
from idunno.base.ids import BlockId, NodeId, Term
from idunno.sdfs.locator import INVENTORY_BLOCKS_MAX, Locator
from idunno.sdfs.messages import Inventory

A, B = NodeId("a" * 16), NodeId("b" * 16)
X, Y, Z = (BlockId(c * 64) for c in "def")


def test_a_new_leader_recovers_until_every_present_node_has_reported_to_the_end() -> None:
    locator = Locator(Term(3))
    assert locator.recovering([A, B])
    locator.report(Inventory(A, Term(3), [X], first=True, last=True))
    locator.report(Inventory(B, Term(3), [X], first=True))
    assert locator.recovering([A, B])
    assert locator.holders(X) == [A, B]  # what is known so far is used
    locator.report(Inventory(B, Term(3), [Y], last=True))
    assert not locator.recovering([A, B])
    assert (locator.holders(X), locator.holders(Y), locator.holders(Z)) == ([A, B], [B], [])


def test_reports_of_another_term_are_refused() -> None:
    locator = Locator(Term(3))
    for term in (2, 4):
        with pytest.raises(StaleTerm):
            locator.report(Inventory(A, Term(term), [X], first=True, last=True))
    assert locator.holders(X) == []


def test_an_oversized_report_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        Locator(Term(1)).report(Inventory(A, Term(1), [X] * (INVENTORY_BLOCKS_MAX + 1)))


def test_a_full_report_replaces_what_was_known_but_not_what_came_meanwhile() -> None:
    locator = Locator(Term(1))
    locator.report(Inventory(A, Term(1), [X], first=True, last=True))
    locator.report(Inventory(A, Term(1), [], first=True))
    locator.stored(Y, [A])  # committed between two pages
    locator.report(Inventory(A, Term(1), [Z], last=True))
    assert (locator.holders(X), locator.holders(Y), locator.holders(Z)) == ([], [A], [A])


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.sampled_from([X, Y, Z]), st.booleans()), max_size=30))
def test_the_last_word_of_a_node_counts(changes: list[tuple[NodeId, BlockId, bool]]) -> None:
    locator, last = Locator(Term(1)), dict[tuple[NodeId, BlockId], bool]()
    for node in (A, B):
        locator.report(Inventory(node, Term(1), [], first=True, last=True))
    for node, block, held in changes:
        locator.report(Inventory(node, Term(1), [block] if held else [], [] if held else [block]))
        last[node, block] = held
    for block in (X, Y, Z):
        assert locator.holders(block) == [node for node in (A, B) if last.get((node, block))]


def test_a_commits_word_lapses_unless_the_node_says_the_same() -> None:
    locator = Locator(Term(1))
    for node in (A, B):
        locator.report(Inventory(node, Term(1), [], first=True, last=True))
    locator.stored(X, [A, B])
    assert list(locator.report(Inventory(A, Term(1), []))) == []  # it may have been under way
    assert locator.holders(X) == [A, B]
    locator.report(Inventory(B, Term(1), [X]))
    assert X in locator.report(Inventory(A, Term(1), []))
    locator.report(Inventory(B, Term(1), []))
    assert locator.holders(X) == [B]


def test_a_commit_that_comes_after_the_node_dropped_the_block_is_not_believed_for_long() -> None:
    locator = Locator(Term(1))
    locator.report(Inventory(A, Term(1), [X], first=True, last=True))
    locator.report(Inventory(A, Term(1), [], [X]))
    locator.stored(X, [A])
    locator.report(Inventory(A, Term(1), []))
    locator.report(Inventory(A, Term(1), []))
    assert locator.holders(X) == []


def test_who_was_away_counts_again_after_a_full_report() -> None:
    locator = Locator(Term(1))
    locator.report(Inventory(A, Term(1), [X, Y], first=True, last=True))
    assert sorted(locator.doubt(A)) == sorted([X, Y])
    assert locator.recovering([A])
    assert locator.holders(X) == [A]  # remembered: it may come back with it
    with pytest.raises(StaleTerm, match="report anew"):
        locator.report(Inventory(A, Term(1), [Z]))
    assert set(locator.report(Inventory(A, Term(1), [Y], first=True, last=True))) == {X, Y}
    assert not locator.recovering([A])
    assert (locator.holders(X), locator.holders(Y)) == ([], [A])


def test_the_end_of_a_full_report_names_all_only_when_something_is_gone() -> None:
    locator = Locator(Term(1))
    for _ in range(2):  # by a node that nobody knew, and by one of which everything is known
        assert locator.report(Inventory(A, Term(1), [X], first=True)) == [X]
        assert locator.report(Inventory(A, Term(1), [Y])) == [Y]
        assert locator.report(Inventory(A, Term(1), [Z], last=True)) == [Z]
    locator.report(Inventory(A, Term(1), [X], first=True))
    assert set(locator.report(Inventory(A, Term(1), [Z], last=True))) == {X, Y, Z}
    assert locator.held_by(A) == [X, Z]


def test_what_commits_say_of_a_node_is_listed_once_and_outlives_its_going_away() -> None:
    locator = Locator(Term(1))
    locator.report(Inventory(A, Term(1), [X], first=True, last=True))
    locator.stored(X, [A])
    locator.stored(Y, [A])
    assert locator.held_by(A) == [X, Y]
    assert locator.doubt(A) == [X, Y]
    assert locator.holders(Y) == [A]

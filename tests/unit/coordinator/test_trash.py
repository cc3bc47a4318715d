"""The trash and what goes into it: deleted files that come back, what expires, what is purged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idunno.base.errors import NotFound
from idunno.coordinator import commands as c
from idunno.coordinator import namespace as ns
from idunno.coordinator import trash
from idunno.coordinator.effects import BlocksFreed
from idunno.coordinator.machine import Machine
from tests.unit.coordinator.test_namespace import small
from tests.unit.coordinator.world import ADMIN, ALICE, BOB, World, block


def test_what_was_deleted_comes_back_with_its_numbers_and_a_retry_finds_it() -> None:
    world = World()
    world.put("a", "1", put="p1")
    world.put("a", "2", put="p2")
    world.do(c.DeleteFile("a"), request="r1")
    assert world.put("a", "3") == 3
    assert world.do(c.RestoreTrash("a"), request="r2").versions == 2
    assert [v.version for v in world.machine.namespace.history("a")] == [1, 2, 3]
    assert world.do(c.BeginPut("p1", "a")).committed.blocks == (block("1"),)
    assert world.do(c.RestoreTrash("a"), request="r2").versions == 0  # the same request again
    with pytest.raises(NotFound, match="the trash holds nothing of 'a'"):
        world.do(c.RestoreTrash("a"), request="r3")
    assert world.machine.namespace.trash.versions == 0


def test_a_put_that_came_again_after_it_was_forgotten_counts_when_its_first_version_comes_back() -> None:
    world = World()
    world.do(c.RaiseVersion(2), ADMIN)
    for request, put in (("r1", "p1"), ("r2", "p2")):  # in this version the second tombstone knows p1 no more
        world.do(small(put, "a"))
        world.do(c.DeleteFile("a"), request=request)
    again = world.do(small("p1", "a"))
    assert again.version == 3
    assert world.do(c.RestoreTrash("a"), request="r3").versions == 2
    assert [(v.version, v.request) for v in world.machine.namespace.history("a")] == [(1, ""), (2, "p2"), (3, "p1")]
    for number in range(ns.PUTS_REMEMBERED - 2):
        world.do(small(f"q{number}", "a"))
    world.do(c.DeleteFile("a"), request="r4")  # forgets the puts of all versions but the last eight
    assert Machine.restore(world.machine.snapshot()).namespace.made("p1") == ("a", 3)
    assert world.do(small("p1", "a")) == again


def test_the_puts_that_deletions_know_are_bounded_and_one_that_was_forgotten_counts_once() -> None:
    world = World.newest()
    world.do(small("p1", "a"))
    world.do(c.DeleteFile("a"), request="r1")
    for number in range(ns.PUTS_BURIED):
        world.do(small(f"q{number}", "a"))
    world.do(c.DeleteFile("a"), request="r2")
    namespace = world.machine.namespace
    assert (namespace.made("p1"), namespace.made("q0")) == (None, ("a", 2))
    again = world.do(small("p1", "a"))
    world.do(c.RestoreTrash("a"), request="r3")
    assert [v.version for v in namespace.history("a") if v.request == "p1"] == [again.version]
    assert world.do(small("p1", "a")) == again
    assert len(namespace.history("a")) == ns.PUTS_BURIED + 2


def test_what_is_purged_is_gone_and_frees_only_what_nothing_else_refers_to() -> None:
    world = World()
    world.put("a", "shared")
    world.put("a", "own")
    world.put("b", "shared")
    assert world.apply(c.DeleteFile("a"), request="r1").effects[1:] == ()  # its blocks are in the trash
    applied = world.apply(c.Purge((1, 7)))
    assert applied.result.versions == 2  # type: ignore[union-attr]
    assert applied.effects == (BlocksFreed((block("own").block,)),)
    assert world.do(c.Purge((1,))).changed is False
    assert world.machine.references.count(block("shared").block) == 1


def test_the_systems_own_names_have_no_trash() -> None:
    world = World()
    world.put(".idunno/jobs/j/input", "x")
    applied = world.apply(c.DeleteFile(".idunno/jobs/j/input"), request="r1")
    assert applied.effects[1:] == (BlocksFreed((block("x").block,)),)
    assert world.machine.namespace.trash.versions == 0


def test_the_trash_is_bounded_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trash, "TRASH_VERSIONS_MAX", 2)
    world = World()
    for name in ("a", "b", "c"):
        world.put(name, name)
        applied = world.apply(c.DeleteFile(name), request=f"r-{name}")
    assert applied.effects[1:] == (BlocksFreed((block("a").block,)),)
    assert [entry.name for entry in world.machine.namespace.trash.entries.values()] == ["b", "c"]


@pytest.mark.parametrize(
    ("versions", "age_ms", "gone"),
    [(2, 0, (1, 2, 3)), (9, 0, ()), (1, 0, (1, 2, 3, 4)), (0, 1_500, (1, 2, 3)), (0, 9_000, ()), (2, 2_500, (1, 2))],
)
def test_what_is_beyond_every_limit_expires_but_never_the_current_version(
    versions: int, age_ms: int, gone: tuple[int, ...]
) -> None:
    world = World()
    for i in range(1, 6):
        world.now_ms = i * 1_000
        world.put("a", str(i))
    world.do(c.SetRetention("a", versions, age_ms))
    rule = world.machine.namespace.retention.rule_for("a", "alice")
    assert rule is not None
    assert trash.expired(world.machine.namespace.history("a"), rule, 6_000, 1_000) == gone
    assert trash.expired(world.machine.namespace.history("a"), rule, 6_000, 1) == gone[:1]


def test_the_longest_prefix_and_then_ones_own_rule_decides() -> None:
    world = World()
    for prefix, count, actor in (("", 9, ADMIN), ("logs/", 5, ADMIN), ("logs/", 3, ALICE), ("logs/x", 1, BOB)):
        world.do(c.SetRetention(prefix, count), actor)
    rule_for = world.machine.namespace.retention.rule_for
    kept = [(name, owner, rule_for(name, owner)) for name in ("a", "logs/x") for owner in ("alice", "bob", "carol")]
    assert [rule.versions for _, _, rule in kept if rule] == [9, 9, 9, 3, 1, 5]
    assert world.do(c.SetRetention("", 0, 0), ADMIN).changed
    assert rule_for("a", "bob") is None


@given(
    st.sets(st.tuples(st.text("ab", max_size=3), st.sampled_from(["", "alice", "bob"])), max_size=8),
    st.text("ab", max_size=4),
    st.sampled_from(["alice", "carol"]),
)
def test_the_rule_found_by_its_length_is_the_best_of_all(rules: set[tuple[str, str]], name: str, owner: str) -> None:
    retention = trash.Retention()
    for prefix, whose in sorted(rules):
        retention.set(trash.RetentionRule(prefix, whose, 1), 2)
    meant = [rule for rule in retention.rules() if name.startswith(rule.prefix) and rule.owner in ("", owner)]
    best = max(meant, key=lambda rule: (len(rule.prefix), rule.owner != ""), default=None)
    assert retention.rule_for(name, owner) == best == trash.Retention(retention.rules()).rule_for(name, owner)
    roots = retention.roots()
    assert all(not one.startswith(other) for one in roots for other in roots if one is not other)
    assert all(any(rule.prefix.startswith(root) for root in roots) for rule in retention.rules())


def test_a_rule_is_looked_up_twice_for_each_length_of_a_prefix_not_compared_with_all() -> None:
    looks = 0

    class Watched(dict[tuple[str, str], trash.RetentionRule]):
        def get(self, *args: Any) -> Any:
            nonlocal looks
            looks += 1
            return super().get(*args)

        def values(self) -> Any:
            raise AssertionError("all rules were walked over")

    rules = tuple(trash.RetentionRule("logs/", f"u{number}", 1) for number in range(1_000))
    retention = trash.Retention((*rules, trash.RetentionRule("l", "", 1)))
    retention._rules = Watched(retention._rules)
    assert retention.rule_for("logs/x", "alice") == trash.RetentionRule("l", "", 1)
    assert looks == 4

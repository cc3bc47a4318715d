# Placement: distinct, stable, by free space, over zones; and it says whom it leaves out.
from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.disk import Space
from idunno.base.errors import Exhausted
from idunno.base.ids import NodeId
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.placement import Candidate, place, rank

GB = 10**9
CONFIG = SdfsConfig()


def node(i: int, *, free: int | None = 100, zone: str = "", presence: str = "present") -> Candidate:
    space = None if free is None else Space(free * GB, 1000 * GB if free > 50 else 100 * GB)
    return Candidate(NodeId(f"{i:016x}"), f"n{i}", zone, presence, space)


nodes = st.lists(
    st.builds(lambda free, zone: (free, zone), st.integers(60, 1000) | st.none(), st.sampled_from(["", "a", "b", "c"])),
    min_size=1,
    max_size=12,
).map(lambda given_: [node(i, free=free, zone=zone) for i, (free, zone) in enumerate(given_)])
keys = st.text(min_size=1, max_size=20)


@settings(deadline=None)
@given(nodes, keys)
def test_replicas_are_distinct_as_many_as_there_can_be_and_the_same_each_time(among: list[Candidate], key: str) -> None:
    placed = place(key, among, config=CONFIG)
    everybody = [*placed.replicas, *placed.spares]
    assert len(placed.replicas) == min(4, len(among))
    assert len({c.node for c in everybody}) == len(everybody) == min(12, len(among))
    assert place(key, list(reversed(among)), config=CONFIG) == placed


@settings(deadline=None)
@given(nodes, keys)
def test_zones_are_used_before_any_is_used_twice(among: list[Candidate], key: str) -> None:
    zones = {c.zone for c in among}
    replicas = place(key, among, config=CONFIG).replicas
    assert len({c.zone for c in replicas}) == min(len(zones), 4, len(among))


@settings(deadline=None)
@given(nodes, keys, st.integers(0, 11))
def test_the_entry_node_comes_first(among: list[Candidate], key: str, which: int) -> None:
    entry = among[which % len(among)].node
    assert place(key, among, config=CONFIG, entry=entry).replicas[0].node == entry
    assert place(key, among, config=CONFIG, entry=NodeId("elsewhere")) == place(key, among, config=CONFIG)


@settings(deadline=None)
@given(st.integers(5, 12), keys, st.integers(0, 11))
def test_a_node_that_goes_moves_only_what_it_held(count: int, key: str, which: int) -> None:
    among = [node(i) for i in range(count)]
    gone = among[which % count]
    before = [c.node for c in rank(key, among)]
    after = [c.node for c in rank(key, [c for c in among if c != gone])]
    assert after == [n for n in before if n != gone.node]


def test_nodes_win_in_proportion_to_their_free_space() -> None:
    among = [node(i, free=free) for i, free in enumerate([100, 200, 300, 400])]
    wins = Counter(rank(f"key {i}", among)[0].name for i in range(20_000))
    for candidate in among:
        assert candidate.space is not None
        assert wins[candidate.name] / 20_000 == pytest.approx(candidate.space.free_bytes / (1000 * GB), abs=0.015)


def test_who_is_away_or_full_is_left_out_with_the_reason() -> None:
    among = [
        node(1),
        node(2, presence="failed"),
        node(3, presence="stopped"),
        node(4, free=4),  # of 100 GB: 5 % are kept free
        node(5, free=None),
    ]
    placed = place("key", among, config=CONFIG)
    assert {c.name for c in placed.replicas} == {"n1", "n5"}
    assert (placed.left_out["n2"], placed.left_out["n3"]) == ("failed", "stopped")
    assert "4,000,000,000 bytes free" in placed.left_out["n4"]
    assert "5,000,000,000 are kept free" in placed.left_out["n4"]


def test_a_file_that_would_cross_the_floor_goes_elsewhere() -> None:
    assert len(place("key", [node(1), node(2, free=40)], config=CONFIG, size=36 * GB).replicas) == 1
    with pytest.raises(Exhausted, match=r"no node can take.*n2: 40,000,000,000 bytes free"):
        place("key", [node(2, free=40)], config=CONFIG, size=36 * GB)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3))
def test_an_unreported_node_counts_like_the_mean(seed: int) -> None:
    among = [node(i, free=100 if i else None) for i in range(4)]
    wins = Counter(rank(f"{seed} {i}", among)[0].name for i in range(4000))
    assert 0.2 < wins["n0"] / 4000 < 0.3

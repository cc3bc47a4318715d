# Worlds of short reigns: what users hear is linearizable, and an old term's entry that is committed by counting is seen.
from __future__ import annotations

import pytest

from tests.unit.consensus.registers import SIZES
from tests.unit.consensus.reigns import short_reigns
from tests.unit.consensus.test_world import CommitsOldTerms

WORLDS_MAX = 20
"""Every second sees it, with three and with five nodes."""


@pytest.mark.parametrize("nodes", SIZES)
def test_what_users_hear_is_linearizable_though_no_leader_lasts(nodes: int) -> None:
    world = short_reigns(nodes, nodes)
    assert world.dose["answered"] > 0.8 * 400, world.dose
    assert world.dose["undecided"] == 0
    assert world.dose["short reigns"] > 10, world.dose


def sees(seed: int, nodes: int) -> bool:
    try:
        short_reigns(seed, nodes, maker=CommitsOldTerms)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("nodes", [3, 5])
def test_an_old_terms_entry_committed_by_counting_is_seen_by_chance(nodes: int) -> None:
    seed = next(seed for seed in range(WORLDS_MAX) if sees(seed, nodes))
    short_reigns(seed, nodes)  # the same without the mistake


def test_a_run_is_its_seed() -> None:
    first, second = short_reigns(7, 5), short_reigns(7, 5)
    assert first.sent == second.sent
    assert first.chosen == second.chosen

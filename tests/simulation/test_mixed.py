# Worlds in which everything goes wrong, one after another and at once. What must hold is in checkers.py and clients.py.
from __future__ import annotations

import os
import secrets

import pytest

from tests.simulation.checkers import COUNTED
from tests.simulation.command import SECONDS, one
from tests.simulation.dose import Dose
from tests.simulation.faults import KINDS

FIXED = range(1, 121)
FRESH = 20
NODES = 5

_dose = Dose()


def _world(seed: str) -> None:
    report = one(seed, NODES, SECONDS, None, watch=False)
    _dose.add(report.dose)


@pytest.mark.parametrize("seed", FIXED)
def test_a_fixed_seed(seed: int) -> None:
    _world(str(seed))


def test_every_kind_of_fault_struck_at_every_stage() -> None:
    """Over the fixed seeds, each at least 5 times. Does nothing when only some of them were run."""
    if sum(_dose.struck.values()) < 10 * len(FIXED):
        pytest.skip("only part of the fixed seeds was run")
    print("\n".join(_dose.table()))  # noqa: T201
    assert _dose.below(5) == []
    assert all(_dose.happened[what] >= 5 for what in COUNTED), _dose.happened
    assert {kind for kind, _ in _dose.struck} == set(KINDS)


@pytest.mark.parametrize("number", range(FRESH))
def test_a_fresh_seed(number: int) -> None:
    """Other worlds each time; IDUNNO_SEEDS=SEED,... names them instead."""
    named = os.environ.get("IDUNNO_SEEDS")
    seeds = named.split(",") if named else [str(secrets.randbelow(10**9))]
    if number >= len(seeds) and named:
        pytest.skip("not named")
    seed = seeds[number] if named else seeds[0]
    print(f"seed {seed}")  # noqa: T201
    _world(seed)

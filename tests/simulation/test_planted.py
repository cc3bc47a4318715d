# Mistakes in the file store, planted one by one: each is found by the checks that are there for it, in few worlds.
# How many worlds find each is counted by `python -m tests.simulation.planted`: see docs/sdfs.md.
from __future__ import annotations

import pytest

from tests.simulation.planted import MISTAKES, TRIES_MAX, first_that_finds, found_by


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_planted_mistake_is_found_and_nothing_without_it(mistake: str) -> None:
    seed = first_that_finds(mistake)
    assert seed is not None, f"none of {TRIES_MAX} worlds finds it any more"
    assert found_by("", seed, world=mistake) is None

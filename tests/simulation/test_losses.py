# Machines lost with their disks, a few worlds of each kind. `tests/simulation/losses --seeds 1-1000` is the long proof.
from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.losses import losses

WORLDS = [(7, "gone", 2), (7, "wiped", 1), (5, "wiped", 1), (5, "away", 1), (5, "rotten", 3)]

_dose = Counter[str]()


@pytest.mark.parametrize(("nodes", "kind", "seed"), WORLDS)
def test_after_three_losses_at_once_and_a_repair_everything_acknowledged_is_there(
    nodes: int, kind: str, seed: int
) -> None:
    _dose.update(losses(seed, nodes=nodes, kind=kind).dose)


def test_the_losses_hit_something() -> None:
    if not _dose:
        pytest.skip("none of the worlds was run")
    print(_dose)  # noqa: T201
    assert _dose["blocks checked"] > 20
    assert _dose["copy made"] > 10
    assert _dose["blocks rotten"]
    assert _dose["blocks wiped"]

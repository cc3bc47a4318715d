# What a node that nobody hears any more says is to be done.
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from idunno.base.errors import IdunnoError
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.standing import Claim, Run, Witness
from idunno.node.outcast import Outcast

ME, OTHER = NodeId("1" * 16), NodeId("2" * 16)
OLD_LOG = "its log ends before what it acknowledged"


def said(why: str, leader: NodeId | None) -> str:
    errors: list[IdunnoError] = []
    node: Any = SimpleNamespace(
        config=SimpleNamespace(name="n1"), me=ME, driver=SimpleNamespace(leader=leader), fail=errors.append
    )
    Outcast(node).not_heard(why)
    return str(errors[0])


def test_who_is_refused_is_replaced_by_the_cluster_that_goes_on() -> None:
    text = said(OLD_LOG, OTHER)
    assert text.endswith(
        "run `idunno remove n1` on another node while this one is down, then join again with an empty directory"
    )
    assert "idunno recover" not in text
    assert "`boot`" not in text


@pytest.mark.parametrize("leader", [None, ME])
def test_without_a_leader_nothing_is_thrown_away_before_it_is_known_that_others_go_on(leader: NodeId | None) -> None:
    """All disks may come from images of slightly different times: then all are refused, and their logs are all there is."""
    text = said(OLD_LOG, leader)
    recover = text.index("`idunno recover --dir DIR --dir DIR ...` with all nodes' directories")
    assert text.index("remove nothing") < recover < text.index("if they have one, run `idunno remove n1`")


def test_a_boot_number_that_is_too_low_may_be_put_right_on_the_newest_disk() -> None:
    why = Witness().judge(ME, Run(3, 1), Claim(Term(1), Index(1)), 7)
    assert "if this is its newest disk, write 7 into the file `boot` and start again; else run" in said(why, OTHER)

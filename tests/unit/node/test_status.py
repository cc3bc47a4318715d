# What `idunno status` says when not all is well: every state has its words.
from __future__ import annotations

import pytest
from msgspec.structs import replace

from idunno.base.errors import WHEN_LOST
from idunno.base.ids import NodeId
from idunno.coordinator.messages import StatusAnswer
from idunno.coordinator.records import NodeRecord
from idunno.membership.messages import MemberView
from idunno.node.status import LeaderView, Seen, status


def record(i: int, presence: str = "present", *, voter: bool = True) -> NodeRecord:
    return NodeRecord(NodeId(f"{i:016x}"), f"n{i}", f"h:{i}", bytes([i]) * 32, presence=presence, voter=voter)


def view(of: NodeRecord) -> MemberView:
    state = {"present": "active"}.get(of.presence, of.presence)
    return MemberView(of.node, of.name, of.address, state, incarnation=1, boot=1, since_ms=0, reason="")


def seen(*roster: NodeRecord, leader: int | None = 1) -> Seen:
    return Seen(
        cluster="c" * 32,
        me=roster[0].node,
        leader=NodeId(f"{leader:016x}") if leader is not None else None,
        term=7,
        commit=90,
        applied=88,
        roster=roster,
        view={r.node: view(r) for r in roster},
        files=3,
        models={},
        tasks={},
        rates={},
        stopped_applying="",
        leader_view=LeaderView(0, {"n2": 0, "n3": 12}, recovering=False, waiting=0),
        machine_version=2,
    )


def test_all_is_well() -> None:
    answer = status(seen(record(1), record(2), record(3), record(4, voter=False)))
    assert (answer.healthy, answer.why, answer.degraded, answer.problem) == (True, "", "", "")
    assert (answer.scheduler, answer.term, answer.machine_version) == ("n1", 7, 2)
    assert (answer.voters, answer.learners, answer.lag) == (["n1", "n2", "n3"], ["n4"], {"n2": 0, "n3": 12})


def test_rotten_blocks_are_a_warning_and_no_illness() -> None:
    told = LeaderView(0, {}, recovering=False, waiting=0, blocks_rotten={"n3": 2, "n2": 1})
    answer = status(replace(seen(record(1), record(2), record(3)), leader_view=told))
    assert (answer.healthy, answer.blocks_rotten) == (True, {"n2": 1, "n3": 2})
    assert [text.partition(" or unreadable")[0] for text in answer.warnings] == [
        "n2 found 1 block rotten",
        "n3 found 2 blocks rotten",
    ]


def three_of_four() -> Seen:
    return seen(record(1), record(2), record(3), record(4, "failed"))


WAITS = "it has just started, and 1 of 3 voters"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (three_of_four(), "degraded: answers leave with 3 of 4 copies: n4 failed"),
        (three_of_four(), "1 member is failed: n4"),
        (
            seen(record(1), record(2, "failed"), record(3, "failed"), leader=None),
            f"no quorum: 1 of 3 voters are active, 2 are needed; start the others; {WHEN_LOST}",
        ),
        (seen(record(1), record(2), record(3), leader=None), "no scheduler is elected yet"),
        (seen(record(1)), "one voter"),
        (replace(three_of_four(), stopped_applying=WAITS), f"this node takes no part in the consensus: {WAITS}"),
        (replace(three_of_four(), leader_view=LeaderView(0, {}, True, 0)), "recovering: the new scheduler"),
        (replace(three_of_four(), leader_view=LeaderView(5, {}, False, 0)), "5 block copies are missing"),
        (replace(three_of_four(), models={"failed": 1}), "1 model has failed; see `idunno models`"),
    ],
)
def test_what_is_wrong_is_said(what: Seen, words: str) -> None:
    answer: StatusAnswer = status(what)
    assert not answer.healthy
    assert words in answer.why

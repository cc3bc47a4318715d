from __future__ import annotations

import pytest

from idunno.base.ids import NodeId
from idunno.coordinator.commands import Assign, Unassign
from idunno.coordinator.records import ModelRecord, NodeRecord, WorkerRecord
from idunno.scheduler.deploy import changes, eligible, first_workers, workers_wanted

N = [NodeId(f"n{i}") for i in range(8)]


def node(n: int, presence: str = "present") -> NodeRecord:
    return NodeRecord(node=N[n], name=N[n], address="h:1", fingerprint=b"", presence=presence)


def model(
    workers: str, *, state: str = "deployed", wanted: int = 0, workers_min: int = 0, workers_max: int = 0
) -> ModelRecord:
    """`workers`: like "1r 2a 3f", r ready, a assigned, f failed."""
    word = {"r": "ready", "a": "assigned", "f": "failed"}
    rows = tuple(WorkerRecord(N[int(w[0])], word[w[1]], 0, "no memory" if w[1] == "f" else "") for w in workers.split())
    return ModelRecord(
        model="digits",
        version=2,
        owner="ann",
        runtime="onnx",
        files=(),
        workers_wanted=wanted,
        batch_size=0,
        weight=1000,
        workers_min=workers_min,
        workers_max=workers_max,
        state=state,
        created_ms=0,
        request="r",
        workers=rows,
    )


def moves(record: ModelRecord, able: list[int], present: list[int], load: dict[int, int] | None = None) -> str:
    found = changes(
        record, [N[i] for i in able], {N[i] for i in present}, {N[i]: c for i, c in (load or {}).items()}, lambda n: n
    )
    assert all(c.reason and c.version == 2 for c in found)
    return " ".join(("+" if isinstance(c, Assign) else "-") + c.node[1] for c in found)


@pytest.mark.parametrize(
    ("present", "setting", "expected"),
    [
        (5, "auto", "n1 n2 n3 n4"),  # n0 is the scheduler
        (4, "auto", "n1 n2 n3 n0"),
        (1, "auto", "n0"),
        (1, "never", ""),
        (3, "never", "n1 n2"),
        (6, "always", "n1 n2 n3 n4 n5 n0"),
    ],
)
def test_who_may_work(present: int, setting: str, expected: str) -> None:
    nodes = [node(i) for i in range(present)] + [node(6, "failed"), node(7, "stopped")]
    assert " ".join(eligible(nodes, N[0], setting)) == expected


@pytest.mark.parametrize(
    ("wanted", "low", "high", "able", "expected"),
    [(0, 0, 0, 4, 4), (2, 0, 0, 4, 2), (0, 0, 3, 4, 3), (1, 2, 0, 4, 2), (0, 0, 0, 0, 1), (5, 0, 2, 4, 2)],
)
def test_how_many_workers_a_model_gets(wanted: int, low: int, high: int, able: int, expected: int) -> None:
    assert workers_wanted(wanted, low, high, able) == expected


def test_the_first_workers_are_those_that_hold_fewest_models() -> None:
    assert first_workers(2, N[1:4], {N[1]: 2, N[2]: 1}) == (N[3], N[2])


TABLE = [
    # what, record, eligible, present, expected
    ("all ready: nothing", model("1r 2r 3r 4r"), [1, 2, 3, 4], [0, 1, 2, 3, 4], ""),
    ("a node joined: it gets the model too", model("1r 2r 3r"), [1, 2, 3, 4], [0, 1, 2, 3, 4], "+4"),
    ("a node joined, two are enough", model("1r 2r", wanted=2), [1, 2, 3], [0, 1, 2, 3], ""),
    ("one is away, another can replace it", model("1r 2r", wanted=2), [1, 3], [0, 1, 3], "+3 -2"),
    ("one is away, nobody can replace it: it keeps its place", model("1r 2r 3r 4r"), [1, 2, 3], [0, 1, 2, 3], ""),
    ("one is away, and the others are enough", model("1r 2r 3r", workers_max=2), [1, 2], [0, 1, 2], "-3"),
    ("wanted two, one is away, no third", model("1r 2r", wanted=2), [1], [0, 1], ""),
    (
        "one away while deploying: the others make it deployed",
        model("1r 2a", state="undeployed", wanted=2),
        [1],
        [0, 1],
        "-2",
    ),
    ("the only one is away while deploying: wait for it", model("2a", state="undeployed", wanted=1), [], [0], ""),
    ("the only one is away, another is there", model("2a", state="undeployed", wanted=1), [1], [0, 1], "+1 -2"),
    ("nobody has it", model("", wanted=1), [1, 2], [0, 1, 2], "+1"),
    ("one failed: another is chosen", model("1f", state="undeployed", wanted=1), [1, 2], [0, 1, 2], "+2"),
    ("one failed, the others go on", model("1f 2r 3r"), [1, 2, 3], [0, 1, 2, 3], ""),
    ("all failed: the one that failed first tries again", model("1f", state="undeployed"), [1], [0, 1], "+1"),
    ("failed for good: nothing", model("1f 2f 3f", state="failed"), [1, 2, 3, 4], [0, 1, 2, 3, 4], ""),
    ("the scheduler's is dropped when others are ready", model("0r 1r 2r 3r 4r"), [1, 2, 3, 4], [0, 1, 2, 3, 4], "-0"),
    ("the scheduler's is kept until another is ready", model("0r", wanted=1), [1], [0, 1], "+1"),
    ("and while that one loads", model("0r 1a", wanted=1), [1], [0, 1], ""),
    ("and then goes", model("0r 1r", wanted=1), [1], [0, 1], "-0"),
    ("at its maximum", model("1r 2r", workers_max=2), [1, 2, 3], [0, 1, 2, 3], ""),
    ("no eligible node at all", model(""), [], [0], ""),
]


@pytest.mark.parametrize(("what", "record", "able", "present", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_what_is_changed(what: str, record: ModelRecord, able: list[int], present: list[int], expected: str) -> None:
    assert moves(record, able, present) == expected


def test_applying_the_changes_settles(  # no to and fro: once applied, nothing more is to be changed
) -> None:
    for _, record, able, present, _ in TABLE:
        rows = {w.node: w for w in record.workers}
        for _ in range(4):
            found = changes(record, [N[i] for i in able], {N[i] for i in present}, {}, lambda n: n)
            for command in found:
                if isinstance(command, Unassign):
                    del rows[command.node]
                else:
                    rows[command.node] = WorkerRecord(command.node, "ready", 1)
            fields = {f: getattr(record, f) for f in record.__struct_fields__} | {"workers": tuple(rows.values())}
            record = ModelRecord(**fields)
        assert not found

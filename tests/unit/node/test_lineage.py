# What a node of an old identity believes, and when it ends because of it.
from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from idunno.base.errors import Incompatible
from idunno.base.ids import NodeId
from idunno.coordinator.messages import Succession
from idunno.node.lineage import Lineage, signed
from idunno.node.node import Node
from idunno.wire.security import make_ca

CA, KEY = make_ca()
OLD, NEW = "a" * 32, "b" * 32
PEER = NodeId("1" * 16)


def a_node(leader: str | None) -> tuple[Lineage, list[Exception]]:
    failed: list[Exception] = []
    node = SimpleNamespace(
        platform=SimpleNamespace(
            identity=SimpleNamespace(cluster=OLD), secrets=SimpleNamespace(ca_pem=CA), anonymous_tls=None
        ),
        driver=SimpleNamespace(leader=leader),
        fail=failed.append,
    )
    return Lineage(cast(Node, cast(Any, node))), failed


def proof(key: bytes | None = KEY, *, of: str = OLD) -> Succession:
    return signed(Succession(of, NEW, bytes(32), 812, 7, 1_764_000_000_000), key)


def test_without_a_leader_a_proof_ends_it_with_the_next_step() -> None:
    lineage, failed = a_node(None)
    lineage._hear(PEER, "10.0.0.4:7400", NEW, (proof(),))
    (error,) = failed
    assert isinstance(error, Incompatible)
    assert error.code == "incompatible"
    assert "cluster aaaaaaaa was recovered as bbbbbbbb at 2025-11-24T16:00:00.000Z, entry 812" in str(error)
    assert "`idunno join 10.0.0.4:7400 --adopt --token TOKEN --dir DIR`" in str(error)


@pytest.mark.parametrize("how", ["of another cluster", "by another key", "not signed", "changed", "none"])
def test_what_is_not_proved_is_not_believed(how: str) -> None:
    told = {
        "of another cluster": (proof(of="c" * 32),),
        "by another key": (proof(make_ca()[1]),),
        "not signed": (proof(None),),
        "changed": (msgspec.structs.replace(proof(), index=9),),
        "none": (),
    }[how]
    lineage, failed = a_node(None)
    lineage._hear(PEER, "10.0.0.4:7400", NEW, told)
    assert failed == []


def test_a_majority_that_works_is_not_stopped_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    lineage, failed = a_node("n1")
    for _ in range(3):
        lineage._hear(PEER, "10.0.0.4:7400", NEW, (proof(),))
    assert failed == []
    assert [record.message for record in caplog.records] == ["this cluster was recovered as another one while it works"]


def test_nobody_is_asked_where_there_is_no_way_to_ask() -> None:
    async def story() -> None:
        lineage, failed = a_node(None)
        lineage.refused(PEER)
        assert failed == []

    asyncio.run(story())

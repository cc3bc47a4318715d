# `idunno up` that was killed while it made the cluster: called again, it makes a whole one.
from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idunno.node import lifecycle, local
from idunno.node.identity import BOOT_FILE, Identity, load_identity, write_identity


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """`idunno up --nodes 3` without the processes."""

    async def ready(nodes: list[Path], processes: object) -> tuple[list[object], str, str]:
        await asyncio.sleep(0)
        return [], nodes[0].name, load_identity(nodes[0]).cluster

    monkeypatch.setattr(local, "_spawn", lambda node: None)
    monkeypatch.setattr(local, "_until_ready", ready)
    monkeypatch.setattr(local, "_check_port", lambda config: None)
    return lambda: local.up(tmp_path / "cluster", 3, 7400)


def killed_at(what: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 at the identity number `what` from 0."""
    written = 0

    def write(directory: Path, identity: Identity) -> None:
        nonlocal written
        if written == what:
            raise Killed
        written += 1
        write_identity(directory, identity)

    monkeypatch.setattr(lifecycle, "write_identity", write)


@pytest.mark.parametrize("identities", [0, 1, 2])
def test_a_cluster_that_was_half_made_is_made_again(
    identities: int, up: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_at(identities, patch)
        with pytest.raises(Killed):
            up()
    assert up()["started"] == 3
    nodes = local.existing_nodes(tmp_path / "cluster")
    assert [node.name for node in nodes] == ["n1", "n2", "n3"]
    assert len({load_identity(node).cluster for node in nodes}) == 1
    assert (tmp_path / "cluster" / local.CLUSTER_FILE).exists()
    assert not (tmp_path / "cluster" / local.UNFINISHED_FILE).exists()


def test_a_node_that_has_run_is_never_removed(up: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    made = up()["cluster"]
    (tmp_path / "cluster" / local.UNFINISHED_FILE).touch()
    (tmp_path / "cluster" / "n2" / BOOT_FILE).write_text("1")
    assert up()["cluster"] == made

# The filesystem over a cluster of fake nodes in this process: real calls and streams, a dict behind them.
from __future__ import annotations

from collections.abc import Iterator

import pytest

from idunno.client.api import Cluster
from idunno.fs import IdunnoFileSystem, connection
from tests.unit.client.fake import FakeCluster


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    cluster = FakeCluster()

    async def opener(where: str | None, *, timeout_s: float | None = None) -> Cluster:
        return await cluster.connect(timeout_s)

    monkeypatch.setattr(connection, "opener", opener)
    yield cluster
    connection.close_all()


@pytest.fixture
def fs(fake: FakeCluster) -> IdunnoFileSystem:
    return IdunnoFileSystem("/fake")

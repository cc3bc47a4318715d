from __future__ import annotations

import pytest

from tests.unit.cli.support import Terminal
from tests.unit.client.fake import FakeCluster


@pytest.fixture
def idunno(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(FakeCluster(), monkeypatch, capfd)

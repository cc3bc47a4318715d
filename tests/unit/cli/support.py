# tests/unit/cli/support.py: the command line against fake nodes.
from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from idunno.cli import running
from idunno.cli.root import cli
from idunno.client.api import Cluster
from tests.unit.client.fake import FakeCluster


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of the failure."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


class Terminal:
    """`idunno ARGUMENTS` in this process, on `fake`."""

    def __init__(self, fake: FakeCluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.fake, self._monkeypatch, self._capfd = fake, monkeypatch, capfd
        self.asked: list[tuple[str | None, float | None]] = []

        async def connect(where: str | None, timeout_s: float | None) -> Cluster:
            self.asked.append((where, timeout_s))
            return await fake.connect(timeout_s)

        monkeypatch.setattr(running, "connect", connect)
        monkeypatch.setattr(running, "in_shell", False)

    def __call__(self, *arguments: str, stdin: str | None = None) -> Outcome:
        if stdin is not None:
            self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capfd.readouterr()
        status = running.run(list(arguments), cli)
        out, err = self._capfd.readouterr()
        return Outcome(status, out, err)

    def ok(self, *arguments: str) -> Outcome:
        outcome = self(*arguments)
        assert outcome.status == 0, outcome.err
        return outcome


def keys(value: Any) -> Sequence[str]:
    return list(value)

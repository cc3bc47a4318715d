# The progress bar of a transfer: how much, how fast, how long still; and none where nobody looks.
from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from idunno.cli import render


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_transfer_shows_bytes_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.progress

    now_s, made = 0.0, rich.progress.Progress.__init__

    def with_our_clock(self: Any, *columns: Any, **more: Any) -> None:
        clock: Callable[[], float] = lambda: now_s  # noqa: E731
        made(self, *columns, get_time=clock, auto_refresh=False, **more)

    monkeypatch.setattr(rich.progress.Progress, "__init__", with_our_clock)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with render.bar("weights", in_bytes=True) as update:
        assert update is not None
        for second in range(1, 4):
            now_s = float(second)
            update(second * 10_000_000, 90_000_000)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "weights" in shown
    assert "30.0/90.0 MB" in shown
    assert "10.0 MB/s" in shown
    assert "0:00:06" in shown  # 60 MB are left


def test_without_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    with render.bar("weights", in_bytes=True) as update:
        assert update is None
    assert screen.getvalue() == ""

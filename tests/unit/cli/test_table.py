# Tables: what a person has to read and copy is whole, whatever the width.
from __future__ import annotations

import io
import re
import sys

import pytest

from idunno.cli import render

JOB = "3f0c2a9e41d84a05b6c1de9f0a7b2c3d"
MOMENT = "2026-11-30T20:13:20.435Z"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, width: int, columns: list[str], rows: list[list[object]]) -> list[str]:
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    render.table(columns, rows)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()


def test_members_fit_a_terminal_of_80_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ["name", "id", "address", "state", "role", "version", "slots"]
    lines = shown(
        monkeypatch, 80, columns, [["n1", "ba903e11deb507bd", "127.0.0.1:17400", "active", "scheduler", "0.1.0", 1]]
    )
    assert max(map(len, lines)) <= 80
    assert any("ba903e11deb507bd  127.0.0.1:17400  active  scheduler" in line for line in lines)


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_ids_are_never_folded(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row: list[object] = [JOB, "root@local", "success", 1797, MOMENT, "its input could not be read: it is no array"]
    lines = shown(monkeypatch, width, ["job", "client", "state", "queries", "submitted", "reason"], [row])
    assert any(JOB in line and MOMENT in line for line in lines)


def test_a_reason_is_folded_where_all_else_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 60, ["job", "reason"], [[JOB, "its input could not be read: it is no array at all"]])
    assert max(map(len, lines)) <= 60
    assert sum(JOB in line for line in lines) == 1


def test_one_long_name_does_not_push_the_others_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 80, ["name", "size"], [["short", 7], ["x" * 512, 8]])
    short = next(line for line in lines if "short" in line)
    assert len(short) <= 80
    assert "x" * 512 in "".join(lines)

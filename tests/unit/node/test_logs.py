from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from idunno.node.logs import LINE_BYTES_MAX, JsonFormatter, start_logging


def format_one(text: str, **extra: object) -> dict[str, object]:
    logger = logging.getLogger("idunno.sdfs")
    record = logger.makeRecord("idunno.sdfs", logging.WARNING, "f", 1, text, (), None, extra=extra)
    line = JsonFormatter("n1").format(record)
    assert "\n" not in line
    found: dict[str, object] = json.loads(line)
    return found


def test_a_line_is_a_fixed_phrase_and_named_fields() -> None:
    line = format_one("replica refused block", block="ab", copies=3)
    assert line["text"] == "replica refused block"
    assert (line["level"], line["node"], line["part"], line["block"], line["copies"]) == (
        "warning",
        "n1",
        "sdfs",
        "ab",
        3,
    )
    assert str(line["time"]).endswith("Z")
    assert len(str(line["time"])) == len("2026-01-01T00:00:00.000Z")


def test_a_line_cannot_be_forged_or_grow_without_bound() -> None:
    assert format_one("x", name_given='a\n{"text": "forged"}')["name_given"] == 'a\n{"text": "forged"}'
    logger = logging.getLogger("idunno.sdfs")
    record = logger.makeRecord("idunno.sdfs", logging.INFO, "f", 1, "x", (), None, extra={"huge": "y" * 10**6})
    assert len(JsonFormatter("n1").format(record)) <= LINE_BYTES_MAX


def test_a_log_that_cannot_be_written_costs_lines_not_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.getLogger().handlers[:]
    handler = start_logging(str(tmp_path / "node.jsonl"), "n1")
    try:
        logging.getLogger("idunno.x").info("fine")

        def full(_: str) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(handler.stream, "write", full)
        logging.getLogger("idunno.x").info("lost")
        assert handler.lost == 1
    finally:
        logging.basicConfig(handlers=before or [logging.NullHandler()], force=True)
        logging.captureWarnings(False)
    assert json.loads((tmp_path / "node.jsonl").read_text().splitlines()[0])["text"] == "fine"

# tests/cluster/answers.py: what a job over the digits must have answered, whatever died meanwhile.
from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.cluster.harness import DIGITS

IMAGES = 1797


def labels() -> dict[str, int]:
    with open(DIGITS / "labels.csv", newline="", encoding="utf-8") as file:
        return {row["query"]: int(row["label"]) for row in csv.DictReader(file)}


def check_digits(path: Path) -> None:
    """Every image answered exactly once, in input order, and nearly all of them rightly."""
    truth = labels()
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [answer["query"] for answer in answers] == list(truth)
    right = sum(answer["output"]["label"] == truth[answer["query"]] for answer in answers)
    assert right / IMAGES > 0.95

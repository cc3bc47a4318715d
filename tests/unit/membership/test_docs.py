# tests/unit/membership/test_docs.py: the page's state diagram is the code's table.
from __future__ import annotations

from pathlib import Path

from idunno.membership.messages import State
from idunno.membership.states import LIFE, TRANSITIONS, diagram

PAGE = Path(__file__).parents[3] / "docs" / "membership.md"


def test_the_diagram_in_the_docs_is_the_codes_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in PAGE.read_text(encoding="utf-8"), "put states.diagram() into the page"


def test_the_table_names_each_step_once() -> None:
    steps = [(old, step.new) for step in TRANSITIONS for old in step.olds]
    assert len(steps) == len(set(steps))
    assert all(State.UNKNOWN not in after for after in LIFE.values())
    assert {old for old, after in LIFE.items() if State.DELETED in after} == {State.FAILED}
    assert State.FAILED not in LIFE[State.ACTIVE]  # nobody fails without having been accused

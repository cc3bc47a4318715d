# idunno/membership/states.py: a member's states, which may follow which, and which statement replaces which: as tables.
#
# Rule 1: a statement's version is (boot, incarnation). Only the member itself raises either, so the higher version is the
#         newer truth; at the same version the worse news wins (SWIM, section 4.2).
# Rule 2: unlike the paper, death is not final: a newer version beats it too. A restart is a higher boot of the same member.
# Rule 3: hearsay may not run ahead of what the member said itself by more than STEP_MAX, so no packet can drive an
#         incarnation to its end.
# Rule 4: whoever is believed to live does not fail by hearsay: it becomes Suspicious first, is told, and may refute.
from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from idunno.membership.messages import State

STEP_MAX: Final = 1_024
"""Far above what a member raises between two hearings (it would have to be accused so often), far below NUMBER_MAX."""

Version = tuple[int, int]  # (boot, incarnation)
NEVER_HEARD: Final[Version] = (-1, 0)


class Transition(msgspec.Struct, frozen=True):
    olds: tuple[State, ...]
    new: State
    when: str


TRANSITIONS: Final = (
    Transition((State.UNKNOWN,), State.ACTIVE, "answers, or is said to live"),
    Transition((State.UNKNOWN,), State.SUSPICIOUS, "silent since it was named, or accused"),
    Transition((State.UNKNOWN,), State.FAILED, "said to have failed"),
    Transition((State.ACTIVE,), State.SUSPICIOUS, "no answer on any way, accused, or said to have failed"),
    Transition((State.SUSPICIOUS,), State.ACTIVE, "refutes"),
    Transition((State.SUSPICIOUS,), State.FAILED, "T_FAIL is over, or said to have failed"),
    Transition((State.FAILED,), State.DELETED, "T_DELETE is over"),
    Transition((State.FAILED, State.DELETED), State.ACTIVE, "refutes, or is restarted"),
    Transition((State.STOPPED, State.LEFT), State.ACTIVE, "is restarted"),
    Transition(
        (State.FAILED, State.DELETED, State.STOPPED, State.LEFT), State.SUSPICIOUS, "a newer version is accused"
    ),
    Transition((State.DELETED, State.STOPPED, State.LEFT), State.FAILED, "a newer version is said to have failed"),
    Transition(
        (State.UNKNOWN, State.ACTIVE, State.SUSPICIOUS, State.FAILED, State.DELETED, State.LEFT),
        State.STOPPED,
        "announces that it stops",
    ),
    Transition(
        (State.UNKNOWN, State.ACTIVE, State.SUSPICIOUS, State.FAILED, State.DELETED, State.STOPPED),
        State.LEFT,
        "announces that it leaves",
    ),
)
"""Every legal step; all others are bugs."""

LIFE: Final[Mapping[State, frozenset[State]]] = {
    state: frozenset(step.new for step in TRANSITIONS if state in step.olds) for state in State
}

RANK: Final[Mapping[State, int]] = {
    State.UNKNOWN: 0,
    State.ACTIVE: 1,
    State.SUSPICIOUS: 2,
    State.FAILED: 3,
    State.DELETED: 4,  # above FAILED: a late rumour of the death does not bring it back into the ring
    State.STOPPED: 5,  # above FAILED: who announced its end before it fell silent has not failed
    State.LEFT: 6,
}

AWAY: Final = frozenset({State.FAILED, State.DELETED, State.STOPPED})
"""Pinged now and then: they may come back."""

_WORDS: Final[Mapping[State, str]] = {State.UNKNOWN: "suspicious", State.DELETED: "failed"}


def word(state: State) -> str:
    """The state as people see it: a member never heard is suspicious, a deleted one has failed."""
    return _WORDS.get(state, state.value)


def overrides(state: State, version: Version, known_state: State, known_version: Version) -> bool:
    """Whether a statement replaces what is known. Source: SWIM paper, section 4.2, with rule 2."""
    if version != known_version:
        return version > known_version
    return RANK[state] > RANK[known_state]


def far_above(version: Version, known: Version) -> bool:
    """Whether no member gets from `known` to `version` between two hearings: one of them is a lie, or damaged."""
    if version[0] == known[0]:
        return version[1] - known[1] > STEP_MAX
    return version[0] - known[0] > STEP_MAX


def runs_ahead(claimed: Version, known: Version) -> bool:
    """Whether `claimed` is too far above `known` to be believed from hearsay."""
    # A boot begins with incarnation 0: a rumour of the next boot must not bring an incarnation to its end either.
    return far_above(claimed, known) or (claimed[0] > known[0] and claimed[1] > STEP_MAX)


def diagram() -> str:
    """TRANSITIONS as a Mermaid state diagram, for docs/membership.md. Steps from many states are drawn from `any`."""
    lines = ["stateDiagram-v2", "    direction LR", "    [*] --> unknown: named by the roster or by a member"]
    for step in TRANSITIONS:
        if len(step.olds) > 3:
            lines.append(f"    any --> {step.new.value}: {step.when}")
        else:
            lines += [f"    {old.value} --> {step.new.value}: {step.when}" for old in step.olds]
    lines.append("    note right of any: any other state, as the table in states.py says")
    return "\n".join(lines)

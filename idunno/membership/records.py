# idunno/membership/records.py: what is kept of a member, and which statement replaces which.
#
# Rule 1: a statement's version is (boot, incarnation). Only the member itself raises either, so the higher version is the
#         newer truth; at the same version the worse news wins (SWIM, section 4.2).
# Rule 2: unlike the paper, death is not final: a newer version beats it too. A restart is a higher boot of the same member.
# Rule 3: hearsay may not run ahead of what the member said itself by more than STEP_MAX, so no packet can drive an
#         incarnation to its end.
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from idunno.base.ids import NodeId
from idunno.membership.events import MemberView
from idunno.membership.messages import Rumor, State

STEP_MAX: Final = 1_024
"""Far above what a member raises between two hearings (it would have to be accused so often), far below NUMBER_MAX."""

Version = tuple[int, int]  # (boot, incarnation)
NEVER_HEARD: Final[Version] = (-1, 0)

_AGAIN: Final = (State.ACTIVE, State.SUSPICIOUS, State.FAILED, State.STOPPED, State.LEFT)  # by a newer version
LIFE: Final[Mapping[State, tuple[State, ...]]] = {
    State.UNKNOWN: _AGAIN,
    State.ACTIVE: _AGAIN,
    State.SUSPICIOUS: _AGAIN,
    State.FAILED: (*_AGAIN, State.DELETED),
    State.DELETED: _AGAIN,
    State.STOPPED: _AGAIN,
    State.LEFT: _AGAIN,
}
"""The legal next states. Nobody becomes UNKNOWN again, and only the FAILED are deleted."""

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


def runs_ahead(claimed: Version, known: Version) -> bool:
    """Whether `claimed` is too far above `known` to be believed from hearsay."""
    if claimed[0] == known[0]:
        return claimed[1] - known[1] > STEP_MAX
    return claimed[0] - known[0] > STEP_MAX


@dataclass(slots=True)
class Member:
    """One member's record. Changed by Swim alone."""

    node: NodeId
    name: str
    address: str
    since_ms: int
    version: Version = NEVER_HEARD
    state: State = State.UNKNOWN
    reason: str = "not heard from yet"
    accusers: tuple[NodeId, ...] = ()  # while SUSPICIOUS: at most two
    deadline_ms: int | None = None  # SUSPICIOUS: when it fails; FAILED: when it is deleted
    missed: int = 0  # periods in a row in which this node's pings to it went unanswered

    def view(self) -> MemberView:
        return MemberView(
            node=self.node,
            name=self.name,
            address=self.address,
            state=word(self.state),
            incarnation=self.version[1],
            boot=self.version[0],
            since_ms=self.since_ms,
            reason=self.reason,
        )

    def rumor(self) -> Rumor | None:
        """What to tell others of it; None when nothing is known but its name."""
        if self.version == NEVER_HEARD or self.state is State.UNKNOWN:
            return None
        state = State.FAILED if self.state is State.DELETED else self.state
        accusers = self.accusers if state is State.SUSPICIOUS else ()
        return Rumor(self.node, self.version[0], self.version[1], state, self.name, self.address, accusers)

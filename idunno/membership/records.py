# idunno/membership/records.py: what is kept of one member.
from __future__ import annotations

from hashlib import blake2b
from typing import Final

import msgspec

from idunno.base.ids import NodeId
from idunno.membership.messages import MemberView, Rumor, State
from idunno.membership.states import NEVER_HEARD, Version, word

DETOURS_TO_TELL: Final = 3
"""Probes in a row that are answered only by a detour until the view says so: at 20 % loss one probe in a thousand comes to it."""
SKEW_TO_TELL_MS: Final = 1_000


class Member(msgspec.Struct):
    """One member's record. Changed by Book and Swim alone."""

    node: NodeId
    name: str
    address: str
    since_ms: int
    version: Version = NEVER_HEARD
    state: State = State.UNKNOWN
    reason: str = "not heard from yet"
    accusers: tuple[NodeId, ...] = ()  # while SUSPICIOUS: at most ACCUSERS_MAX
    deadline_ms: int | None = None  # SUSPICIOUS: when it fails; FAILED: when it is deleted
    given_ms: int = 0  # SUSPICIOUS: time that this process was held up, and that is not counted
    not_before_ms: int = 0  # SUSPICIOUS: what came while this process was held up is read first
    looked: bool = False  # the deadline has passed once; what lies in the socket is read before the verdict
    mark: int = 0  # its part of the list's digest; 0: nothing to tell of it
    named: str = ""  # the address that the roster named last
    detours: int = 0  # probes in a row that it did not answer directly
    detour: str = ""  # how it did answer
    skew_ms: int | None = None  # its wall clock minus ours, as last estimated

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
            problem=self.problem(),
        )

    def problem(self) -> str:
        """What is wrong with it although it lives, "" if nothing is known."""
        found = []
        if self.detours >= DETOURS_TO_TELL:
            found.append(
                f"UDP to {self.address} is blocked: {self.detours} pings in a row were answered only {self.detour}; "
                "open the port for UDP both ways"
            )
        if self.skew_ms is not None and abs(self.skew_ms) > SKEW_TO_TELL_MS:
            side = "ahead of" if self.skew_ms > 0 else "behind"
            found.append(f"its clock is {abs(self.skew_ms) / 1000:.1f} s {side} this node's; set both by NTP")
        return "; ".join(found)

    def rumor(self) -> Rumor | None:
        """What to tell others of it; None when nothing is known but its name."""
        if self.version == NEVER_HEARD or self.state is State.UNKNOWN:
            return None
        state = State.FAILED if self.state is State.DELETED else self.state
        accusers = self.accusers if state is State.SUSPICIOUS else ()
        return Rumor(self.node, self.version[0], self.version[1], state, self.name, self.address, accusers)


def mark_of(node: NodeId, version: Version, state: State) -> int:
    """A member's part of the digest: 63 bits of what is told of it. The digest is the XOR of all parts."""
    if version == NEVER_HEARD or state is State.UNKNOWN:
        return 0
    told = State.FAILED if state is State.DELETED else state
    text = f"{node} {version[0]} {version[1]} {told.value}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

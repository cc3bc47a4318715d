# idunno/scheduler/presence.py: which of membership's verdicts become commands, so that the roster tells who is present.
#
# Rule 1: reply rule, write quorum and workers count what the roster holds present; gossip is only heard here, by the leader.
# Rule 2: bad news at once, good news after STEADY_MS: a node that comes and goes must not fill the log.
# Rule 3: a verdict is about one process (boot). One about an older process than the roster's is no news of the roster's, which
#         stays unseen: after all have lost power, an old image of a disk may be all that the detector ever hears of.
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from idunno.base.ids import NodeId
from idunno.coordinator.commands import SetPresence
from idunno.coordinator.records import NodeRecord
from idunno.membership.events import MemberView

STEADY_MS: Final = 500
"""One protocol period of the detector: whoever is back has answered a ping by then."""
UNSEEN_MS: Final = 10_000
"""A node the roster calls present, and of which the detector has never seen this boot, is failed after this: gossip needs a few
periods at most."""


class Presence:
    """The leader's decisions. One object a term; times are in ms of one steady clock."""

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._seen_since: dict[NodeId, tuple[str, int, int]] = {}  # node -> (state, boot, since)

    def decide(self, roster: Iterable[NodeRecord], view: Sequence[MemberView], now_ms: int) -> list[SetPresence]:
        """Commands that bring the roster in line with `view`, at most one a node. Call at each change and twice a second."""
        members = {member.node: member for member in view}
        commands: list[SetPresence] = []
        known: set[NodeId] = set()
        for record in roster:
            known.add(record.node)
            member = members.get(record.node)
            state, boot = (
                (member.state, member.boot) if member is not None and member.boot >= 0 else ("unseen", record.boot)
            )
            if boot < record.boot:
                state, boot = "older", record.boot
            if record.node == self._me:  # who decides here is alive
                state, boot = "active", record.boot
            before = self._seen_since.get(record.node)
            if before is None or before[:2] != (state, boot):
                before = self._seen_since[record.node] = (state, boot, now_ms)
            command = _verdict(record, state, boot, now_ms - before[2], member.reason if member is not None else "")
            if command is not None:
                commands.append(command)
        for gone in self._seen_since.keys() - known:
            del self._seen_since[gone]
        return commands


def _verdict(record: NodeRecord, state: str, boot: int, for_ms: int, reason: str) -> SetPresence | None:
    """What to write about a node that has been in `state` for `for_ms`. A table, in order."""
    wanted, needs_ms, why = {
        "active": ("present", 0 if record.presence == "present" else STEADY_MS, "answers again"),
        "failed": ("failed", 0, reason or "does not answer"),
        "deleted": ("failed", 0, reason or "does not answer"),
        "stopped": ("stopped", 0, reason or "was stopped"),
        "left": ("stopped", 0, reason or "is leaving"),
        "unseen": ("failed", UNSEEN_MS, "has not been heard of since this leader took over"),
        "older": ("failed", UNSEEN_MS, "only an older boot of it was heard: its data directory may be an old image"),
    }.get(state, (record.presence, 0, ""))  # suspicious: not a verdict yet
    if record.presence == wanted or for_ms < needs_ms:
        return None
    if state in ("unseen", "older") and record.presence != "present":
        return None
    return SetPresence(node=record.node, presence=wanted, boot=boot, reason=why)

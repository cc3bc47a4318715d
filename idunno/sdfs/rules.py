# idunno/sdfs/rules.py: how many copies a write needs, and what is said of one that has fewer than wished for.
#
# Rule 1: these numbers follow the roster, never gossip: only then do all nodes count alike.
from __future__ import annotations

from datetime import UTC, datetime

from idunno.base.errors import Exhausted, InvalidArgument
from idunno.coordinator.records import COPIES_WANTED
from idunno.coordinator.roster import Roster
from idunno.sdfs.messages import PutAnswer


def quorum(roster: Roster, write_quorum: int | None = None) -> int:
    """Synced copies that a block needs before its commit: as asked for, or min(4, present nodes).

    Unless asked for, never below 2 where there are two nodes or more: one copy alone is not "stored" (design.md, section 6).
    Raises InvalidArgument.
    """
    if write_quorum is None:
        return max(roster.acknowledge_copies(), min(2, roster.size))
    if not 1 <= write_quorum <= COPIES_WANTED:
        raise InvalidArgument(f"a write quorum is 1 to {COPIES_WANTED} copies, not {write_quorum}")
    return write_quorum


def check_reachable(roster: Roster, needed: int) -> None:
    """Raises Exhausted when fewer nodes are present than copies are needed."""
    if needed > roster.present:
        away = ", ".join(f"{n.name} ({n.presence})" for n in roster.nodes() if n.presence != "present")
        raise Exhausted(
            f"{needed} copies are needed and {roster.present} of {len(roster.nodes())} nodes are present; "
            f"away: {away or 'none'}; wait for them, add nodes, or give a lower --write-quorum"
        )


def put_answer(
    roster: Roster, name: str, version: int, size: int, blocks: int, holders: list[str], copies: int
) -> PutAnswer:
    """The acknowledgement, which says so when there are fewer copies than there should be. `holders`: the names of nodes."""
    wanted = roster.copies_wanted()
    degraded = copies < wanted
    why = ""
    if degraded:
        away = ", ".join(f"{n.name} {n.presence}" for n in roster.nodes() if n.presence != "present")
        why = f"{copies} of {wanted} copies" + (f"; {away}" if away else "")
    return PutAnswer(name, version, size, blocks, holders, degraded, copies, why)


def iso(time_ms: int) -> str:
    """Machine time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

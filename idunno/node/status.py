# idunno/node/status.py: what a node says of its cluster: the members, and whether all is well and why not.
#
# Rule 1: it answers at once from what this node itself knows; only what the leader alone knows is asked of it, with a short
#         deadline, and left out when it does not answer: status must work when nothing else does.
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from idunno.base.errors import WHEN_LOST
from idunno.base.ids import NodeId
from idunno.base.version import VERSION
from idunno.coordinator.messages import Member, StatusAnswer
from idunno.coordinator.records import COPIES_WANTED, NodeRecord
from idunno.membership.messages import MemberView

BLOCKS_TOLD_MAX: Final = 100


class LeaderView(msgspec.Struct, frozen=True):
    """What only the leader knows."""

    copies_missing: int
    lag: dict[str, int]
    recovering: bool
    waiting: int  # tasks out on lease
    blocks_lost: tuple[str, ...] = ()  # the first BLOCKS_TOLD_MAX
    disk_problems: Mapping[str, str] = msgspec.field(default_factory=dict)  # by node's name
    blocks_rotten: Mapping[str, int] = msgspec.field(default_factory=dict)  # by node's name


class Seen(msgspec.Struct, frozen=True):
    """Everything a status is made of."""

    cluster: str
    me: NodeId
    leader: NodeId | None
    term: int
    commit: int
    applied: int
    roster: Sequence[NodeRecord]
    view: Mapping[NodeId, MemberView]
    files: int
    models: dict[str, int]
    tasks: dict[str, int]
    rates: dict[str, float]
    stopped_applying: str  # why this node takes no part in the consensus, "" when it does
    leader_view: LeaderView | None
    loop_late: dict[str, int] = msgspec.field(default_factory=dict)
    machine_version: int = 0


def members(
    roster: Sequence[NodeRecord], view: Mapping[NodeId, MemberView], me: NodeId, leader: NodeId | None
) -> list[Member]:
    """The roster with what gossip says of each; in the order of names."""
    rows = []
    for record in roster:
        seen = view.get(record.node)
        if record.node == me:
            state = "active"
        elif seen is not None:
            state = seen.state
        else:  # not heard of since this node started, or forgotten after its death
            state = "failed" if record.presence == "present" else record.presence
        rows.append(
            Member(
                name=record.name,
                id=record.node,
                # Who was started elsewhere says so before the roster can have it.
                address=seen.address if seen is not None and seen.boot > record.boot else record.address,
                state=state,
                role="scheduler" if record.node == leader else "worker",
                incarnation=seen.incarnation if seen is not None else 0,
                version=record.software or VERSION,
                slots=record.slots,
                zone=record.zone,
                problem=seen.problem if seen is not None else "",
            )
        )
    return sorted(rows, key=lambda row: _natural(row.name))


def _natural(name: str) -> tuple[str, int, str]:
    """n2 before n10."""
    head = name.rstrip("0123456789")
    digits = name[len(head) :]
    return head, int(digits) if digits else -1, name


def status(seen: Seen) -> StatusAnswer:
    rows = members(seen.roster, seen.view, seen.me, seen.leader)
    name: Callable[[NodeId], str] = {record.node: record.name for record in seen.roster}.__getitem__
    known = {record.node for record in seen.roster}
    why = _why(seen, rows)
    extra = seen.leader_view
    disks = dict(extra.disk_problems) if extra is not None else {}
    rotten = dict(extra.blocks_rotten) if extra is not None else {}
    tasks = dict(seen.tasks)
    if extra is not None:
        tasks["waiting"] = extra.waiting
        tasks["ready"] = max(0, tasks.get("ready", 0) - extra.waiting)
    return StatusAnswer(
        healthy=not why,
        why="; ".join(why),
        cluster=seen.cluster,
        node=name(seen.me) if seen.me in known else seen.me,
        scheduler=name(seen.leader) if seen.leader is not None and seen.leader in known else seen.leader,
        term=seen.term,
        voters=[record.name for record in seen.roster if record.voter],
        learners=[record.name for record in seen.roster if not record.voter],
        members=dict(Counter(row.state for row in rows)),
        applied=seen.applied,
        commit=seen.commit,
        files=seen.files,
        copies_missing=extra.copies_missing if extra is not None else 0,
        models=seen.models,
        queue=tasks,
        rates=seen.rates,
        lag=extra.lag if extra is not None else {},
        recovering=extra.recovering if extra is not None else False,
        degraded=_degraded(seen.roster),
        problem=seen.stopped_applying,
        machine_version=seen.machine_version,
        warnings=[
            *(f"{row.name}: {row.problem}" for row in rows if row.problem),
            *(f"{node} takes no blocks: {problem}" for node, problem in sorted(disks.items())),
            *(
                f"{node} found {count} {'block' if count == 1 else 'blocks'} rotten or unreadable since its start, replaced "
                "from other copies; if it goes on, replace its disk"
                for node, count in sorted(rotten.items())
            ),
        ],
        blocks_lost=list(extra.blocks_lost) if extra is not None else [],
        disk_problems=disks,
        blocks_rotten=rotten,
        loop_late=seen.loop_late,
    )


def _degraded(roster: Sequence[NodeRecord]) -> str:
    """Answers have as many copies as nodes are held present, and should have COPIES_WANTED, or one at each node."""
    present, wanted = sum(record.presence == "present" for record in roster), min(COPIES_WANTED, len(roster))
    if present >= wanted:
        return ""
    away = [f"{record.name} {record.presence}" for record in roster if record.presence != "present"]
    return f"answers leave with {max(1, present)} of {wanted} copies: {', '.join(away[:8])}"


def _why(seen: Seen, rows: Sequence[Member]) -> list[str]:
    why = []
    if seen.stopped_applying:
        why.append(f"this node takes no part in the consensus: {seen.stopped_applying}")
    if degraded := _degraded(seen.roster):
        why.append(f"degraded: {degraded}")
    voters = [record for record in seen.roster if record.voter]
    if seen.leader is None:
        states = {row.id: row.state for row in rows}
        active = sum(states[record.node] == "active" for record in voters)
        if active <= len(voters) // 2:
            why.append(
                f"no quorum: {active} of {len(voters)} voters are active, {len(voters) // 2 + 1} are needed; "
                f"start the others; {WHEN_LOST}"
            )
        else:
            why.append("no scheduler is elected yet")
    if len(voters) == 1:
        why.append("one voter")
    for state in ("failed", "suspicious", "stopped"):
        names = [row.name for row in rows if row.state == state]
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            why.append(f"{len(names)} {'member is' if len(names) == 1 else 'members are'} {state}: {shown}")
    if seen.leader_view is not None:
        if seen.leader_view.copies_missing:
            why.append(f"{seen.leader_view.copies_missing} block copies are missing")
        if lost := seen.leader_view.blocks_lost:
            text = (
                f"{len(lost)}{' or more' if len(lost) == BLOCKS_TOLD_MAX else ''} blocks have no copy on a present node"
            )
            why.append(f"{text}, first {lost[0][:16]}; `idunno repair` names the files")
        if seen.leader_view.recovering:
            why.append("recovering: the new scheduler is waiting for the nodes' reports")
    failed = seen.models.get("failed", 0)
    if failed:
        why.append(f"{failed} {'model has' if failed == 1 else 'models have'} failed; see `idunno models`")
    return why

# idunno/coordinator/electorate.py: who should vote: the rule, as one pure function beside its numbers.
#
# Rule 1: the voters are the largest odd number of nodes that is at most min(7, nodes of the roster). One joins or one goes at a
#         time, and only who has the log, the CA's key and answers may join.
# Rule 2: a voter that has been silent for a minute is replaced: first another joins, then it goes. Without another it goes only
#         where that lets one more of the others die, and never below three.
# Rule 3: no step is taken whose outcome a majority that answers now could not commit.
# Rule 4: fewer than three voters are left only by nodes that leave or are removed.
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from idunno.base.ids import NodeId

VOTERS_MAX: Final = 7
"""Seven voters go on when three die (design.md, section 6); more would only slow every commit."""
VOTERS_LEAST: Final = 3
"""Deaths alone never leave fewer: two or one would go on after a split of the network that three survive."""


def voters_of(nodes: int) -> int:
    """The largest odd number that is at most min(7, nodes)."""
    return (min(VOTERS_MAX, nodes) - 1) // 2 * 2 + 1


@dataclass(frozen=True, slots=True)
class Change:
    """One voter more (`joins`) or less."""

    node: NodeId
    joins: bool
    why: str


def next_change(
    roster: Sequence[NodeId],
    voters: Collection[NodeId],
    leader: NodeId,
    *,
    ready: Collection[NodeId],
    silent: Collection[NodeId],
    away: Collection[NodeId],
    leaving: Collection[NodeId],
) -> Change | None:
    """The next step to the voters that there should be; None when there is none to take now.

    `roster`: all nodes in the order in which they joined. `ready`: learners that may vote at once. `silent`: voters that have
    not answered for too long, `away`: those that do not answer now. `leaving`: nodes that are to go for good.
    """
    staying = [node for node in roster if node not in leaving]
    wanted, count = voters_of(len(staying)), len(voters)
    able = [node for node in staying if node in ready and node not in voters]
    going = sorted(node for node in voters if node in leaving or node not in roster)
    going.sort(key=lambda node: node == leader)
    dead = [node for node in roster if node in voters and node in silent and node not in going and node != leader]
    answer = {node for node in voters if node == leader or (node not in away and node not in silent)}

    def goes(nodes: list[NodeId], why: str) -> Change | None:
        """The first of these that can be spared."""
        for node in nodes:
            if len(answer - {node}) > (count - 1) // 2:
                return Change(node, False, why)
        return None

    useful = going or dead or count % 2 == 0 or (len(able) >= 2 and count < wanted)
    if able and useful and count <= wanted and len(answer) + 1 > (count + 1) // 2:
        gone = going or dead
        why = f"in the place of {gone[0]}" if gone else f"{len(staying)} nodes are to have {wanted} voters"
        return Change(able[0], True, why)
    if going:
        return goes(going, "it leaves for good") or goes(dead, "it is silent, and another leaves")
    if count > wanted:
        spare = [node for node in reversed(roster) if node in voters and node != leader]
        return goes([*dead, *spare], f"{len(staying)} nodes are to have {wanted} voters")
    # Removing one silent voter of an even number, or two of an odd one, lets one more of the others die.
    if dead and count > VOTERS_LEAST and (count % 2 == 0 or (len(dead) >= 2 and count - 2 >= VOTERS_LEAST)):
        return goes(dead, "it is silent, and nobody can take its place")
    return None

# idunno/consensus/quorum.py: the rules that decide, as pure functions.
from __future__ import annotations

from collections.abc import Iterable

from idunno.base.ids import NodeId


def majority(voters: int) -> int:
    """How many of `voters` make a majority."""
    return voters // 2 + 1


def reached(values: Iterable[int], count: int) -> int:
    """The highest value that at least `count` of `values` have reached: the `count`-th largest; 0 if there are fewer.

    With the synced index of each voter and a majority as `count` it is the index up to which a majority has the log
    (Raft thesis, 3.5); with the times of each voter's last answer, when a majority was last heard.
    """
    ordered = sorted(values, reverse=True)
    return ordered[count - 1] if 1 <= count <= len(ordered) else 0


def grants_vote(mine: tuple[int, int], theirs: tuple[int, int], voted_for: NodeId | None, asker: NodeId) -> bool:
    """Whether to vote for `asker` in its term; logs end at (term, index). Raft thesis, 3.4 and 3.6.1."""
    if voted_for not in (None, asker):
        return False  # one candidate per term, first come, first served
    return theirs >= mine  # later last term wins; at equal terms, the longer log

# idunno/consensus/read_index.py: the reads of a leader, which wait for proof that it still led after they came.
#
# Source: the Raft thesis, 6.4. None of this changes term, vote, role, log or commit: those are raft.py's.
# Rule 1: one round of heartbeats serves all reads that wait. A round under way began before later ones came, and proves nothing
#         for them.
# Rule 2: a round asks those voters that answered the last heartbeat first, no more than make a majority with the leader; when
#         they are silent for `read_wait_ms`, all.
from __future__ import annotations

from collections.abc import Iterable

from idunno.base.ids import Index, NodeId


class ReadIndex:
    """Of one leader's term. Reads are the numbers that the driver gave them."""

    def __init__(self) -> None:
        self.round = 0  # goes out with every append; an answer that bears it was sent after the round began
        self.ask_all_ms: int | None = None  # when all are asked in a round that few were asked in
        self.under_way: tuple[Index, tuple[int, ...]] | None = None
        self.waiting: list[int] = []
        self._quick: frozenset[NodeId] = frozenset()
        self.answered: set[NodeId] | None = None  # since the last heartbeat, until they are enough

    def add(self, read: int) -> None:
        self.waiting.append(read)

    def take_waiting(self) -> tuple[int, ...]:
        waiting, self.waiting = tuple(self.waiting), []
        return waiting

    def begin(self, commit: Index) -> bool:
        """Begin a round for those that wait, for the machine as of `commit`; False when there are none, or one is under way."""
        if self.under_way is not None or not self.waiting:
            return False
        self.round += 1
        self.under_way = (commit, self.take_waiting())
        return True

    def finish(self) -> tuple[Index, tuple[int, ...]]:
        """A majority has answered in the round: as of which index the reads may be answered, and which."""
        assert self.under_way is not None, "no round is under way"
        found, self.under_way, self.ask_all_ms = self.under_way, None, None
        return found

    def all(self) -> tuple[int, ...]:
        """Under way and waiting."""
        return (*(self.under_way[1] if self.under_way is not None else ()), *self.waiting)

    # -- who is quick -----------------------------------------------------------------------------------------------

    def heartbeat(self) -> None:
        """All are asked whether they are there."""
        self.answered = set()

    def heard(self, voter: NodeId, needed: int) -> None:
        """A voter answered; `needed`: how many make a majority with the leader."""
        if self.answered is not None:
            self.answered.add(voter)
            if len(self.answered) >= needed:
                self._quick, self.answered = frozenset(self.answered), None

    def quick(self, voters: Iterable[NodeId], needed: int) -> frozenset[NodeId]:
        """Whom to ask; nobody when too few of `voters` are known to be quick: ask all then."""
        return self._quick if len(self._quick.intersection(voters)) >= needed else frozenset()

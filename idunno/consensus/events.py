# idunno/consensus/events.py: everything the Raft core hears and says, as small frozen values.
#
# Rule 1: a promise (a granted vote, the acknowledgement of an append) leaves the core only inside `Persist.then`, or when
#         what it promises is synced already. The driver syncs first, then sends.
# Rule 2: outputs are carried out in list order; Persists are made durable in the order they came.
from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.messages import Entry, Install, InstallAnswer, RaftMessage


class RaftRole(enum.Enum):
    FOLLOWER, PRE_CANDIDATE, CANDIDATE, LEADER = "follower", "pre-candidate", "candidate", "leader"


@dataclass(frozen=True, slots=True)
class HardState:
    """What a voter may never forget (Raft thesis, figure 3.1)."""

    term: Term
    voted_for: NodeId | None = None


# -- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """`Raft.deadline_ms()` has come. Early or late does no harm."""


@dataclass(frozen=True, slots=True)
class Received:
    """`counts`: not if the sender only copies the log, because its own was an old one: then its answers decide nothing."""

    sender: NodeId
    message: RaftMessage
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Persisted:
    """Every Persist up to `seq` is synced."""

    seq: int


@dataclass(frozen=True, slots=True)
class Propose:
    """Append these payloads; only while `accepts_proposals`. The first gets index `terms.last + 1`."""

    payloads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Ask for an index that is safe to read at; answered by ReadReady or ReadFailed with the same `read`."""

    read: int


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The connection to `node` closed."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Transfer:
    """Hand leadership to the voter that is furthest along, if leading (thesis, 3.10)."""


@dataclass(frozen=True, slots=True)
class SetMembers:
    """All nodes that are to have the log; those that do not vote are learners."""

    members: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class ChangeVoters:
    """Append an entry that names these voters; only while `change_refused` says "". It gets index `terms.last + 1`."""

    voters: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class Installed:
    """A snapshot from `sender` is durable here: the machine after entry `index` of `term`, with the voters named by then."""

    sender: NodeId
    index: Index
    term: Term
    voters: frozenset[NodeId]
    voters_index: Index


@dataclass(frozen=True, slots=True)
class Compacted:
    """A snapshot covers them, and the log has let go of the entries up to `index`."""

    index: Index


@dataclass(frozen=True, slots=True)
class Halt:
    """`on`: this node cannot keep a promise (its disk refuses, or it cannot apply): it leads, votes and acknowledges nothing
    until Halt(False)."""

    on: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """Halted as it is, this node takes in the leader's log, in place of its own where they differ, and says how far it has
    come; it goes on so until Halt(False). `term`: in which it once was, as others know, whatever its disk says."""

    term: Term


Input: TypeAlias = (
    Tick
    | Received
    | Persisted
    | Propose
    | Read
    | PeerLost
    | Transfer
    | SetMembers
    | ChangeVoters
    | Installed
    | Compacted
    | Halt
    | Copy
)


# -- outputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    to: NodeId
    message: RaftMessage


@dataclass(frozen=True, slots=True)
class SendEntries:
    """Send an Append with the entries `first`..`last` of this node's log, if it still leads `term` when they are read."""

    to: NodeId
    term: Term
    prev_term: Term
    first: Index
    last: Index
    commit: Index
    round: int


@dataclass(frozen=True, slots=True)
class Persist:
    """Sync the hard state, if given, and the entries; then send `then`, and tell the core Persisted(seq).

    Entries replace whatever the log holds from `first` on. `anew`: all that the log holds counts no more, it goes on behind
    the snapshot of this index.
    """

    seq: int
    hard: HardState | None
    first: Index
    entries: tuple[Entry, ...]
    then: tuple[Send, ...]
    anew: Index | None = None


@dataclass(frozen=True, slots=True)
class SendSnapshot:
    """The entries that `to` needs are no longer in the log: send it the newest snapshot, as long as this node leads `term`
    and `to` is `installing`."""

    to: NodeId
    term: Term


@dataclass(frozen=True, slots=True)
class TakeInstall:
    """A part of a snapshot that this node needs, from the leader of its term."""

    sender: NodeId
    message: Install


@dataclass(frozen=True, slots=True)
class InstallAnswered:
    """How far a follower has come with the snapshot that it is sent."""

    sender: NodeId
    message: InstallAnswer


@dataclass(frozen=True, slots=True)
class Committed:
    """Entries up to `index` are committed: apply them in order."""

    index: Index


@dataclass(frozen=True, slots=True)
class RoleChanged:
    """Role, term or known leader are others than before."""

    role: RaftRole
    term: Term
    leader: NodeId | None


@dataclass(frozen=True, slots=True)
class ReadReady:
    reads: tuple[int, ...]
    index: Index


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """Leadership was lost, or never there: ask the leader."""

    reads: tuple[int, ...]


Output: TypeAlias = (
    Send
    | SendEntries
    | SendSnapshot
    | TakeInstall
    | InstallAnswered
    | Persist
    | Committed
    | RoleChanged
    | ReadReady
    | ReadFailed
)

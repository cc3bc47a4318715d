# idunno/consensus/events.py: everything the Raft core hears and says, as small frozen values.
#
# Rule 1: a promise (a granted vote, the acknowledgement of an append) leaves the core only inside `Persist.then`, or when
#         what it promises is synced already. The driver syncs first, then sends.
# Rule 2: outputs are carried out in list order; Persists are made durable in the order they came.
from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.messages import Entry, Install, InstallAnswer, RaftMessage


class RaftRole(enum.Enum):
    FOLLOWER, PRE_CANDIDATE, CANDIDATE, LEADER = "follower", "pre-candidate", "candidate", "leader"


class _Value(msgspec.Struct, frozen=True, gc=False):
    """Several are made for every append: a Struct costs a tenth of a frozen dataclass."""


class HardState(_Value, frozen=True):
    """What a voter may never forget (Raft thesis, figure 3.1)."""

    term: Term
    voted_for: NodeId | None = None


# -- inputs -----------------------------------------------------------------------------------------------------------


class Tick(_Value, frozen=True):
    """`Raft.deadline_ms()` has come. Early or late does no harm."""


class Received(_Value, frozen=True):
    """`counts`: not if the sender only copies the log, because its own was an old one: then its answers decide nothing."""

    sender: NodeId
    message: RaftMessage
    counts: bool = True


class Persisted(_Value, frozen=True):
    """Every Persist up to `seq` is synced."""

    seq: int


class Propose(_Value, frozen=True):
    """Append these payloads; only while `accepts_proposals`. The first gets index `terms.last + 1`."""

    payloads: tuple[bytes, ...]


class Read(_Value, frozen=True):
    """Ask for an index that is safe to read at; answered by ReadReady or ReadFailed with the same `read`."""

    read: int


class PeerLost(_Value, frozen=True):
    """The connection to `node` closed."""

    node: NodeId


class Transfer(_Value, frozen=True):
    """Hand leadership to the voter that is furthest along, if leading (thesis, 3.10)."""


class SetMembers(_Value, frozen=True):
    """All nodes that are to have the log; those that do not vote are learners."""

    members: frozenset[NodeId]


class ChangeVoters(_Value, frozen=True):
    """Append an entry that names these voters; only while `change_refused` says "". It gets index `terms.last + 1`."""

    voters: frozenset[NodeId]


class Installed(_Value, frozen=True):
    """A snapshot from `sender` is durable here: the machine after entry `index` of `term`, with the voters named by then."""

    sender: NodeId
    index: Index
    term: Term
    voters: frozenset[NodeId]
    voters_index: Index


class Compacted(_Value, frozen=True):
    """A snapshot covers them, and the log has let go of the entries up to `index`."""

    index: Index


class Halt(_Value, frozen=True):
    """`on`: this node cannot keep a promise (its disk refuses, or it cannot apply): it leads, votes and acknowledges nothing
    until Halt(False)."""

    on: bool


class Doubted(_Value, frozen=True):
    """The log of `node` was found to be an old one: what it acknowledged counts as a copy no more, until it says so again."""

    node: NodeId


class Copy(_Value, frozen=True):
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
    | Doubted
)


# -- outputs ----------------------------------------------------------------------------------------------------------


class Send(_Value, frozen=True):
    to: NodeId
    message: RaftMessage


class SendEntries(_Value, frozen=True):
    """Send an Append with the entries `first`..`last` of this node's log, if it still leads `term` when they are read."""

    to: NodeId
    term: Term
    prev_term: Term
    first: Index
    last: Index
    commit: Index
    round: int


class Persist(_Value, frozen=True):
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


class SendSnapshot(_Value, frozen=True):
    """The entries that `to` needs are no longer in the log: send it the newest snapshot, as long as this node leads `term`
    and `to` is `installing`."""

    to: NodeId
    term: Term


class TakeInstall(_Value, frozen=True):
    """A part of a snapshot that this node needs, from the leader of its term."""

    sender: NodeId
    message: Install


class InstallAnswered(_Value, frozen=True):
    """How far a follower has come with the snapshot that it is sent."""

    sender: NodeId
    message: InstallAnswer


class Committed(_Value, frozen=True):
    """Entries up to `index` are committed: apply them in order."""

    index: Index


class RoleChanged(_Value, frozen=True):
    """Role, term or known leader are others than before."""

    role: RaftRole
    term: Term
    leader: NodeId | None


class ReadReady(_Value, frozen=True):
    reads: tuple[int, ...]
    index: Index


class ReadFailed(_Value, frozen=True):
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

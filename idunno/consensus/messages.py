# idunno/consensus/messages.py: what voters and learners say to each other.
#
# Rule 1: messages may be lost, repeated and reordered; each says enough (term, index, round) to be judged on its own.
# Rule 2: a message is one frame's header: the entries of one append are bounded in bytes and in number.
# Rule 3: the sender is who the connection's certificate says it is, so no message names it.
from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from idunno.base.ids import Index, NodeId, Term
from idunno.wire.calls import HEADER_BYTES_MAX, Empty, Method, Role

PAYLOAD_BYTES_MAX: Final = 512 * 1024
"""One entry's payload: half a frame's header, so that any entry fits an append."""
APPEND_BYTES_MAX: Final = 512 * 1024
"""Payload bytes in one append; a larger batch would hold up a heartbeat behind it for over 4 ms at 1 Gbit/s."""
APPEND_ENTRIES_MAX: Final = 4096
"""Entries in one append. With 24 bytes around each they still fit a header: 512 KiB + 96 KiB < 1 MiB."""

INSTALL_BYTES_MAX: Final = 256 * 1024
"""Of a snapshot in one message: a heartbeat waits behind 2 ms of a gigabit link."""

assert APPEND_BYTES_MAX + 24 * APPEND_ENTRIES_MAX + 4096 < HEADER_BYTES_MAX
assert PAYLOAD_BYTES_MAX <= APPEND_BYTES_MAX


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry of the log; its index is its place. An empty payload is the no-op of a new term."""

    term: Term
    payload: bytes


class VoteRequest(msgspec.Struct, frozen=True, tag="vote"):
    """RequestVote (Raft thesis, 3.4); with `pre`, the question whether it would be granted (9.6).

    `term` is the term the asker wants to lead: one above its own if `pre`. `transfer`: the old leader asked for it (3.10),
    so that hearing from that leader is no reason to refuse.
    """

    term: Term
    last_index: Index
    last_term: Term
    pre: bool = False
    transfer: bool = False


class VoteAnswer(msgspec.Struct, frozen=True, tag="voted"):
    """`term` is the asker's if granted, else the answerer's own."""

    term: Term
    granted: bool
    pre: bool = False


class Append(msgspec.Struct, frozen=True, tag="append"):
    """AppendEntries (3.5); without entries a heartbeat. `round` counts the leader's rounds for ReadIndex (6.4). `notice`: it
    only says what is committed; who has nothing to object need not answer."""

    term: Term
    prev_index: Index
    prev_term: Term
    commit: Index
    round: int
    entries: tuple[Entry, ...] = ()
    notice: bool = False


class AppendAnswer(msgspec.Struct, frozen=True, tag="appended"):
    """`ok`: all up to `index` equals the leader's log and is synced here.

    Not ok: the log differs at `index` (the append's prev_index); `hint_index` is the last place where it may agree, and
    `hint_term` this node's term there (thesis, end of 3.5, as etcd does it).
    """

    term: Term
    ok: bool
    index: Index
    round: int
    hint_index: Index = Index(0)
    hint_term: Term = Term(0)


class TimeoutNow(msgspec.Struct, frozen=True, tag="timeout-now"):
    """The leader hands over: stand for election at once (3.10)."""

    term: Term


class Install(msgspec.Struct, frozen=True, tag="install"):
    """InstallSnapshot (5.1): bytes `offset`.. of the leader's snapshot file of `size` bytes, which holds the machine after
    entry `index` of term `last_term`."""

    term: Term
    index: Index
    last_term: Term
    size: int
    offset: int
    data: bytes


class InstallAnswer(msgspec.Struct, frozen=True, tag="installed"):
    """`done`: this node has synced the leader's log up to `index`. Not done: of the snapshot of `index` it wants the bytes
    from `offset` on next; so it says again and again while it works on what it got (`offset` is the file's size then)."""

    term: Term
    index: Index
    offset: int
    done: bool = False


RaftMessage: TypeAlias = VoteRequest | VoteAnswer | Append | AppendAnswer | TimeoutNow | Install | InstallAnswer


class RaftEnvelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message between two nodes of the coordinator, sent with Caller.notify on Lane.CONSENSUS."""

    message: RaftMessage
    run: int = 0  # of the sender's process (standing.py); 0 from a release that has none
    silent: bool = False  # the sender copies the log, its own being an old one, and promises nothing (readmission.py)


class Hello(msgspec.Struct, frozen=True):
    """A process asks to be heard: its run, and what its disk holds."""

    run: int
    term: Term
    index: Index


class HelloAnswer(msgspec.Struct, frozen=True):
    why: str  # in one line, why it is not heard; "" if it is
    voters: list[NodeId] = []  # as the log of who answers names them, in entry `voters_index`
    voters_index: Index = Index(0)
    term: Term = Term(0)  # if it is not heard: in which it once said something, as far as who answers knows


class Marks(msgspec.Struct, frozen=True):
    """From a leader of `term`: how far each voter, itself included, has acknowledged its log, and which run of it said so."""

    run: int
    term: Term
    marks: dict[NodeId, Index]
    runs: dict[NodeId, int] = {}


class Readmit(msgspec.Struct, frozen=True):
    """To the leader, from a process whose log was found to be an old one: its run, which promises nothing yet."""

    run: int


class ReadmitAnswer(msgspec.Struct, frozen=True):
    """Once its log holds entry `index` of `term`, its word may count again. Without an index: not now, and why; above which
    `boot` its number must be; whether another process of it was heard (`alive`)."""

    term: Term = Term(0)
    index: Index = Index(0)
    why: str = ""
    boot: int = 0
    alive: bool = False


RAFT: Final = Method("raft", RaftEnvelope, Empty, Role.NODE)
HELLO: Final = Method("raft.hello", Hello, HelloAnswer, Role.NODE)
WHO: Final = Method("raft.who", Empty, Empty, Role.NODE)
"""To a process that is not heard, because it has not said hello here."""
MARKS: Final = Method("raft.marks", Marks, Empty, Role.NODE)
READMIT: Final = Method("raft.readmit", Readmit, ReadmitAnswer, Role.NODE)

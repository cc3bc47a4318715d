# idunno/coordinator/messages.py: calls about the cluster itself, and between a node and the coordinator's leader.
from __future__ import annotations

from typing import Any, Final

import msgspec

from idunno.base.ids import NodeId
from idunno.wire.calls import Empty, Method, Role

# -- node to leader ---------------------------------------------------------------------------------------------------


class Propose(msgspec.Struct, frozen=True):
    """A command (coordinator/commands.py, in MessagePack) on behalf of the call's actor, under a request id."""

    command: bytes
    request: str = ""


class Proposed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What apply returned, and on how many nodes the entry was synced when this left."""

    index: int
    copies: int
    result: Any = None  # plain MessagePack; the caller's side converts it to the result type of its command


class ReadIndex(msgspec.Struct, frozen=True):
    """Ask the leader for an index that is safe to read at (Raft thesis, 6.4)."""


class ReadIndexAnswer(msgspec.Struct, frozen=True):
    index: int
    term: int


PROPOSE: Final = Method("coordinator.propose", Propose, Proposed, Role.READER, also_changes=True)
READ_INDEX: Final = Method("coordinator.read-index", ReadIndex, ReadIndexAnswer, Role.READER)

# -- joining ----------------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True):
    """First word of somebody without a certificate. The answer is trusted only if the CA has the token's fingerprint."""


class HelloAnswer(msgspec.Struct, frozen=True):
    cluster: str
    ca_pem: bytes
    version: str
    succeeds: tuple[Succession, ...] = ()  # the clusters that this one was recovered from


class Succession(msgspec.Struct, frozen=True):
    """That a cluster was recovered as another one; signed with the old one's CA key, so that its nodes can believe it."""

    cluster: str
    successor: str
    ca_fingerprint: bytes  # of the successor's CA
    index: int  # the last entry that was found
    term: int
    at_ms: int
    signature: bytes = b""  # "": no survivor held the key


class Enroll(msgspec.Struct, frozen=True):
    """Ask for a certificate. `csr_pem` carries the key; the leader alone decides what the certificate says."""

    token: str  # the whole token, sent only after the server proved to belong to the token's CA
    csr_pem: bytes
    name: str
    node: NodeId | None = None  # set when a node joins
    address: str = ""
    slots: int = 1
    zone: str = ""
    software: str = ""


class EnrollAnswer(msgspec.Struct, frozen=True):
    cluster: str
    certificate_pem: bytes
    role: str
    name: str
    members: list[MemberAddress]
    cluster_key: bytes = b""  # for nodes


class MemberAddress(msgspec.Struct, frozen=True):
    node: NodeId
    name: str
    address: str
    fingerprint: bytes
    voter: bool = False


class KnownMembers(msgspec.Struct, frozen=True):
    """The members as the answering node knows them, with the fingerprints of their certificates."""

    members: list[MemberAddress]


class CheckAddress(msgspec.Struct, frozen=True):
    """Call back to the address a newcomer will advertise, where it listens for the nonce now, over TCP and UDP."""

    token: str
    address: str
    nonce: bytes


class CheckAddressAnswer(msgspec.Struct, frozen=True):
    """Why the address could not be reached; "" when it could."""

    tcp: str
    udp: str


HELLO: Final = Method("join.hello", Hello, HelloAnswer, Role.ANYONE)
ENROLL: Final = Method("join.enroll", Enroll, EnrollAnswer, Role.ANYONE)
CHECK_ADDRESS: Final = Method("join.check-address", CheckAddress, CheckAddressAnswer, Role.ANYONE)

# -- voting and leaving -----------------------------------------------------------------------------------------------


class CaKey(msgspec.Struct, frozen=True):
    """The CA's private key (PEM), from the leader to a node that is to vote."""

    key_pem: bytes


class LeaveNode(msgspec.Struct, frozen=True):
    """A node, by name or id, is to go for good: its copies are moved first."""

    node: str
    request: str


class RemoveDead(msgspec.Struct, frozen=True):
    """A node, by name or id, that does not come back."""

    node: str
    request: str


class GoneNode(msgspec.Struct, frozen=True):
    id: NodeId
    name: str
    text: str  # what was moved, and what may be done now


CA_KEY: Final = Method("coordinator.ca-key", CaKey, Empty, Role.NODE)
NODE_LEAVE: Final = Method("node.leave", LeaveNode, GoneNode, Role.ADMIN)
NODE_REMOVE: Final = Method("node.remove", RemoveDead, GoneNode, Role.ADMIN)
LEFT: Final = Method("node.left", Empty, Empty, Role.NODE)
"""From the leader to a node that is out of the roster, as the last word."""

# -- looking ----------------------------------------------------------------------------------------------------------


class Members(msgspec.Struct, frozen=True):
    pass


class Member(msgspec.Struct, frozen=True):
    name: str
    id: NodeId
    address: str
    state: str  # active | suspicious | failed | stopped | left
    role: str  # scheduler | worker
    incarnation: int
    version: str
    slots: int
    zone: str
    problem: str = ""  # not a failure, but worth mending: UDP blocked, a clock that is off


class MembersAnswer(msgspec.Struct, frozen=True):
    members: list[Member]


class MemberEvent(msgspec.Struct, frozen=True):
    """A change of a member's state, as the asked node saw it."""

    time: str
    event: str  # joined | left | stopped | suspicious | failed | refuted
    name: str
    id: NodeId
    reason: str
    accuser: str


class MemberEvents(msgspec.Struct, frozen=True):
    events: list[MemberEvent]  # oldest first; the newest 1,024


class Status(msgspec.Struct, frozen=True):
    own: bool = False  # only what the asked node knows itself: the leader is not asked to complete it


class StatusAnswer(msgspec.Struct, frozen=True):
    healthy: bool
    why: str  # what is wrong, "" when healthy
    cluster: str
    node: str  # who answered
    scheduler: str | None  # name of the leader
    term: int
    voters: list[str]
    learners: list[str]
    members: dict[str, int]  # state -> count
    applied: int
    commit: int
    files: int
    copies_missing: int
    models: dict[str, int]  # state -> count
    queue: dict[str, int]  # task state -> count, over unfinished jobs
    rates: dict[str, float]  # model -> queries/s
    lag: dict[str, int] = {}  # per voter and learner, entries behind; only the leader knows
    recovering: bool = False
    degraded: str = ""  # why answers leave with fewer copies than they should have; "" when they have them
    problem: str = ""  # why the asked node takes no part in the consensus, or what it waits for to do so
    machine_version: int = 0
    warnings: list[str] = []  # what does not make it unhealthy, but should be mended
    blocks_lost: list[str] = []  # blocks of files without a copy on a present node, the first 100; the leader knows
    disk_problems: dict[str, str] = {}  # node -> why it takes no blocks; the leader knows
    blocks_rotten: dict[str, int] = {}  # node -> blocks it found rotten or unreadable since its start; the leader knows
    loop_late: dict[str, int] = {}  # of the node asked: samples of its loop by how late it ran, by upper bound in ms


class Knows(msgspec.Struct, frozen=True):
    """What a node's own release is."""

    software: str
    supports: int  # the newest machine version it knows
    problem: str = ""  # why it takes no part in the consensus


class UpgradeNode(msgspec.Struct, frozen=True):
    name: str
    id: NodeId
    software: str
    supports: int  # 0: it does not say
    why: str  # what keeps it from the next version, "" when nothing does


class Upgrade(msgspec.Struct, frozen=True):
    """Raise the machine version to the newest that all nodes know; `check`: only say whether that can be."""

    check: bool
    request: str = ""


class UpgradeAnswer(msgspec.Struct, frozen=True):
    version: int  # the cluster's machine version, as it is now
    next: int  # the newest that any node knows
    ready: bool  # all nodes know it
    raised: bool  # by this request
    why: str  # what there is to do, or that there is nothing
    nodes: list[UpgradeNode]


KNOWS: Final = Method("node.knows", Empty, Knows, Role.NODE)
UPGRADE_CHECK: Final = Method("cluster.upgrade-check", Upgrade, UpgradeAnswer, Role.READER)
UPGRADE: Final = Method("cluster.upgrade", Upgrade, UpgradeAnswer, Role.ADMIN)
MEMBERS: Final = Method("cluster.members", Members, MembersAnswer, Role.READER)
MEMBER_EVENTS: Final = Method("cluster.member-events", Empty, MemberEvents, Role.READER)
KNOWN_MEMBERS: Final = Method("cluster.known-members", Empty, KnownMembers, Role.NODE)
STATUS: Final = Method("cluster.status", Status, StatusAnswer, Role.READER)

# -- backups ----------------------------------------------------------------------------------------------------------


class TakeBackup(msgspec.Struct, frozen=True):
    """The answer's stream: items whose notes are kinds of records (coordinator/backup.py), each with its payload or, of keys, a
    piece of it. Keys come as they are, for the asker to seal."""

    keys: bool = False


class BackupTaken(msgspec.Struct, frozen=True):
    cluster: str
    index: int
    files: int
    smalls_missing: int  # contents that no node had


TAKE_BACKUP: Final = Method("cluster.snapshot", TakeBackup, BackupTaken, Role.ADMIN)


class Dump(msgspec.Struct, frozen=True):
    """State for a bug report. The answer's stream: items with a DumpPart as note and a piece of that file as body."""

    own: bool = False  # only what the asked node itself has, without the machine


class DumpPart(msgspec.Struct, frozen=True):
    node: str  # its name
    file: str


class Dumped(msgspec.Struct, frozen=True):
    node: str  # who gathered
    nodes: list[str]  # who answered
    missing: dict[str, str]  # node -> why
    index: int = 0  # of the machine
    digest: str = ""  # of its stream, in hex
    complete: bool = False  # False: it was cut at its bound


DUMP: Final = Method("cluster.dump", Dump, Dumped, Role.ADMIN)

# -- tokens and users -------------------------------------------------------------------------------------------------


class NewToken(msgspec.Struct, frozen=True):
    role: str
    ttl_s: int
    request: str


class NewTokenAnswer(msgspec.Struct, frozen=True):
    id: str
    token: str  # shown once; only its hash is stored
    role: str
    expires: str


class TokenRow(msgspec.Struct, frozen=True):
    id: str
    role: str
    expires: str
    created_by: str
    state: str  # valid | expired | revoked


class TokenRows(msgspec.Struct, frozen=True):
    tokens: list[TokenRow]


class ById(msgspec.Struct, frozen=True):
    id: str
    request: str


class UserRow(msgspec.Struct, frozen=True):
    name: str
    role: str
    since: str
    state: str = "valid"  # valid | revoked


class UserRows(msgspec.Struct, frozen=True):
    users: list[UserRow]


TOKEN_NEW: Final = Method("token.new", NewToken, NewTokenAnswer, Role.ADMIN)
TOKEN_LIST: Final = Method("token.ls", Empty, TokenRows, Role.ADMIN)
TOKEN_REVOKE: Final = Method("token.revoke", ById, Empty, Role.ADMIN)
USERS: Final = Method("users.ls", Empty, UserRows, Role.ADMIN)
USER_REVOKE: Final = Method("users.revoke", ById, Empty, Role.ADMIN)

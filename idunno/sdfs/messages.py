# idunno/sdfs/messages.py: calls of the file store.
#
# `file.*` is what clients ask of any node; `block.*` moves content; `locate` and `inventory` pass between nodes and the leader.
from __future__ import annotations

from typing import Final

import msgspec

from idunno.base.ids import BlockId, NodeId
from idunno.wire.calls import Empty, Method, Role


class BlockRef(msgspec.Struct, frozen=True):
    block: BlockId
    size: int


class Replica(msgspec.Struct, frozen=True):
    node: NodeId
    name: str


# -- writing ----------------------------------------------------------------------------------------------------------


class Begin(msgspec.Struct, frozen=True):
    """Open a put. The put's id is the request id: a retry opens it again or finds the version that it made."""

    put: str
    name: str
    if_version: int | None = None
    size: int | None = None  # a hint for placement, None when unknown
    system: bool = False  # a task's output, a job's input: below .idunno/
    claimed: list[BlockCopies] = []  # blocks of this put whose commit was refused: who of these holders has them?


class BeginAnswer(msgspec.Struct, frozen=True):
    quorum: int  # synced copies that a block needs before commit: min(4, present)
    replicas: list[
        Replica
    ]  # in chain order; placement for this put's blocks, the entry node first when it can hold them
    spares: list[Replica]  # who may stand in for one that fails, best first
    term: int
    committed: FileInfo | None = None  # set when this put was committed already
    left_out: list[str] = []  # nodes that cannot take blocks, each with the reason
    proven: list[BlockCopies] = []  # of those claimed, as the nodes say themselves


class WriteBlock(msgspec.Struct, frozen=True):
    """Stream one block's bytes (items in order). The receiver stores it if its node is in `chain` and passes it on to
    the rest of the chain while it receives."""

    put: str
    block: BlockId
    size: int
    chain: list[NodeId]
    term: int
    whole: bool = False  # set by entry nodes: nobody "has it already", for the sender must show that he has its bytes


class CopyFailure(msgspec.Struct, frozen=True):
    node: NodeId
    error: str
    reached: bool = True  # False: the block never got to it, because one before it in the chain failed


class WriteBlockAnswer(msgspec.Struct, frozen=True):
    stored: list[NodeId]  # synced and verified there
    failed: list[CopyFailure]


class HaveBlock(msgspec.Struct, frozen=True):
    """Whether the node holds the block, synced and re-hashed: answered for the node itself only. With a put it is pinned for
    that; with a term (the leader's, before it trims) one older than the node has seen is refused."""

    block: BlockId
    put: str
    term: int = 0


class HaveBlockAnswer(msgspec.Struct, frozen=True):
    have: bool


class Attest(msgspec.Struct, frozen=True):
    """Which of these blocks the node has stored for that put."""

    put: str
    blocks: list[BlockId]


class AttestAnswer(msgspec.Struct, frozen=True):
    sizes: list[int]
    """Of the first of them, in order: as many as were looked at. 0: the node does not have it."""


class BlockCopies(msgspec.Struct, frozen=True):
    block: BlockId
    size: int
    nodes: list[NodeId]


class Commit(msgspec.Struct, frozen=True):
    put: str
    name: str
    size: int
    blocks: list[BlockCopies]
    write_quorum: int | None = None
    if_version: int | None = None


class PutSmallFile(msgspec.Struct, frozen=True):
    """The content is the call's body, at most SMALL_BYTES_MAX."""

    put: str
    name: str
    if_version: int | None = None
    write_quorum: int | None = None
    system: bool = False


class PutAnswer(msgspec.Struct, frozen=True):
    name: str
    version: int
    size: int
    blocks: int
    replicas: list[str]  # node names
    degraded: bool
    copies: int
    why: str = ""


class Abort(msgspec.Struct, frozen=True):
    put: str
    reason: str


# -- reading ----------------------------------------------------------------------------------------------------------


class Stat(msgspec.Struct, frozen=True):
    """Ask for versions: the latest, `version`, the one current at `as_of_ms`, or the `last` k (newest first, at most
    1,000; these come without blocks and content: ask for each by itself)."""

    name: str
    version: int | None = None
    as_of_ms: int | None = None
    last: int | None = None


class FileInfo(msgspec.Struct, frozen=True):
    """One version. `content` is set for a small file: its bytes, read from the small-block store and verified."""

    name: str
    version: int
    size: int
    created: str  # ISO 8601, UTC
    owner: str
    blocks: list[BlockCopies] = []
    content: bytes | None = None


class StatAnswer(msgspec.Struct, frozen=True):
    versions: list[FileInfo]


class ReadBlock(msgspec.Struct, frozen=True):
    """Stream [offset, offset + length) of a block: from the node's own disk, or from those in `relay`, in that order (the
    node asks the leader when it is empty). The first item of each source has the source's node id as its note."""

    block: BlockId
    offset: int
    length: int
    relay: list[NodeId] = []
    exclude: list[NodeId] = []  # not from these: what they sent was not the block
    local_only: bool = False  # from its own disk or not at all: what a relaying node asks


class List(msgspec.Struct, frozen=True):
    prefix: str = ""
    after: str = ""  # names greater than this: for paging
    limit: int = 1000
    system: bool = False
    long: bool = False


class ListRow(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    version: int
    size: int
    created: str
    versions: int = 0  # the rest only in a long listing: how many there are,
    logical: int = 0  # their bytes together,
    stored: int = 0  # and the bytes of one copy of their distinct blocks


class ListAnswer(msgspec.Struct, frozen=True):
    files: list[ListRow]
    more: bool


class ByName(msgspec.Struct, frozen=True):
    name: str


class VersionRow(msgspec.Struct, frozen=True):
    version: int
    size: int
    created: str
    replicas: list[str]


class VersionsAnswer(msgspec.Struct, frozen=True):
    versions: list[VersionRow]  # newest first
    more: bool = False  # there are older ones


class WhereBlock(msgspec.Struct, frozen=True):
    block: BlockId
    size: int
    nodes: list[str]


class WhereAnswer(msgspec.Struct, frozen=True):
    name: str
    version: int
    copies_wanted: int
    copies_found: int  # of the block that has fewest
    blocks: list[WhereBlock]
    more: bool = False  # only the first 1,000 blocks are listed
    recovering: bool = False  # a new leader has not heard from every node yet: there may be more copies than found


class Store(msgspec.Struct, frozen=True):
    node: str = ""  # a node's name or id; "" the one asked
    after: str = ""  # names greater than this: for paging
    limit: int = 1000


class StoreRow(msgspec.Struct, frozen=True):
    name: str
    version: int
    size: int


class StoreAnswer(msgspec.Struct, frozen=True):
    node: str
    files: list[StoreRow]
    more: bool = False
    next: str = ""  # when there is more: `after` of the next page


class Delete(msgspec.Struct, frozen=True):
    name: str
    request: str


class DeleteAnswer(msgspec.Struct, frozen=True):
    name: str
    versions: int


# -- between nodes ----------------------------------------------------------------------------------------------------


class Place(msgspec.Struct, frozen=True):
    """Ask the leader where the blocks of a put are to go."""

    put: str
    entry: NodeId  # the client's own node, or the one it talks to
    size: int | None = None  # of the whole file, as far as known


class PlaceAnswer(msgspec.Struct, frozen=True):
    quorum: int
    replicas: list[Replica]
    spares: list[Replica]
    term: int
    left_out: list[str] = []


class Copied(msgspec.Struct, frozen=True):
    """Tell the leader which nodes have synced the blocks of a committed version. A hint: lost ones come by inventory."""

    blocks: list[BlockCopies]
    term: int


class Locate(msgspec.Struct, frozen=True):
    blocks: list[BlockId]


class LocateAnswer(msgspec.Struct, frozen=True):
    nodes: list[list[NodeId]]  # in the order asked
    recovering: bool  # not every present node has reported to this leader yet


class Inventory(msgspec.Struct, frozen=True):
    """A page of what a node holds, sent to the leader: everything after its election or the node's start, then changes."""

    node: NodeId
    term: int
    added: list[BlockId]
    removed: list[BlockId] = []
    first: bool = False  # begins a full report: forget what was known of this node
    last: bool = False  # ends it
    free_bytes: int = 0
    total_bytes: int = 0
    problem: str = ""  # why the node takes no blocks at all now: its disk fails
    rotten: int = 0  # blocks that it found rotten or unreadable since its start
    floor_bytes: int = -1
    """What it keeps free, a setting of its own; -1: not said (an older release), then the leader's counts."""


class Copy(msgspec.Struct, frozen=True):
    """The leader's order: become a holder of the block, from one of these, in that order."""

    block: BlockId
    size: int
    sources: list[NodeId]
    term: int


class CopyAnswer(msgspec.Struct, frozen=True):
    """`made`: it is verified and synced here. `lacking`: sources that have it not, or not as its name says."""

    made: bool
    lacking: list[NodeId] = []
    why: str = ""


class Drop(msgspec.Struct, frozen=True):
    """The leader's order: stop holding the block, others have it."""

    block: BlockId
    term: int


class Repair(msgspec.Struct, frozen=True):
    """How far the file store is from four copies of everything."""


class StoreNode(msgspec.Struct, frozen=True):
    node: str
    presence: str
    blocks: int
    free_bytes: int
    rotten: int
    problem: str = ""


class RepairAnswer(msgspec.Struct, frozen=True):
    blocks: int  # below their copies
    copies: int  # that are missing in all
    bytes: int  # that have to be copied
    seconds: float | None  # about; None when nothing has been copied lately to tell by
    running: int  # copies being made now
    surplus: int  # blocks with more copies than wanted
    recovering: bool
    lost: list[BlockId]  # no copy is left on a present node; the first 100
    lost_blocks: int
    lost_files: list[str]  # files that refer to these; the first 100
    waiting_for: list[str]  # stopped nodes that are expected back
    nodes: list[StoreNode]
    begins_s: float = 0.0  # until the next copy is begun, when all that are left wait; else 0


class Scrub(msgspec.Struct, frozen=True):
    """Read all blocks again from end to end, now. `node`: a name or id; "" all of them."""

    node: str = ""


class ScrubAnswer(msgspec.Struct, frozen=True):
    nodes: list[str]  # that have begun
    failed: list[str] = []


# -- retention and trash ----------------------------------------------------------------------------------------------


class Retain(msgspec.Struct, frozen=True):
    """Set how many versions below the prefix are kept and how long superseded ones; `show` changes nothing."""

    prefix: str
    request: str
    versions: int = 0
    age_ms: int = 0
    show: bool = False


class RetainRow(msgspec.Struct, frozen=True):
    prefix: str
    owner: str  # whose files; "" everybody's
    versions: int
    age_ms: int


class RetainAnswer(msgspec.Struct, frozen=True):
    """The rules that can matter below the prefix: those below it and those above it."""

    rules: list[RetainRow]


class ListTrash(msgspec.Struct, frozen=True):
    prefix: str = ""
    after: int = 0  # entries after this one: for paging
    limit: int = 1000


class TrashRow(msgspec.Struct, frozen=True):
    entry: int
    name: str
    versions: list[int]  # the last 100
    size: int  # of all of them together
    deleted: str
    by: str
    expired: bool
    purged: str  # when it will be


class TrashAnswer(msgspec.Struct, frozen=True):
    entries: list[TrashRow]
    more: bool = False


class RestoreFile(msgspec.Struct, frozen=True):
    name: str
    request: str


class RestoreAnswer(msgspec.Struct, frozen=True):
    name: str
    versions: int


class EmptyTrash(msgspec.Struct, frozen=True):
    """Purge what the caller owns below the prefix, now, behind entry `after`: those before it were looked at already."""

    prefix: str
    request: str
    after: int = 0


class EmptyTrashAnswer(msgspec.Struct, frozen=True):
    versions: int
    size: int
    more: bool = False  # ask again, after `last`
    last: int = 0  # the last entry that was looked at


BEGIN: Final = Method("file.begin", Begin, BeginAnswer, Role.USER)
WRITE_BLOCK: Final = Method("block.write", WriteBlock, WriteBlockAnswer, Role.USER)
HAVE_BLOCK: Final = Method("block.have", HaveBlock, HaveBlockAnswer, Role.NODE)
ATTEST: Final = Method("block.attest", Attest, AttestAnswer, Role.NODE)
COMMIT: Final = Method("file.commit", Commit, PutAnswer, Role.USER)
PUT_SMALL: Final = Method("file.put-small", PutSmallFile, PutAnswer, Role.USER)
ABORT: Final = Method("file.abort", Abort, Empty, Role.USER)
STAT: Final = Method("file.stat", Stat, StatAnswer, Role.READER)
READ_BLOCK: Final = Method("block.read", ReadBlock, Empty, Role.READER)
LIST: Final = Method("file.ls", List, ListAnswer, Role.READER)
VERSIONS: Final = Method("file.versions", ByName, VersionsAnswer, Role.READER)
WHERE: Final = Method("file.where", ByName, WhereAnswer, Role.READER)
STORE: Final = Method("file.store", Store, StoreAnswer, Role.READER)
DELETE: Final = Method("file.delete", Delete, DeleteAnswer, Role.USER)
PLACE: Final = Method("sdfs.place", Place, PlaceAnswer, Role.NODE)
COPIED: Final = Method("sdfs.copied", Copied, Empty, Role.NODE)
LOCATE: Final = Method("sdfs.locate", Locate, LocateAnswer, Role.NODE)
INVENTORY: Final = Method("sdfs.inventory", Inventory, Empty, Role.NODE)
COPY: Final = Method("sdfs.copy", Copy, CopyAnswer, Role.NODE)
DROP: Final = Method("sdfs.drop", Drop, Empty, Role.NODE)
REPAIR: Final = Method("sdfs.repair", Repair, RepairAnswer, Role.READER)
SCRUB: Final = Method("sdfs.scrub", Scrub, ScrubAnswer, Role.ADMIN)
RETAIN: Final = Method("file.retain", Retain, RetainAnswer, Role.READER, also_changes=True)
LIST_TRASH: Final = Method("file.trash", ListTrash, TrashAnswer, Role.READER)
RESTORE: Final = Method("file.restore", RestoreFile, RestoreAnswer, Role.USER)
EMPTY_TRASH: Final = Method("file.empty-trash", EmptyTrash, EmptyTrashAnswer, Role.USER)

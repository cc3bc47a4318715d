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


class BeginAnswer(msgspec.Struct, frozen=True):
    quorum: int  # synced copies that a block needs before commit: min(4, present)
    replicas: list[
        Replica
    ]  # in chain order; placement for this put's blocks, the entry node first when it can hold them
    spares: list[Replica]  # who may stand in for one that fails, best first
    term: int
    committed: FileInfo | None = None  # set when this put was committed already
    left_out: list[str] = []  # nodes that cannot take blocks, each with the reason


class WriteBlock(msgspec.Struct, frozen=True):
    """Stream one block's bytes (items in order). The receiver stores it if its node is in `chain` and passes it on to
    the rest of the chain while it receives."""

    put: str
    block: BlockId
    size: int
    chain: list[NodeId]
    term: int


class CopyFailure(msgspec.Struct, frozen=True):
    node: NodeId
    error: str
    reached: bool = True  # False: the block never got to it, because one before it in the chain failed


class WriteBlockAnswer(msgspec.Struct, frozen=True):
    stored: list[NodeId]  # synced and verified there
    failed: list[CopyFailure]


class HaveBlock(msgspec.Struct, frozen=True):
    """Whether the nodes hold the block, synced and re-hashed: answered for the node itself only."""

    block: BlockId
    put: str


class HaveBlockAnswer(msgspec.Struct, frozen=True):
    have: bool


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


class ListRow(msgspec.Struct, frozen=True):
    name: str
    version: int
    size: int
    created: str


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


BEGIN: Final = Method("file.begin", Begin, BeginAnswer, Role.USER)
WRITE_BLOCK: Final = Method("block.write", WriteBlock, WriteBlockAnswer, Role.USER)
HAVE_BLOCK: Final = Method("block.have", HaveBlock, HaveBlockAnswer, Role.NODE)
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

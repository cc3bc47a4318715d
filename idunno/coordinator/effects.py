# idunno/coordinator/effects.py: what an applied command means to the soft parts of a node.
#
# Rule 1: effects are told, never asked: the small-block store, the scheduler, the locator and the node's own settings follow
#         the machine by them and need not scan it.
# Rule 2: they come from every node's machine alike; who acts on them (only the leader, only this node) is the follower's choice.
# Rule 3: a restart replays the log, so an effect may be seen again: followers must take it twice without harm.
from __future__ import annotations

from typing import TypeAlias

import msgspec

from idunno.base.ids import BlockId, Index
from idunno.coordinator.records import Block, VersionRecord


class _Effect(msgspec.Struct, frozen=True, gc=False):
    """Made for every entry: a Struct costs a quarter of a frozen dataclass."""


class RosterChanged(_Effect, frozen=True):
    """A node, its presence or address, a user or the cluster's key changed: identities, peers and reply rule follow."""


class KeepSmall(_Effect, frozen=True):
    """Keep this content in the node's small-block store: the machine holds only its name."""

    block: BlockId
    content: bytes


class VersionMade(_Effect, frozen=True):
    name: str
    version: int
    blocks: tuple[Block, ...]


class FileDeleted(_Effect, frozen=True):
    """A file is gone with all of its versions: into the trash, or, below .idunno/, for good. What becomes of their blocks is
    told by BlocksFreed."""

    name: str
    versions: tuple[VersionRecord, ...]


class BlocksFreed(_Effect, frozen=True):
    """Nothing refers to these blocks any more. They may still be pinned by open puts."""

    blocks: tuple[BlockId, ...]


class RetentionChanged(_Effect, frozen=True):
    """A retention rule was set or removed."""


class ModelChanged(_Effect, frozen=True):
    """A model's record changed, or the model was undeployed and is gone."""

    model: str


class JobChanged(_Effect, frozen=True):
    """A job's state, counts or tasks changed, or it was forgotten and is gone."""

    job: str
    task: int | None = None  # an attempt of this one ended (PLANNING: of counting its queries)


class JobsReplaced(_Effect, frozen=True):
    """A snapshot's machine took the place of this one: each job may be as it never was before, or gone."""


class TaskCompleted(_Effect, frozen=True):
    """For rates: so many queries of a model were answered at this machine time."""

    job: str
    task: int
    model: str
    queries: int
    at_ms: int


class DigestDue(_Effect, frozen=True):
    """The machine as it is now is to be digested."""


class DigestTold(_Effect, frozen=True):
    """What the digest behind entry `of` is."""

    of: Index
    digest: bytes


Effect: TypeAlias = (
    RosterChanged
    | KeepSmall
    | VersionMade
    | FileDeleted
    | BlocksFreed
    | RetentionChanged
    | ModelChanged
    | JobChanged
    | JobsReplaced
    | TaskCompleted
    | DigestDue
    | DigestTold
)

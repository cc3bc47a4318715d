# idunno/coordinator/records.py: the records that the replicated machine holds, as they stand in commands and snapshots.
#
# Rule 1: these types are the format of the log and of snapshots: a field is never renamed or given another meaning;
#         a new one comes with a default and a raised machine version. Unknown fields are an error here, unlike in RPC.
# Rule 2: whole numbers, text, bytes and lists of them. No floats, no sets; times are machine time in ms since 1970.
from __future__ import annotations

from typing import Final

import msgspec

from idunno.base.ids import BlockId, NodeId

MACHINE_VERSION: Final = 3
"""The newest that this release knows. What an entry of the log may say follows the cluster's own (roster.machine_version), which
`idunno upgrade` raises when all nodes know the next."""
BLOCK_BYTES_MAX: Final = 8 * 1024 * 1024
SMALL_BYTES_MAX: Final = 4 * 1024
"""Contents up to this size ride in the command itself (design.md, section 7)."""
COPIES_WANTED: Final = 4
"""Three simultaneous losses leave one copy (design.md, section 2)."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Base of everything that stands in the log or a snapshot. Records hold no cycles, so the collector skips them."""


class NodeRecord(Record, frozen=True):
    node: NodeId
    name: str
    address: str  # HOST:PORT, TCP and UDP alike, as advertised
    fingerprint: bytes  # SHA-256 of the node's certificate (DER)
    presence: str = "present"  # present | failed | stopped
    boot: int = 0
    voter: bool = False
    slots: int = 1  # models' tasks that run at once
    zone: str = ""
    software: str = ""  # the idunno version it runs
    since_ms: int = 0  # of the presence
    reason: str = ""
    key: bytes = b""  # SHA-256 of its public key (SPKI, DER): the same key may enrol again and gets the same answer
    certificate: bytes = b""  # PEM, that answer


class UserRecord(Record, frozen=True):
    name: str
    role: str  # admin | user | reader
    fingerprint: bytes
    since_ms: int = 0
    key: bytes = b""  # as in NodeRecord
    certificate: bytes = b""


class TokenRecord(Record, frozen=True):
    token: str  # its public id
    role: str  # node | admin | user | reader
    secret_hash: bytes  # SHA-256 of the secret (which is 32 random bytes)
    expires_ms: int
    created_by: str = ""
    revoked: bool = False


class Block(Record, frozen=True):
    block: BlockId
    size: int


class VersionRecord(Record, frozen=True):
    """One version of a file. A small one has a single block, kept in every node's small-block store."""

    version: int
    size: int
    blocks: tuple[Block, ...]
    created_ms: int
    owner: str
    request: str  # the put that made it: a retry finds it here
    small: bool = False


class OpenPut(Record, frozen=True):
    put: str  # the request id of the put
    name: str
    owner: str
    started_ms: int
    if_version: int | None = None
    node: NodeId | None = None  # the node a system put (a task's output) comes from


class ModelFile(Record, frozen=True):
    """A file of a model: its path within the model and the SDFS version that holds it (the blocks are pinned by it)."""

    path: str
    name: str
    version: int
    size: int
    blocks: tuple[Block, ...]


class WorkerRecord(Record, frozen=True):
    """A node's part in serving a model."""

    node: NodeId
    state: str  # assigned | ready | failed
    since_ms: int
    error: str = ""


class ModelRecord(Record, frozen=True):
    model: str
    version: int
    owner: str
    runtime: str  # onnx
    files: tuple[ModelFile, ...]
    workers_wanted: int  # 0: every worker
    batch_size: int  # queries a task; 0: chosen from the measured cost
    weight: int  # thousandths
    workers_min: int
    workers_max: int  # 0: no bound
    state: str  # undeployed | deployed | failed
    created_ms: int
    request: str
    workers: tuple[WorkerRecord, ...] = ()
    failures: tuple[str, ...] = ()  # the reasons of workers that could not set it up, at most FAILURES_KEPT
    reason: str = ""


class Output(Record, frozen=True):
    """Where a task's output is. `small` as in VersionRecord."""

    name: str
    size: int
    blocks: tuple[Block, ...]
    small: bool = False


class Attempt(Record, frozen=True):
    node: NodeId
    error: str


class TaskRecord(Record, frozen=True):
    task: int
    first: int  # queries [first, last) of the job's input, in input order
    last: int
    state: str  # ready | success | failed ("waiting" is a lease on a ready one, and not in the log)
    attempts: tuple[Attempt, ...] = ()  # those that ended without a result
    output: Output | None = None
    done: int = 0  # queries answered with an output
    errors: int = 0  # queries answered with an error of their own
    node: NodeId | None = None  # who completed it


class JobRecord(Record, frozen=True):
    job: str
    client: str
    model: str
    model_version: int
    input_name: str
    input_version: int
    input_size: int
    input_kind: str  # how the input's bytes are to be read: see worker/data.py
    input_blocks: tuple[Block, ...]
    input_small: bool
    batch_size: int
    state: str  # planning | running | success | failed | cancelled
    submitted_ms: int
    queries: int = 0
    finished_ms: int = 0
    reason: str = ""
    plan_attempts: tuple[Attempt, ...] = ()


class Timing(Record, frozen=True):
    """Processing times of queries, in whole microseconds, as counts in buckets that grow by 5 % (coordinator/timing.py)."""

    count: int = 0
    sum_us: int = 0
    sum_squares_us2: int = 0
    buckets: tuple[tuple[int, int], ...] = ()  # (bucket number, count), rising

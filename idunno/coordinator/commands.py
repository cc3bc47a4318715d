# idunno/coordinator/commands.py: everything that may be written into the replicated log.
#
# Rule 1: a log entry is one Entry in MessagePack, or empty (a leader's no-op). Its format carries a version.
# Rule 2: a command names all that decides its effect. The leader's choices (replicas, workers, task sizes) are made before
#         and stand in it; apply never chooses.
# Rule 3: unknown commands and unknown fields are an error that stops the node's machine: it is older than its log.
from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec

from idunno.base.errors import DecodeError
from idunno.base.ids import BlockId, NodeId
from idunno.coordinator.records import Block, ModelFile, NodeRecord, Record, Timing, TokenRecord, UserRecord

FORMAT: Final = 1


# -- roster -----------------------------------------------------------------------------------------------------------


class Genesis(Record, frozen=True, tag="genesis"):
    """Entry 1 of every log: the same bytes at every first voter."""

    cluster: str  # 32 hex digits
    nodes: tuple[NodeRecord, ...]
    cluster_key: bytes  # 32 bytes: seals datagrams
    tokens: tuple[TokenRecord, ...] = ()
    machine_version: int = 1


class AddNode(Record, frozen=True, tag="add-node"):
    node: NodeRecord
    token: str


class UpdateNode(Record, frozen=True, tag="update-node"):
    """What a node says of itself at each start: always its own node id as actor."""

    node: NodeId
    address: str
    boot: int
    slots: int
    zone: str
    software: str


class SetPresence(Record, frozen=True, tag="set-presence"):
    node: NodeId
    presence: str
    boot: int  # of the process it is about: a verdict on an older one changes nothing
    reason: str


class RemoveNode(Record, frozen=True, tag="remove-node"):
    """It is out for good: id and certificate never count again. It must not be a voter any more."""

    node: NodeId


class RenewClusterKey(Record, frozen=True, tag="renew-cluster-key"):
    """Seals datagrams from now on, beside the old one for a minute. In an entry of its own, behind that which took a node out
    of the roster: the node may still get that one."""

    cluster_key: bytes  # 32 bytes


class AddUser(Record, frozen=True, tag="add-user"):
    user: UserRecord
    token: str


class RevokeUser(Record, frozen=True, tag="revoke-user"):
    name: str


class AddToken(Record, frozen=True, tag="add-token"):
    token: TokenRecord


class RevokeToken(Record, frozen=True, tag="revoke-token"):
    token: str


class RaiseVersion(Record, frozen=True, tag="raise-version"):
    """From now on entries may be of this machine version: all nodes know it. Who does not stops here."""

    version: int


class TakeDigest(Record, frozen=True, tag="take-digest"):
    """Every node takes the digest of its machine as it is behind this entry."""


class ConfirmDigest(Record, frozen=True, tag="confirm-digest"):
    """What the digest of the machine behind entry `index` is. A node that has another one is not to be trusted."""

    index: int
    digest: bytes  # 32 bytes


# -- namespace --------------------------------------------------------------------------------------------------------


class BeginPut(Record, frozen=True, tag="begin-put"):
    put: str
    name: str
    if_version: int | None = None  # the file's current version must be this one; 0: there must be none
    node: NodeId | None = None


class CommitPut(Record, frozen=True, tag="commit-put"):
    put: str
    name: str
    size: int
    blocks: tuple[Block, ...]


class AbortPut(Record, frozen=True, tag="abort-put"):
    put: str
    reason: str


class PutSmall(Record, frozen=True, tag="put-small"):
    put: str
    name: str
    block: BlockId
    content: bytes
    if_version: int | None = None


class DeleteFile(Record, frozen=True, tag="delete-file"):
    """All versions go into the trash; those of the system's own names are gone at once."""

    name: str


class SetRetention(Record, frozen=True, tag="set-retention"):
    """A user's rule is for his own files, an admin's for everybody's. Both limits 0: there is no rule any more."""

    prefix: str
    versions: int = 0
    age_ms: int = 0


class Expire(Record, frozen=True, tag="expire"):
    """These versions of the file go into the trash, but for the current one."""

    name: str
    versions: tuple[int, ...]


class RestoreTrash(Record, frozen=True, tag="restore-trash"):
    """What the trash holds of the file is part of it again."""

    name: str


class Purge(Record, frozen=True, tag="purge"):
    """These entries of the trash are gone for good."""

    entries: tuple[int, ...]


# -- registry ---------------------------------------------------------------------------------------------------------


class Deploy(Record, frozen=True, tag="deploy"):
    model: str
    runtime: str
    files: tuple[ModelFile, ...]
    workers_wanted: int
    batch_size: int
    weight: int
    workers_min: int
    workers_max: int
    assign: tuple[NodeId, ...]  # the first workers


class Undeploy(Record, frozen=True, tag="undeploy"):
    model: str


class Assign(Record, frozen=True, tag="assign"):
    model: str
    version: int
    node: NodeId
    reason: str


class Unassign(Record, frozen=True, tag="unassign"):
    model: str
    version: int
    node: NodeId
    reason: str


class ReportWorker(Record, frozen=True, tag="report-worker"):
    """A worker says that it is ready, or why it cannot be."""

    model: str
    version: int
    node: NodeId
    error: str = ""  # "" means ready


class SetBatchSize(Record, frozen=True, tag="set-batch-size"):
    model: str
    batch_size: int


# -- ledger -----------------------------------------------------------------------------------------------------------


class SubmitJob(Record, frozen=True, tag="submit-job"):
    job: str
    model: str
    input_name: str
    input_version: int
    input_kind: str
    batch_size: int = 0  # 0: the model's


class PlanJob(Record, frozen=True, tag="plan-job"):
    """How many queries the input has (a worker's child counted them), and how they are cut."""

    job: str
    queries: int
    task_queries: int


class CompleteTask(Record, frozen=True, tag="complete-task"):
    """One command makes the output file and sets Success. A second completion of the task changes nothing."""

    job: str
    task: int
    node: NodeId
    put: str  # the open put of the output's blocks; "" when the output rides here in `content`
    size: int
    blocks: tuple[Block, ...]
    content: bytes
    done: int
    errors: int
    timing: Timing


class FailAttempt(Record, frozen=True, tag="fail-attempt"):
    """An attempt ended without a result. task -1 is the planning of the job. `fatal` says that no retry can help."""

    job: str
    task: int
    node: NodeId
    attempt: int  # how many attempts had ended before it: a report that comes twice counts once
    error: str
    fatal: bool = False


class CancelJob(Record, frozen=True, tag="cancel-job"):
    job: str


class ForgetJob(Record, frozen=True, tag="forget-job"):
    job: str


Command: TypeAlias = (
    Genesis
    | AddNode
    | UpdateNode
    | SetPresence
    | RemoveNode
    | RenewClusterKey
    | RaiseVersion
    | TakeDigest
    | ConfirmDigest
    | AddUser
    | RevokeUser
    | AddToken
    | RevokeToken
    | BeginPut
    | CommitPut
    | AbortPut
    | PutSmall
    | DeleteFile
    | Deploy
    | Undeploy
    | Assign
    | Unassign
    | ReportWorker
    | SetBatchSize
    | SubmitJob
    | PlanJob
    | CompleteTask
    | FailAttempt
    | CancelJob
    | ForgetJob
    | SetRetention
    | Expire
    | RestoreTrash
    | Purge
)


SINCE: Final[dict[type[Any], int]] = {RaiseVersion: 2, TakeDigest: 2, ConfirmDigest: 2}
"""The machine version that brought a command; all others were there from the beginning. A machine that knows fewer stops at it,
and until the cluster's version is raised it is refused by all alike; RaiseVersion itself is what raises it.

A command that does something else than it did is a new version too: what it did stays for clusters whose version is older."""


class Entry(Record, frozen=True):
    """A log entry's payload."""

    format: int
    stamp_ms: int  # the leader's clock when it was proposed; machine time never goes back because of it
    actor: str
    role: str
    request: str  # the request id, "" for the system's own
    command: Command


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Entry)
_COMMAND_DECODER: Final = msgspec.msgpack.Decoder(Command)


def encode_command(command: Command) -> bytes:
    return _ENCODER.encode(command)


def decode_command(payload: bytes | memoryview) -> Command:
    """The command that a node forwards to the leader. Raises DecodeError for anything else."""
    try:
        command: Any = _COMMAND_DECODER.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"command of {len(payload)} bytes is not one this version knows: {error}") from error
    return command  # type: ignore[no-any-return]


def encode_entry(entry: Entry) -> bytes:
    return _ENCODER.encode(entry)


def decode_entry(payload: bytes | memoryview) -> Entry:
    """The entry in `payload`. Raises DecodeError for anything this version does not know to the last field."""
    try:
        entry: Any = _DECODER.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"log entry of {len(payload)} bytes is not one this version knows: {error}") from error
    if entry.format != FORMAT:
        raise DecodeError(f"log entry has format {entry.format}, this version reads {FORMAT}")
    return entry  # type: ignore[no-any-return]

# idunno/coordinator/results.py: what each command returns when it was applied.
#
# Rule 1: a result names what the request made, so a retry gets the same words as the first try.
# Rule 2: results cross the wire as plain MessagePack inside Proposed; `convert` gives the type back by the command's type.
from __future__ import annotations

from typing import Any, Final

import msgspec

from idunno.base.errors import DecodeError
from idunno.coordinator import commands
from idunno.coordinator.records import NodeRecord, UserRecord, VersionRecord


class Done(msgspec.Struct, frozen=True):
    """It holds now. `changed` is False when it held before: a retry, or an order that came late."""

    changed: bool = True


class NodeAdded(msgspec.Struct, frozen=True):
    """`node` as the roster holds it: at a repeated enrolment the first one, with the first certificate."""

    node: NodeRecord
    changed: bool = True


class UserAdded(msgspec.Struct, frozen=True):
    user: UserRecord
    changed: bool = True


class PutOpen(msgspec.Struct, frozen=True):
    """The put is open, or `committed` is the version that it made (without blocks when that was deleted since)."""

    put: str
    name: str
    committed: VersionRecord | None = None


class PutDone(msgspec.Struct, frozen=True):
    name: str
    version: int
    size: int
    created_ms: int


class FileGone(msgspec.Struct, frozen=True):
    name: str
    versions: int


class Restored(msgspec.Struct, frozen=True):
    """`versions`: how many came back; 0 when this very request brought them back before."""

    name: str
    versions: int
    changed: bool = True


class Purged(msgspec.Struct, frozen=True):
    """What is gone; entries that were not there any more are not counted."""

    versions: int
    size: int
    changed: bool = True


class ModelResult(msgspec.Struct, frozen=True):
    model: str
    version: int
    state: str
    changed: bool = True


class JobResult(msgspec.Struct, frozen=True):
    job: str
    state: str
    changed: bool = True


class TaskResult(msgspec.Struct, frozen=True):
    """What became of a completion or of a failed attempt.

    `counted`: it changed the task. `duplicate`: the task had its result already. `why`: why it was not counted.
    """

    job: str
    task: int
    state: str  # of the task: ready | success | failed; "" when the job is gone
    counted: bool
    duplicate: bool = False
    why: str = ""


TYPES: Final[dict[type[Any], type[msgspec.Struct]]] = {
    commands.Genesis: Done,
    commands.AddNode: NodeAdded,
    commands.UpdateNode: Done,
    commands.SetPresence: Done,
    commands.RaiseVersion: Done,
    commands.TakeDigest: Done,
    commands.ConfirmDigest: Done,
    commands.AddUser: UserAdded,
    commands.RevokeUser: Done,
    commands.AddToken: Done,
    commands.RevokeToken: Done,
    commands.BeginPut: PutOpen,
    commands.CommitPut: PutDone,
    commands.AbortPut: Done,
    commands.PutSmall: PutDone,
    commands.DeleteFile: FileGone,
    commands.Deploy: ModelResult,
    commands.Undeploy: Done,
    commands.Assign: Done,
    commands.Unassign: Done,
    commands.ReportWorker: ModelResult,
    commands.SetBatchSize: Done,
    commands.SubmitJob: JobResult,
    commands.PlanJob: JobResult,
    commands.CompleteTask: TaskResult,
    commands.FailAttempt: TaskResult,
    commands.CancelJob: JobResult,
    commands.ForgetJob: Done,
    commands.SetRetention: Done,
    commands.Expire: Done,
    commands.RestoreTrash: Restored,
    commands.Purge: Purged,
}
"""The result type of every command."""


def convert(command: type[Any], raw: Any) -> Any:
    """The result of a command of that type from plain MessagePack values. Raises DecodeError."""
    try:
        return msgspec.convert(raw, TYPES[command])
    except msgspec.ValidationError as error:
        raise DecodeError(f"the result of {command.__name__} is not one this version knows: {error}") from error

# idunno/base/errors.py: every error a caller may see.
#
# Rule 1: few classes; each has a stable code, says whether the request may have had an effect, and its text ends in the
#         next step where there is one. The text may change, the code may not.
# Rule 2: an error crosses the wire as (code, text) and arrives as the class that was raised.
# Rule 3: a bug is an AssertionError. It is logged with its story, never turned into one of these on purpose.
from __future__ import annotations

from typing import ClassVar, Final


class IdunnoError(Exception):
    """Base of every error a caller may see."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    may_have_happened: ClassVar[bool] = True  # False only when the request certainly had no effect
    retryable: ClassVar[bool] = False  # True: the same request, with the same request id, may be sent again as it is


class InvalidArgument(IdunnoError, ValueError):
    """The request makes no sense, whoever sends it and whenever."""

    code, http_status, may_have_happened = "invalid-argument", 400, False


class DecodeError(IdunnoError):
    """Bytes that are not what they should be. Raised by every decoder, for any bytes at all."""

    code, http_status, may_have_happened = "malformed", 400, False


class Unauthenticated(IdunnoError):
    """Nobody we know: no certificate, a revoked one, or a wrong, expired or revoked token."""

    code, http_status, may_have_happened = "unauthenticated", 401, False


class PermissionDenied(IdunnoError, PermissionError):
    """Known, but not allowed to do this."""

    code, http_status, may_have_happened = "permission-denied", 403, False


class NotFound(IdunnoError, LookupError):
    """No file, version, model, job or node of that name."""

    code, http_status, may_have_happened = "not-found", 404, False


class Conflict(IdunnoError):
    """What is there does not allow it: a name in use, another version than expected, a state that forbids it."""

    code, http_status, may_have_happened = "conflict", 409, False


class NotReady(IdunnoError):
    """It exists, and will or may serve later: an undeployed model, a node that is still recovering."""

    code, http_status, may_have_happened, retryable = "not-ready", 503, False, False


class Exhausted(IdunnoError):
    """A bound was met: queue full, disk full, too many connections. The text names the bound."""

    code, http_status, may_have_happened = "exhausted", 429, False


class NotLeader(IdunnoError):
    """This node is not the coordinator's leader. Internal: callers retry elsewhere; `leader` in text form is the hint."""

    code, http_status, may_have_happened, retryable = "not-leader", 503, False, True


class NoQuorum(IdunnoError):
    """No leader can be elected or no majority answers: too many nodes are away."""

    code, http_status, may_have_happened, retryable = "no-quorum", 503, False, True


WHEN_LOST: Final = "if too many voters are lost for good, see `idunno recover`"
"""The last step of every NoQuorum."""


class Unavailable(IdunnoError):
    """The other side could not be reached; the request was certainly not sent."""

    code, http_status, may_have_happened, retryable = "unavailable", 503, False, True


class Unconfirmed(IdunnoError):
    """The request was sent, its fate is unknown: it may have happened, or may still happen."""

    code, http_status = "may-have-happened", 504


class ConnectionLost(Unconfirmed):
    """The connection broke before the answer. May have happened; an idempotent request may be sent again."""

    code, retryable = "connection-lost", True


class DeadlineExceeded(Unconfirmed):
    """The time the caller gave is over. The text says what was being waited for."""

    code = "deadline-exceeded"


class Cancelled(IdunnoError):
    """The caller, or somebody allowed to, stopped it."""

    code, http_status = "cancelled", 499


class StaleTerm(IdunnoError):
    """An order of a deposed leader, refused."""

    code, http_status, may_have_happened = "stale-term", 409, False


class Corrupt(IdunnoError):
    """Stored bytes are not what was stored. The text names the file or block."""

    code, http_status, may_have_happened = "corrupt", 500, False


class DiskFailed(IdunnoError):
    """The disk refused: no space, an error of the device. The text carries the system's own words."""

    code, http_status = "disk-failed", 507


class ModelFailed(IdunnoError):
    """The model itself failed: could not be loaded, rejected a batch, died. Carries the model's own message."""

    code, http_status, may_have_happened = "model-failed", 422, False


class Incompatible(IdunnoError):
    """Two versions of idunno that cannot work together, or data of another cluster."""

    code, http_status, may_have_happened = "incompatible", 409, False


class InternalError(IdunnoError):
    """A bug on the other side; its log holds the story under the id in the text."""

    code = "internal"


def _all_classes() -> dict[str, type[IdunnoError]]:
    found: dict[str, type[IdunnoError]] = {}
    todo: list[type[IdunnoError]] = [IdunnoError]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if cls is not IdunnoError:
            assert cls.code not in found, f"two errors with code {cls.code}"
            found[cls.code] = cls
    return found


BY_CODE: dict[str, type[IdunnoError]] = _all_classes()
"""Every error class by its code; codes are what crosses the wire."""


def undecided(error: IdunnoError) -> bool:
    """Whether this refusal of a second attempt leaves open what became of a first whose answer was lost. That one may still be
    on its way, and find another state of things when it comes; only what makes no sense is refused whenever it comes."""
    return not error.may_have_happened and not isinstance(error, InvalidArgument)


def from_code(code: str, text: str) -> IdunnoError:
    """The error that was raised elsewhere. An unknown code (a newer peer's) becomes InternalError and keeps its name."""
    cls = BY_CODE.get(code)
    return cls(text) if cls is not None else InternalError(f"{code}: {text}")

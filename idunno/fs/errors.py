# idunno/fs/errors.py: the cluster's errors as those that programs expect of a filesystem.
#
# Rule 1: every one is an OSError with the cluster's own text; the original is its `__cause__`.
from __future__ import annotations

import errno

from idunno.base.errors import (
    Conflict,
    DeadlineExceeded,
    DiskFailed,
    Exhausted,
    IdunnoError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)


class ConflictError(OSError):
    """The file has another current version than the one that was opened: read it again, then write again."""


def os_error(error: IdunnoError, path: str, *, create: bool = False) -> OSError:
    """`create`: the file was to be a new one, so a conflict means that there is one."""
    text = str(error)
    match error:
        case NotFound():
            return FileNotFoundError(errno.ENOENT, text, path)
        case Conflict():
            return FileExistsError(errno.EEXIST, text, path) if create else ConflictError(errno.ESTALE, text, path)
        case PermissionDenied() | Unauthenticated():
            return PermissionError(errno.EACCES, text, path)
        case DeadlineExceeded():
            return TimeoutError(errno.ETIMEDOUT, text, path)
        case InvalidArgument():
            return OSError(errno.EINVAL, text, path)
        case Exhausted() | DiskFailed():
            return OSError(errno.ENOSPC, text, path)
        case _:
            return OSError(errno.EIO, text, path)

# idunno/base/naming.py: what an error of the system is about, where the system itself does not say.
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from idunno.base.errors import IdunnoError


@contextlib.contextmanager
def naming(what: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of reading or writing name no file, unlike those of opening one: here they get `what` as theirs."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None or isinstance(error, IdunnoError):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(what)) from error

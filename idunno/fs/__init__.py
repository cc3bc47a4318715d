# idunno/fs: the file store as an fsspec filesystem, `idunno://` (docs/fs.md).
from __future__ import annotations

from idunno.fs.errors import ConflictError
from idunno.fs.filesystem import IdunnoFileSystem

__all__ = ["ConflictError", "IdunnoFileSystem"]

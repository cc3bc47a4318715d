# idunno/client/backups.py: `snapshot`: a cluster's metadata into a file.
#
# Rule 1: the file is whole or it is not there, and nobody else may read it (0600).
# Rule 2: keys are sealed here: a passphrase never leaves this process, and keys never touch the disk open.
from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from idunno.base.errors import Corrupt, DecodeError, IdunnoError, InvalidArgument, Unavailable
from idunno.base.naming import naming
from idunno.client.base import Base
from idunno.client.local import replacing
from idunno.coordinator import backup as b
from idunno.coordinator.messages import TAKE_BACKUP, BackupTaken, TakeBackup

SNAPSHOT_S: Final = 3_600.0


@contextlib.contextmanager
def private(target: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that is whole or not there, and for nobody else to read. Raises InvalidArgument, OSError."""
    path = Path(target)
    if path.is_dir():
        raise InvalidArgument(f"{path} is a folder: name the file to write")
    with naming(path), replacing(path) as file:  # also where closing fails, in place of the first error
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), 0o600)
        yield file


class Snapshot(msgspec.Struct, frozen=True):
    cluster: str
    index: int
    files: int
    size: int
    keys: bool
    smalls_missing: int


class Backups(Base):
    async def snapshot(self, target: str | os.PathLike[str], *, passphrase: str | None = None) -> Snapshot:
        """The metadata of the cluster as it is now, small contents with it, in one file; with a passphrase also its keys.

        Raises PermissionDenied, InvalidArgument, NoQuorum, OSError. It changes nothing, so a lost answer is Unavailable.
        """
        if passphrase is not None:
            b.check_passphrase(passphrase)
        try:
            with private(target) as file:
                return await self._write_snapshot(file, passphrase)
        except IdunnoError as error:
            if not error.may_have_happened:
                raise
            raise Unavailable(f"snapshot was cut off: {error}; nothing was written, try again") from error

    async def _write_snapshot(self, file: IO[bytes], passphrase: str | None) -> Snapshot:
        deadline = self._deadline(SNAPSHOT_S)
        writer, head, size = b.Writer(), None, 0
        keys = bytearray()
        request = TakeBackup(keys=passphrase is not None)
        async with self.session.open(TAKE_BACKUP, request, timeout_s=deadline.left_s("snapshot")) as stream:
            while (item := await stream.receive()) is not None:
                if item.note == b.HEAD:
                    head = b.decode_head(bytes(item.body), "the node's answer")
                    size += file.write(writer.begin(head))
                elif item.note == b.KEYS and len(keys) + len(item.body) <= b.BYTES_MAX[b.KEYS] // 2:
                    keys += item.body
                elif item.note in (b.MACHINE, b.SMALL) and head is not None and item.body:
                    size += file.write(writer.record(item.note, bytes(item.body)))
                else:
                    raise DecodeError(f"item of kind {item.note[:8]!r} in a snapshot: is the node of a newer version?")
            taken: BackupTaken = await stream.answer()
        if head is None or bool(keys) != (passphrase is not None):
            raise Corrupt("the node's answer is not whole: try again")
        if passphrase is not None:
            size += file.write(writer.record(b.KEYS, b.seal_keys(bytes(keys), passphrase, head, secrets.token_bytes)))
        size += file.write(writer.end())
        return Snapshot(taken.cluster, taken.index, taken.files, size, passphrase is not None, taken.smalls_missing)

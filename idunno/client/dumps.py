# idunno/client/dumps.py: `dump`: what the nodes tell of their state, in one zip for a bug report.
#
# Rule 1: one folder a node; `manifest.json` says who answered, who did not and why, and which machine is in it.
# Rule 2: what nodes send is not trusted to be small or to have harmless names.
from __future__ import annotations

import os
import re
import time
import zipfile
from typing import IO, Any, Final

import msgspec

from idunno.base.errors import DecodeError, IdunnoError, Unavailable
from idunno.base.version import VERSION
from idunno.client.backups import private
from idunno.client.base import Base
from idunno.coordinator.messages import DUMP, Dump, Dumped, DumpPart

DUMP_S: Final = 60.0
"""The machine takes 20 s at most, the nodes 8 s a handful."""
BYTES_MAX: Final = 512 * 1024 * 1024
FORMAT: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")


class DumpMade(msgspec.Struct, frozen=True):
    node: str  # who gathered
    nodes: list[str]
    missing: dict[str, str]
    index: int
    digest: str
    complete: bool  # whether the whole machine is in it
    size: int


class Dumps(Base):
    async def dump(self, target: str | os.PathLike[str]) -> DumpMade:
        """State of all nodes that answer, without secrets and contents, in a zip. Waits for no leader.

        Raises PermissionDenied, InvalidArgument, Unavailable, OSError.
        """
        try:
            with private(target) as file:
                return await self._write_dump(file)
        except IdunnoError as error:
            if not error.may_have_happened:
                raise
            raise Unavailable(f"dump was cut off: {error}; nothing was written, try again") from error

    async def _write_dump(self, file: IO[bytes]) -> DumpMade:
        deadline = self._deadline(DUMP_S)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            async with self.session.open(DUMP, Dump(), timeout_s=deadline.left_s("dump")) as stream:
                await _receive(stream, archive)
                made: Dumped = await stream.answer()
            manifest = {
                "format": FORMAT,
                "client": VERSION,
                "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **msgspec.to_builtins(made),
            }
            archive.writestr("manifest.json", msgspec.json.format(msgspec.json.encode(manifest)))
        return DumpMade(made.node, made.nodes, made.missing, made.index, made.digest, made.complete, file.tell())


async def _receive(stream: Any, archive: zipfile.ZipFile) -> None:
    """Pieces of one file follow each other."""
    open_name, opened, total = "", None, 0
    try:
        while (item := await stream.receive()) is not None:
            try:
                part = msgspec.msgpack.decode(item.note, type=DumpPart)
            except msgspec.MsgspecError as error:
                raise DecodeError(f"{len(item.note)} bytes name no part of a dump: {error}") from None
            total += len(item.body)
            if not _NAME.fullmatch(part.node) or not _NAME.fullmatch(part.file) or total > BYTES_MAX:
                raise DecodeError(f"{part.node[:40]!r} sent {part.file[:40]!r}, {total} bytes in all: that is no dump")
            name = f"{part.node}/{part.file}"
            if name != open_name:
                if opened is not None:
                    opened.close()
                if name in archive.NameToInfo:
                    raise DecodeError(f"{name} comes twice: that is no dump")
                open_name, opened = name, archive.open(name, "w")
            assert opened is not None
            opened.write(item.body)
    finally:
        if opened is not None:
            opened.close()

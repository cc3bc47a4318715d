# idunno/client/files.py: files in SDFS from and to the user's machine.
#
# Rule 1: bounded memory: content passes through in pieces, whatever its size; small files of a folder go several at once.
# Rule 2: names that come back from the cluster are checked again before they become local paths.
from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Final

from idunno.base.errors import Corrupt, IdunnoError, InvalidArgument, NotFound
from idunno.base.ids import check_file_name
from idunno.client.base import TRANSFER_S, Base, Deadline, new_request
from idunno.client.local import files_below, open_file, replacing_aside, target_path
from idunno.client.transfer import LineEnds, Progress, Tally, several, sink_into, sink_of, source_of
from idunno.sdfs.download import Sink
from idunno.sdfs.messages import (
    STAT,
    DeleteAnswer,
    EmptyTrashAnswer,
    FileInfo,
    ListRow,
    PutAnswer,
    RepairAnswer,
    RestoreAnswer,
    RetainRow,
    ScrubAnswer,
    Stat,
    StoreAnswer,
    TrashRow,
    VersionRow,
    WhereAnswer,
)

DISCARD_S: Final = 5.0
"""For taking back what was put in vain: an error is waiting to be shown."""


@dataclass(frozen=True, slots=True)
class FolderPut:
    files: list[PutAnswer]
    size: int


@dataclass(frozen=True, slots=True)
class FolderGot:
    files: list[FileInfo]
    size: int


class Files(Base):
    async def put(
        self,
        source: str | os.PathLike[str] | IO[bytes],
        name: str,
        *,
        write_quorum: int | None = None,
        if_version: int | None = None,
        progress: Progress | None = None,
    ) -> PutAnswer:
        """Store a local file, or what a binary file object gives, as the next version of `name`.

        `if_version`: only if the current version is that one (0: there is none), else Conflict.
        Raises InvalidArgument (also: the file changed meanwhile), Conflict, Exhausted, Unconfirmed (look at `versions`), OSError.
        """
        check_file_name(name)
        deadline = self._deadline(TRANSFER_S)
        if isinstance(source, (str, os.PathLike)):
            return await self._put_path(
                Path(source),
                name,
                write_quorum=write_quorum,
                if_version=if_version,
                deadline=deadline,
                progress=progress,
            )
        return await self._put_file(
            source, name, write_quorum=write_quorum, if_version=if_version, deadline=deadline, progress=progress
        )

    async def put_folder(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        write_quorum: int | None = None,
        progress: Progress | None = None,
    ) -> FolderPut:
        """Put every file below `folder` as `name`/its relative path. The first error stops it; what was put stays."""
        deadline = self._deadline(TRANSFER_S)
        members = await asyncio.to_thread(files_below, Path(folder))
        todo = [(check_file_name(f"{name.rstrip('/')}/{relative}"), path) for relative, path in members]
        total = sum(path.stat().st_size for _, path in todo)
        tally = Tally(progress, total)

        async def one(target: str, path: Path) -> PutAnswer:
            return await self._put_path(
                path, target, write_quorum=write_quorum, deadline=deadline, progress=tally.part()
            )

        answers = await several([(path.stat().st_size, partial(one, target, path)) for target, path in todo])
        return FolderPut(answers, sum(answer.size for answer in answers))

    async def get(
        self,
        name: str,
        target: str | os.PathLike[str] | IO[bytes],
        *,
        version: int | None = None,
        as_of_ms: int | None = None,
        progress: Progress | None = None,
    ) -> FileInfo:
        """Fetch the latest version, a given one, or the one current at a time, verified; a local path appears whole.

        Raises NotFound, Corrupt, Unavailable (no live copy), OSError.
        """
        deadline = self._deadline(TRANSFER_S)
        if not isinstance(target, (str, os.PathLike)):
            return await self._get_file(
                name, sink_of(target), version=version, as_of_ms=as_of_ms, deadline=deadline, progress=progress
            )
        path = target_path(name, Path(target))
        async with replacing_aside(path) as file:
            return await self._get_file(
                name, sink_into(file), version=version, as_of_ms=as_of_ms, deadline=deadline, progress=progress
            )

    async def get_folder(
        self, prefix: str, folder: str | os.PathLike[str], *, progress: Progress | None = None
    ) -> FolderGot:
        """Fetch every file whose name begins with `prefix` (which ends in '/') below the local `folder`."""
        if not prefix.endswith("/"):
            raise InvalidArgument(f"{prefix!r} names one file: end it with '/' to get everything below it")
        deadline = self._deadline(TRANSFER_S)
        rows = await self._file_client.ls(prefix, timeout_s=deadline.left_s(f"ls {prefix}"))
        if not rows:
            raise NotFound(f"no file below {prefix}: see `idunno ls {prefix}`")
        _check_tree([row.name for row in rows])
        tally = Tally(progress, sum(row.size for row in rows))

        async def one(row: ListRow) -> FileInfo:
            if not check_file_name(row.name, system=True).startswith(prefix):
                raise Corrupt(f"the listing of {prefix} names {row.name}, which is not below it: ask another node")
            path = Path(folder, row.name[len(prefix) :])
            path.parent.mkdir(parents=True, exist_ok=True)
            async with replacing_aside(path) as file:
                return await self._get_file(
                    row.name, sink_into(file), version=row.version, deadline=deadline, progress=tally.part()
                )

        infos = await several([(row.size, partial(one, row)) for row in rows])
        return FolderGot(infos, sum(info.size for info in infos))

    async def get_versions(
        self, name: str, count: int, target: str | os.PathLike[str] | IO[bytes], *, progress: Progress | None = None
    ) -> list[FileInfo]:
        """The last `count` versions in one file, newest first, each behind a line `=== NAME version V ===`."""
        if count < 1:
            raise InvalidArgument(f"{count} versions of {name}: ask for at least 1")
        deadline = self._deadline(TRANSFER_S)
        found = (await self._ask(STAT, Stat(name, last=count), deadline)).versions
        tally = Tally(progress, sum(info.size for info in found))
        if isinstance(target, (str, os.PathLike)):
            async with replacing_aside(target_path(name, Path(target))) as file:
                await self._write_versions(found, file, deadline, tally)
        else:
            await self._write_versions(found, target, deadline, tally)
        return found

    async def _write_versions(self, found: list[FileInfo], file: IO[bytes], deadline: Deadline, tally: Tally) -> None:
        ends = LineEnds(file)
        for info in found:
            ends.end_line()  # the header is a line of its own, whatever the version before ended with
            ends.write(f"=== {info.name} version {info.version} ===\n".encode())
            await self._get_file(
                info.name, sink_of(ends), version=info.version, deadline=deadline, progress=tally.part()
            )

    async def stat(self, name: str, *, version: int | None = None) -> FileInfo:
        """Raises NotFound."""
        return await self._file_client.stat(name, version=version, timeout_s=self._deadline().left_s())

    async def versions(self, name: str) -> list[VersionRow]:
        """Newest first. Raises NotFound."""
        return await self._file_client.versions(name, timeout_s=self._deadline().left_s())

    async def ls(self, prefix: str = "", *, system: bool = False, long: bool = False) -> list[ListRow]:
        """Every file whose name begins with `prefix`, by name; `long`: with all versions' sizes, logical and stored."""
        return await self._file_client.ls(prefix, system=system, long=long, timeout_s=self._deadline().left_s())

    async def where(self, name: str) -> WhereAnswer:
        return await self._file_client.where(name, timeout_s=self._deadline().left_s())

    async def store(self, node: str = "") -> StoreAnswer:
        """The files with a block on that node (name or id; "" the one asked)."""
        return await self._file_client.store(node, timeout_s=self._deadline().left_s())

    async def delete(self, name: str) -> DeleteAnswer:
        """Delete all versions. Raises NotFound, PermissionDenied."""
        return await self._file_client.delete(name, request=new_request(), timeout_s=self._deadline().left_s())

    async def _discard(self, name: str, error: IdunnoError) -> None:
        """Take back what was put for something that was refused by `error`, if it certainly was: nobody would find it."""
        if not error.may_have_happened:
            with contextlib.suppress(IdunnoError):  # the refusal is what matters, and is raised
                await self._file_client.delete(name, request=new_request(), timeout_s=DISCARD_S)

    async def retain(
        self, prefix: str, *, versions: int = 0, age_s: float = 0.0, show: bool = False
    ) -> list[RetainRow]:
        """Keep so many versions of each file below `prefix`, and superseded ones so long (both 0: all, for ever)."""
        age_ms = round(age_s * 1000)
        return await self._file_client.retain(
            prefix, versions=versions, age_ms=age_ms, show=show, timeout_s=self._deadline().left_s()
        )

    async def trash(self, prefix: str = "") -> list[TrashRow]:
        """What was deleted or has expired in the last day, oldest first."""
        return await self._file_client.trash(prefix, timeout_s=self._deadline().left_s())

    async def restore(self, name: str) -> RestoreAnswer:
        """All versions of `name` that the trash holds. Raises NotFound, PermissionDenied, Conflict."""
        return await self._file_client.restore(name, timeout_s=self._deadline().left_s())

    async def empty_trash(self, prefix: str = "") -> EmptyTrashAnswer:
        """Free at once, and for good, what the trash holds of your files below `prefix`."""
        return await self._file_client.empty_trash(prefix, timeout_s=self._deadline().left_s())

    async def repair(self) -> RepairAnswer:
        """What is missing to four copies of everything."""
        return await self._file_client.repair(timeout_s=self._deadline().left_s())

    async def scrub(self, node: str = "") -> ScrubAnswer:
        """Have a node ("" all) read its blocks again and replace what is rotten."""
        return await self._file_client.scrub(node, timeout_s=self._deadline().left_s())

    async def _put_path(
        self,
        path: Path,
        name: str,
        *,
        deadline: Deadline,
        write_quorum: int | None = None,
        if_version: int | None = None,
        system: bool = False,
        progress: Progress | None = None,
    ) -> PutAnswer:
        with open_file(path) as file:
            return await self._put_file(
                file,
                name,
                deadline=deadline,
                write_quorum=write_quorum,
                if_version=if_version,
                system=system,
                progress=progress,
            )

    async def _put_file(
        self,
        file: IO[bytes],
        name: str,
        *,
        deadline: Deadline,
        write_quorum: int | None = None,
        if_version: int | None = None,
        system: bool = False,
        progress: Progress | None = None,
    ) -> PutAnswer:
        source, size = source_of(file)
        return await self._file_client.put(
            source,
            name,
            size=size,
            write_quorum=write_quorum,
            if_version=if_version,
            progress=progress,
            timeout_s=deadline.left_s(f"put of {name}"),
            system=system,
            put=new_request(),
        )

    async def _get_file(
        self,
        name: str,
        sink: Sink,
        *,
        deadline: Deadline,
        version: int | None = None,
        as_of_ms: int | None = None,
        progress: Progress | None = None,
    ) -> FileInfo:
        return await self._file_client.get(
            name,
            sink,
            version=version,
            as_of_ms=as_of_ms,
            progress=progress,
            timeout_s=deadline.left_s(f"get of {name}"),
        )


def _check_tree(names: Iterable[str]) -> None:
    """Raises InvalidArgument where a local folder cannot hold all of these: in the store a name may also be others' prefix."""
    files = set(names)
    for name in sorted(files):
        above = next((str(path) for path in PurePosixPath(name).parents if str(path) in files), None)
        if above is not None:
            raise InvalidArgument(
                f"{above} is a file, and {name} is below it: no local folder can hold both; get them one by one, e.g. "
                f"`idunno get {above} FILE`"
            )

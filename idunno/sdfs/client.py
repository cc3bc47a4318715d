# idunno/sdfs/client.py: files for who uses the cluster: the command line, Python programs, and workers through their node.
#
# Rule 1: content streams: a put or get holds at most 32 MiB, whatever the file's size (upload.py, download.py).
# Rule 2: one put has one id; whatever is repeated keeps it, so it makes one version at most.
# Rule 3: nothing here touches files, threads or clocks: content comes from a `Source`, goes to a `Sink`, hashing to `offload`.
from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from idunno.base.disk import Buffer
from idunno.base.errors import Corrupt, Exhausted, IdunnoError, InvalidArgument, NotReady
from idunno.base.ids import check_file_name
from idunno.coordinator.records import COPIES_WANTED, SMALL_BYTES_MAX, Block
from idunno.sdfs.asking import PATIENCE_S, Asker
from idunno.sdfs.download import Sink, download, fetch
from idunno.sdfs.hashing import Offload, block_id
from idunno.sdfs.messages import (
    ABORT,
    COMMIT,
    DELETE,
    EMPTY_TRASH,
    LIST,
    LIST_TRASH,
    PUT_SMALL,
    REPAIR,
    RESTORE,
    RETAIN,
    SCRUB,
    STAT,
    STORE,
    VERSIONS,
    WHERE,
    Abort,
    Begin,
    BlockCopies,
    ByName,
    Commit,
    Delete,
    DeleteAnswer,
    EmptyTrash,
    EmptyTrashAnswer,
    FileInfo,
    List,
    ListAnswer,
    ListRow,
    ListTrash,
    PutAnswer,
    PutSmallFile,
    Repair,
    RepairAnswer,
    RestoreAnswer,
    RestoreFile,
    Retain,
    RetainRow,
    Scrub,
    ScrubAnswer,
    Stat,
    Store,
    StoreAnswer,
    TrashRow,
    VersionRow,
    WhereAnswer,
)
from idunno.sdfs.upload import Source, Upload, next_block
from idunno.wire.calls import Caller

Progress = Callable[[int, int], None]
"""Hears (bytes done, bytes in all; 0 when unknown)."""

QUESTION_S: Final = 30.0
TRANSFER_S: Final = 3_600.0
"""A file: 360 GB at 100 MB/s."""
ROWS_MAX: Final = 1_000
"""Of one page of a listing, the most that is answered."""
REPAIRS_MAX: Final = 100
"""Commits refused for too few copies, because nodes came while the put was under way, before it is given up."""

ABORT_S: Final = 5.0
"""For ending a put that has failed: its error is waiting to be told."""
CANCELLED_S: Final = 2.0
"""Likewise where somebody waits for the end of it: long for a cluster that answers, short for him."""
REASON_MAX: Final = 200  # characters


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Blocks that are stored under an open put, for a command that commits them (`complete`)."""

    put: str
    size: int
    blocks: tuple[Block, ...]


def source_of(content: Buffer) -> Source:
    """A Source of bytes in memory."""
    view = memoryview(content)

    async def read(length: int) -> Buffer:
        nonlocal view
        piece, view = view[:length], view[length:]
        return piece

    return read


class FileClient:
    """Files in SDFS.

    `caller()` gives a connection to any living node, each time anew; `offload` runs hashing of whole blocks elsewhere;
    `rng` gives put ids: seed it from the system, two clients with equal ids would meet each other's puts.
    """

    def __init__(self, caller: Callable[[], Caller], *, offload: Offload, rng: random.Random) -> None:
        self._caller, self._offload, self._rng = caller, offload, rng

    def new_id(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    async def put(
        self,
        source: Source,
        name: str,
        *,
        size: int | None = None,
        write_quorum: int | None = None,
        if_version: int | None = None,
        progress: Progress | None = None,
        timeout_s: float = TRANSFER_S,
        system: bool = False,
        put: str = "",
    ) -> PutAnswer:
        """Store what `source` gives as the next version of `name`; acknowledged when a quorum has synced every block.

        `size` is a hint for placement and progress. `put`: the id, for a caller who retries himself. Raises
        InvalidArgument, Conflict, Exhausted, PermissionDenied; Unconfirmed when it may have happened.
        """
        check_file_name(name, system=system)
        check_write_quorum(write_quorum)
        asker = self._asker(f"put of {name}", timeout_s)
        put = put or self.new_id()
        first = await next_block(asker, source)
        if len(first) <= SMALL_BYTES_MAX:
            request = PutSmallFile(put, name, if_version, write_quorum, system)
            answer = await asker.ask(PUT_SMALL, request, body=bytes(first), patience_s=PATIENCE_S)
            if progress is not None:
                progress(len(first), len(first))
            return answer
        begin = Begin(put, name, if_version, size, system)
        upload = Upload(asker, begin, self._offload, write_quorum=write_quorum, sent=_counter(progress, size or 0))
        try:
            return await self._put_blocks(asker, upload, begin, first, source, write_quorum)
        except asyncio.CancelledError:  # Ctrl-C: nobody is left who would go on. Behind a commit this changes nothing
            await self._abort(put, "its client gave it up", CANCELLED_S)
            raise

    async def _put_blocks(
        self, asker: Asker, upload: Upload, begin: Begin, first: Buffer, source: Source, write_quorum: int | None
    ) -> PutAnswer:
        try:
            placed = await upload.begin()
        except IdunnoError as error:
            if error.may_have_happened or isinstance(
                error, Exhausted
            ):  # it was opened before who can take it was asked
                await self._abort(begin.put, str(error))
            raise
        if placed.committed is not None:  # an earlier try of the caller got that far
            return await asker.ask(COMMIT, _commit_again(begin, placed.committed, write_quorum))
        if why := upload.lacking():
            await self._abort(begin.put, "not enough nodes")
            raise Exhausted(why)
        try:
            await upload.send(first, source)
        except (
            Exception
        ) as error:  # out of time as well: nothing was committed yet, so nobody waits for what becomes of it
            await self._abort(begin.put, str(error))
            raise
        try:
            return await self._commit(asker, upload, begin, write_quorum)
        except Exception as error:
            if isinstance(error, IdunnoError) and error.may_have_happened and asker.lost(COMMIT):
                raise
            await self._abort(begin.put, str(error))
            if isinstance(error, IdunnoError):
                asker.doubt(COMMIT, error)
            raise

    async def upload(
        self,
        source: Source,
        name: str,
        *,
        size: int | None = None,
        timeout_s: float = TRANSFER_S,
        system: bool = True,
        put: str = "",
    ) -> Uploaded:
        """Store blocks under an open put, and leave it open for a command that commits it, such as a task's completion.

        A put that cannot be stored, or is given up, is aborted: its id names nothing any more then. Raises as `put`.
        """
        check_file_name(name, system=system)
        asker = self._asker(f"upload of {name}", timeout_s)
        begin = Begin(put or self.new_id(), name, None, size, system)
        upload = Upload(asker, begin, self._offload, write_quorum=None, sent=_counter(None, 0))
        try:
            await upload.begin()
            await upload.send(await next_block(asker, source), source)
        except asyncio.CancelledError:  # its task was cancelled, or its node stops
            await self._abort(begin.put, "its client gave it up", CANCELLED_S)
            raise
        except Exception as error:
            await self._abort(begin.put, str(error))
            raise
        return Uploaded(begin.put, upload.size, tuple(upload.blocks))

    async def get(
        self,
        name: str,
        sink: Sink,
        *,
        version: int | None = None,
        as_of_ms: int | None = None,
        progress: Progress | None = None,
        timeout_s: float = TRANSFER_S,
    ) -> FileInfo:
        """Give the bytes of a version (the latest by default), verified, to `sink`, in order. The answer has no content.

        Raises NotFound, Unavailable (no live copy), Corrupt, DeadlineExceeded, and what `sink` raises.
        """
        asker = self._asker(f"get of {name}", timeout_s)
        info = (await asker.ask(STAT, Stat(name, version, as_of_ms), patience_s=PATIENCE_S)).versions[0]
        count = _counter(progress, info.size)

        async def counted(offset: int, content: Buffer) -> None:
            await sink(offset, content)
            count(len(content))

        if info.content is None:
            await download(asker, info.blocks, counted, self._offload)
        else:
            await counted(0, _verified(info, info.content))
        return msgspec.structs.replace(info, content=None)  # it is where the sink has put it, not once more in memory

    async def read(self, info: FileInfo, offset: int, length: int, *, timeout_s: float = TRANSFER_S) -> Buffer:
        """Bytes [offset, offset + length) of a version that `stat` gave, ended by its end.

        Only a whole block can be verified, so the whole blocks are fetched in which the range lies. Raises as `get`.
        """
        end = min(offset + length, info.size)
        if info.content is not None:
            return _verified(info, info.content)[offset:end]
        asker = self._asker(f"read of {info.name}", timeout_s)
        wanted: list[BlockCopies] = []
        base = at = 0  # of the first block wanted, of this one
        for block in info.blocks:
            if at < end and at + block.size > offset:
                base = base if wanted else at
                wanted.append(block)
            at += block.size
        pieces: list[bytes] = []

        async def keep(at: int, content: Buffer) -> None:
            pieces.append(bytes(memoryview(content)[max(0, offset - base - at) : end - base - at]))

        await download(asker, wanted, keep, self._offload)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def fetch(self, blocks: Sequence[Block], sink: Sink, *, what: str, timeout_s: float = TRANSFER_S) -> None:
        """Give the bytes of blocks that a model or a job pins, whatever has become of the file. `what` is for messages."""
        asker = self._asker(what, timeout_s)
        await download(asker, [BlockCopies(b.block, b.size, []) for b in blocks if b.size], sink, self._offload)

    async def stat(
        self, name: str, *, version: int | None = None, as_of_ms: int | None = None, timeout_s: float = QUESTION_S
    ) -> FileInfo:
        """Raises NotFound."""
        asker = self._asker(f"stat of {name}", timeout_s)
        return (await asker.ask(STAT, Stat(name, version, as_of_ms))).versions[0]

    async def versions(self, name: str, *, timeout_s: float = QUESTION_S) -> list[VersionRow]:
        """Newest first, at most the last 1,000. Raises NotFound."""
        return (await self._asker(f"versions of {name}", timeout_s).ask(VERSIONS, ByName(name))).versions

    async def ls(
        self, prefix: str = "", *, system: bool = False, long: bool = False, timeout_s: float = QUESTION_S
    ) -> list[ListRow]:
        asker = self._asker(f"ls {prefix}", timeout_s)
        rows: list[ListRow] = []
        after = ""
        while True:
            page = await asker.ask(LIST, List(prefix, after, system=system, long=long))
            rows += page.files
            if not page.more or not page.files:
                return rows
            after = page.files[-1].name

    async def ls_page(
        self, prefix: str = "", after: str = "", *, limit: int = ROWS_MAX, timeout_s: float = QUESTION_S
    ) -> ListAnswer:
        """The first `limit` files with that prefix and a name greater than `after`, by name."""
        return await self._asker(f"ls {prefix}", timeout_s).ask(LIST, List(prefix, after, limit))

    async def where(self, name: str, *, timeout_s: float = QUESTION_S) -> WhereAnswer:
        return await self._asker(f"where {name}", timeout_s).ask(WHERE, ByName(name))

    async def store(self, node: str = "", *, timeout_s: float = QUESTION_S) -> StoreAnswer:
        """The versions with a block on that node (name or id; "" the one asked)."""
        asker = self._asker(f"store {node}", timeout_s)
        page = await asker.ask(STORE, Store(node))
        rows = list(page.files)
        while page.more:
            page = await asker.ask(STORE, Store(page.node, page.next))
            rows += page.files
        return StoreAnswer(page.node, rows)

    async def delete(self, name: str, *, request: str = "", timeout_s: float = QUESTION_S) -> DeleteAnswer:
        return await self._asker(f"delete of {name}", timeout_s).ask(DELETE, Delete(name, request or self.new_id()))

    # -- keeping and throwing away ------------------------------------------------------------------------------------

    async def retain(
        self, prefix: str, *, versions: int = 0, age_ms: int = 0, show: bool = False, timeout_s: float = QUESTION_S
    ) -> list[RetainRow]:
        """Set how many versions of each file below `prefix` are kept and how long superseded ones (both 0: no rule); or show
        what holds there."""
        request = Retain(prefix, self.new_id(), versions, age_ms, show)
        return (await self._asker(f"retention of {prefix}", timeout_s).ask(RETAIN, request)).rules

    async def trash(self, prefix: str = "", *, timeout_s: float = QUESTION_S) -> list[TrashRow]:
        """What was deleted or has expired and can be restored, oldest first."""
        asker = self._asker(f"trash {prefix}", timeout_s)
        page = await asker.ask(LIST_TRASH, ListTrash(prefix))
        rows = list(page.entries)
        while page.more:
            page = await asker.ask(LIST_TRASH, ListTrash(prefix, rows[-1].entry))
            rows += page.entries
        return rows

    async def restore(self, name: str, *, timeout_s: float = QUESTION_S) -> RestoreAnswer:
        """Bring back from the trash all versions of `name` that are there. Raises NotFound, PermissionDenied, Conflict."""
        return await self._asker(f"restore of {name}", timeout_s).ask(RESTORE, RestoreFile(name, self.new_id()))

    async def empty_trash(self, prefix: str = "", *, timeout_s: float = QUESTION_S) -> EmptyTrashAnswer:
        """Free what the trash holds below `prefix` of the caller's (an admin's: everybody's) files, for good."""
        asker = self._asker(f"emptying of the trash {prefix}", timeout_s)
        versions = size = last = 0
        while True:
            answer = await asker.ask(EMPTY_TRASH, EmptyTrash(prefix, self.new_id(), last))
            last = answer.last
            versions, size = versions + answer.versions, size + answer.size
            if not answer.more:
                return EmptyTrashAnswer(versions, size)

    async def repair(self, *, timeout_s: float = QUESTION_S) -> RepairAnswer:
        return await self._asker("repair", timeout_s).ask(REPAIR, Repair())

    async def scrub(self, node: str = "", *, timeout_s: float = QUESTION_S) -> ScrubAnswer:
        """Have a node (name or id; "" all) read its blocks again, from now on."""
        return await self._asker(f"scrub {node}", timeout_s).ask(SCRUB, Scrub(node))

    # -----------------------------------------------------------------------------------------------------------------

    def _asker(self, what: str, timeout_s: float) -> Asker:
        return Asker(self._caller, what, timeout_s, self._rng)

    async def _commit(self, asker: Asker, upload: Upload, begin: Begin, write_quorum: int | None) -> PutAnswer:
        for attempt in range(REPAIRS_MAX):
            for block in upload.short():
                # More nodes are present than when it was sent, so more copies are asked for, or one who had it is gone: the
                # content is fetched again.
                holders = next(copies for copies in upload.copies() if copies.block == block.block)
                await upload.store(block.block, await fetch(asker, holders, self._offload))
            request = Commit(
                begin.put, begin.name, upload.size, upload.copies(), write_quorum, if_version=begin.if_version
            )
            try:
                return await asker.ask(COMMIT, request, final=False)
            except NotReady:
                asker.left_s("more copies of its blocks are needed")
                await asker.pause(attempt)
                placed = await upload.begin(proven=True)
                if placed.committed is not None:  # by a question of before, whose answer was lost
                    return await asker.ask(COMMIT, _commit_again(begin, placed.committed, write_quorum))
        raise NotReady(f"put of {begin.name}: nodes came and went {REPAIRS_MAX} times during the commit; try again")

    async def _abort(self, put: str, reason: str, timeout_s: float = ABORT_S) -> None:
        """End a put that has failed, so that nothing waits for it. If that cannot be had soon, the leader does it later."""
        with contextlib.suppress(IdunnoError):  # why it failed is what matters, and is raised
            await self._asker(f"abort of put {put}", timeout_s).ask(ABORT, Abort(put, reason[:REASON_MAX]))


def _commit_again(begin: Begin, done: FileInfo, write_quorum: int | None) -> Commit:
    """Of a put that was committed: the same command, which finds what it made."""
    return Commit(begin.put, begin.name, done.size, done.blocks, write_quorum, begin.if_version)


def _verified(info: FileInfo, content: bytes) -> bytes:
    """A small file's content. Raises Corrupt."""
    if len(info.blocks) != 1 or block_id(content) != info.blocks[0].block:
        raise Corrupt(f"{info.name} version {info.version} came with other content than was put; try another node")
    return content


def check_write_quorum(write_quorum: int | None) -> None:
    """Raises InvalidArgument."""
    if write_quorum is not None and not 1 <= write_quorum <= COPIES_WANTED:
        raise InvalidArgument(f"a write quorum is 1 to {COPIES_WANTED} copies, not {write_quorum}")


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(length: int) -> None:
        nonlocal done
        done += length
        if progress is not None:
            progress(done, total)

    return count

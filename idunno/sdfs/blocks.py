# idunno/sdfs/blocks.py: the blocks on this node's disk.
#
# Rule 1: a block is written to tmp/, verified against its name, synced, renamed to blocks/ab/<name>, and the directory
#         synced; only then does this store say that it has it. Nothing partial ever bears a block's name.
# Rule 2: a block read from begin to end is verified on the way; a rotten one goes to quarantine/ and is no longer held.
# Rule 3: a block is never held in memory: 2 * WRITE_BYTES of it at a time when written, 2 * READ_BYTES when read.
# Rule 4: each publication of a block has a serial: what was found out about an older file says nothing about a newer one.
# Rule 5: below the floor of free space no block is taken; blocks under way count as used. Nor while the disk fails.
# Rule 6: whoever removes a block has decided so without an await since his barrier (`take_out`); what is being written stays.
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Final, NoReturn

from idunno.base.disk import Buffer, Disk, File, Space
from idunno.base.errors import Corrupt, DecodeError, DiskFailed, Exhausted, IdunnoError, InvalidArgument, NotFound
from idunno.base.ids import BlockId
from idunno.coordinator.records import BLOCK_BYTES_MAX
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.hashing import Digest, check_block_id
from idunno.sdfs.pins import Pins

log = logging.getLogger("idunno.sdfs")

WRITE_BYTES: Final = 4 * 1024 * 1024
"""Written and hashed in pieces of this size. Each is a hand-over to a thread, and back: of 2 MiB each, a put took 5 to 7 % more
processor time."""
CROWDED_WRITE_BYTES: Final = 2 * 1024 * 1024
"""Likewise while all writers together hold more than BUFFERED_BYTES_MAX."""
READ_BYTES: Final = 512 * 1024
"""Read in pieces of this size, of which two are held: 64 readers at once take 64 MiB."""
BUFFERED_BYTES_MAX: Final = 16 * 1024 * 1024
"""In all writers together: with slow disks and 40 blocks coming, the node stays below 160 MB."""
PIECES_MAX: Final = 256
"""Pieces gathered for one write, however small they are: each costs memory beside its bytes."""
QUARANTINE_FILES_MAX: Final = 64
"""Rotten blocks kept for a look, 512 MB at most; more are removed at once."""
_PROBE: Final = "block-probe"
_TEMPORARY: Final = "block-"  # tmp/ is shared with others; what begins with this is ours


class BlockStore:
    """The blocks this node holds: synced, verified when written, named by content.

    `on_change(block, held)` is called after a block has come or gone; it must not fail or wait.
    """

    def __init__(self, disk: Disk, config: SdfsConfig) -> None:
        self._disk, self._config = disk, config
        self._held: dict[BlockId, tuple[int, int]] = {}  # size, serial
        self._doubtful: set[BlockId] = set()  # held, but the disk refused to read them, or to sync their name
        self._names = asyncio.Lock()  # over renames: quarantine must not move away what was just published
        self._directories: set[str] = set()  # of blocks/, at most 256
        self._reserved_bytes = 0  # of writers under way
        self.buffered_bytes = 0  # received and not yet written
        self._serial = 0
        self._writing: dict[BlockId, int] = {}  # writers under way, whether they come to an end or not
        self.pins = Pins()
        self.problem = ""
        """Why no block is taken now, "" when blocks are: the disk's last failure, until `probe` goes well."""
        self.rotten = 0
        """Blocks found rotten or unreadable since the start."""
        self.on_change: Callable[[BlockId, bool], None] | None = None

    async def open(self) -> None:
        """Remove what an earlier run left half-written, and learn which blocks there are. Names and sizes only are read."""
        for path in ("tmp", "blocks", "quarantine"):
            await self._disk.make_directory(path)
        for entry in await self._disk.list("tmp"):
            if entry.name.startswith(_TEMPORARY) and not entry.is_directory:
                await self._disk.remove(f"tmp/{entry.name}")
        for directory in await self._disk.list("blocks"):
            if not directory.is_directory:
                continue
            self._directories.add(directory.name)
            for entry in await self._disk.list(f"blocks/{directory.name}"):
                if _is_block(entry.name, directory.name) and 0 < entry.size <= BLOCK_BYTES_MAX:
                    self._held[BlockId(entry.name)] = (entry.size, 0)
                else:
                    log.warning("no block", extra={"path": f"blocks/{directory.name}/{entry.name}", "size": entry.size})
            # What was named by a process that died before it could sync the name is held from now on, so: synced from now on.
            await self._disk.sync_directory(f"blocks/{directory.name}")
        if self._directories:
            await self._disk.sync_directory("blocks")

    def __contains__(self, block: BlockId) -> bool:
        return block in self._held

    def __len__(self) -> int:
        return len(self._held)

    def held(self) -> list[BlockId]:
        """What others may count on: a block that could not be read lately is kept, and tried, but not counted."""
        return [block for block in self._held if block not in self._doubtful]

    def was_written_here(self, block: BlockId) -> bool:
        """Whether this process itself wrote, verified and synced the copy that is held, and could read it since."""
        return self._held.get(block, (0, 0))[1] > 0 and block not in self._doubtful

    def size(self, block: BlockId) -> int:
        """In bytes. Raises NotFound."""
        try:
            return self._held[block][0]
        except KeyError:
            raise NotFound(f"block {block[:16]} is not here") from None

    @property
    def crowded(self) -> bool:
        """Whether the writers should hold as little as they can."""
        return self.buffered_bytes > BUFFERED_BYTES_MAX

    async def space(self) -> Space:
        """The disk's space, with what is under way already taken off."""
        space = await self._disk.space()
        return Space(max(0, space.free_bytes - self._reserved_bytes), space.total_bytes)

    # -- writing ------------------------------------------------------------------------------------------------------

    async def begin(self, block: BlockId, size: int, put: str = "") -> BlockWriter:
        """A writer for one block, which is pinned for `put`.

        Raises Exhausted below the floor of free space or while the disk fails, InvalidArgument, DiskFailed.
        """
        check_block_id(block)
        if not 0 < size <= BLOCK_BYTES_MAX:
            raise InvalidArgument(f"a block has 1 to {BLOCK_BYTES_MAX} bytes, not {size}")
        if self.problem:
            raise Exhausted(f"no block is taken while the disk fails: {self.problem}")
        if put:
            self.pins.take(block, put)
        self._writing[block] = self._writing.get(block, 0) + 1
        self._reserved_bytes += size  # before the first await: two at once must not share the last free bytes
        try:
            space = await self._disk.space()
            floor = self._config.floor(space)
            if space.free_bytes - self._reserved_bytes < floor:
                raise Exhausted(
                    f"disk has {space.free_bytes:,} bytes free, {self._reserved_bytes:,} of them promised: no block is "
                    f"taken below {floor:,}; free some space or add a node"
                )
            self._serial += 1
            serial = self._serial
            path = f"tmp/{_TEMPORARY}{serial}-{block[:16]}"
            return BlockWriter(self, block, size, serial, path, await self._disk.open(path, create=True, direct=True))
        except BaseException as error:
            self._note(error)
            self._end(block, size)
            raise

    def _end(self, block: BlockId, size: int) -> None:
        """A writer is done, in whatever way."""
        self._reserved_bytes -= size
        self._writing[block] -= 1
        if not self._writing[block]:
            del self._writing[block]

    def _note(self, error: BaseException) -> None:
        if isinstance(error, DiskFailed) and not self.problem:
            self.problem = str(error)
            log.error("disk fails: no block is taken", extra={"error": self.problem})

    async def probe(self) -> None:
        """Find out whether a disk that failed works again. Never raises an IdunnoError."""
        try:
            file = await self._disk.open(f"tmp/{_PROBE}", create=True)
            try:
                await file.write(0, [bytes(4096)], sync=True)
            finally:
                await file.close()
            await self._disk.remove(f"tmp/{_PROBE}")
        except (DiskFailed, NotFound) as error:
            self.problem = str(error)
            return
        if self.problem:
            log.warning("disk works again: blocks are taken", extra={"was": self.problem})
        self.problem = ""

    async def _publish(self, writer: BlockWriter) -> None:
        directory = writer.block[:2]
        if directory not in self._directories:
            await self._disk.make_directory(f"blocks/{directory}")
            self._directories.add(directory)
        async with self._names:
            await self._disk.rename(writer.path, _path(writer.block))
            if writer.block in self._held:
                self._held[writer.block] = (writer.size, writer.serial)
        try:
            await self._disk.sync_directory(f"blocks/{directory}")
        except DiskFailed:
            # The name may still lead to the older file after a loss of power, and that one may be rotten.
            self._doubt(writer.block, writer.serial)
            raise
        fresh = writer.block not in self._held or writer.block in self._doubtful
        self._held[writer.block] = (writer.size, writer.serial)
        self._doubtful.discard(writer.block)
        if fresh:
            self._tell(writer.block, True)

    # -- reading ------------------------------------------------------------------------------------------------------

    async def read(self, block: BlockId, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """The bytes [offset, offset + length) in pieces of at most READ_BYTES; use under `contextlib.aclosing`.

        A read of the whole block is verified: Corrupt comes after the last piece, and the block is no longer held.
        Raises NotFound, DiskFailed, and InvalidArgument for a range outside the block.
        """
        size, serial = self.size(block), self._held[block][1]
        if not (offset >= 0 and length >= 0 and offset + length <= size):
            raise InvalidArgument(f"block {block[:16]} has {size} bytes, not {offset} to {offset + length}")
        digest = Digest() if length == size else None
        also = digest.update if digest is not None else None
        file = await self._open_held(block, serial)
        at, end = offset, offset + length
        coming: asyncio.Task[bytes] | None = None  # while a piece is sent, the next is read and hashed
        try:
            while at < end:
                coming = coming or asyncio.create_task(file.read(at, min(READ_BYTES, end - at), also=also))
                await asyncio.wait([coming])
                try:
                    piece = coming.result()
                except DiskFailed as error:
                    # Not quarantined: what the device or the system refused once (no more descriptors, a passing error)
                    # says nothing about the content, and it may be the last copy. The reader asks another replica, and
                    # until it has been read well again nobody counts on this one.
                    self._note(error)
                    self._doubt(block, serial)
                    raise
                if not piece:
                    await self._quarantine(block, serial, f"ends at {at} of {size} bytes")
                at, coming = at + len(piece), None
                if at < end:
                    coming = asyncio.create_task(file.read(at, min(READ_BYTES, end - at), also=also))
                yield piece
        finally:
            try:
                if coming is not None:
                    coming.add_done_callback(_looked_at)
                    await asyncio.wait([coming])
            finally:  # also for who is cancelled once more while he waits for a slow disk
                await file.close()
        if digest is None:
            return
        if digest.block() != block:
            await self._quarantine(block, serial, "has other content than its name says")
        if block in self._doubtful:
            await self._trust_again(block, serial)

    async def _trust_again(self, block: BlockId, serial: int) -> None:
        """What was in doubt was read well: once its name is synced too, others may count on it again."""
        try:
            await self._disk.sync_directory(f"blocks/{block[:2]}")
        except DiskFailed as error:
            self._note(error)
            return
        if block in self._doubtful and self._held.get(block, (0, -1))[1] == serial:
            self._doubtful.discard(block)
            self._tell(block, True)

    async def verify(self, block: BlockId) -> bool:
        """Whether the block is held, synced, and on the disk as its name says: it is read again from end to end."""
        if block not in self._held:
            return False
        try:
            async for _ in self.read(block, 0, self.size(block)):
                pass
        except (Corrupt, NotFound, DiskFailed):
            return False
        return block in self._held and block not in self._doubtful

    async def _open_held(self, block: BlockId, serial: int) -> File:
        try:
            return await self._disk.open(_path(block), direct=True)
        except NotFound:
            self._gone(block, serial)
            raise NotFound(f"block {block[:16]} is not here: its file has gone") from None

    async def _quarantine(self, block: BlockId, serial: int, why: str) -> NoReturn:
        """Stop holding a rotten block. Always raises Corrupt."""
        log.error("block is corrupt", extra={"block": block, "why": why})
        async with self._names:
            if self._gone(block, serial):  # of two readers that find it, the first moves it
                self.rotten += 1
                try:
                    if len(await self._disk.list("quarantine")) < QUARANTINE_FILES_MAX:
                        await self._disk.rename(_path(block), f"quarantine/{block}")
                    else:
                        await self._disk.remove(_path(block))
                    await self._disk.sync_directory(f"blocks/{block[:2]}")
                except (DiskFailed, NotFound) as error:  # held no more all the same; found and refused again at a start
                    log.warning("quarantine failed", extra={"block": block, "error": str(error)})
        raise Corrupt(f"block {block[:16]} on this node {why}; it was put into quarantine")

    def _gone(self, block: BlockId, serial: int) -> bool:
        if self._held.get(block, (0, -1))[1] != serial:
            return False
        del self._held[block]
        self._doubtful.discard(block)
        self._tell(block, False)
        return True

    def _doubt(self, block: BlockId, serial: int) -> None:
        if block not in self._doubtful and self._held.get(block, (0, -1))[1] == serial:
            self._doubtful.add(block)
            log.error("block cannot be read", extra={"block": block})
            self._tell(block, False)

    def _tell(self, block: BlockId, held: bool) -> None:
        if self.on_change is not None:
            self.on_change(block, held)

    # -- removing -----------------------------------------------------------------------------------------------------

    def is_written(self, block: BlockId) -> bool:
        """Whether somebody writes it now."""
        return block in self._writing

    def take_out(self, block: BlockId) -> None:
        """Stop holding the block, at once; `erase` it then. The caller has made sure that nobody counts on this copy."""
        assert block not in self._writing, "only what is at rest is removed"
        self._gone(block, self._held[block][1])

    async def erase(self, block: BlockId) -> None:
        """Remove the file of a block that was taken out, unless it has come again since. Raises DiskFailed."""
        async with self._names:
            if block in self._held or block in self._writing:
                return  # the file is, or will be, that of the newer copy
            try:
                await self._disk.remove(_path(block))
            except NotFound:
                return

    async def quarantined(self) -> list[BlockId]:
        return [BlockId(entry.name) for entry in await self._disk.list("quarantine") if not entry.is_directory]

    async def clear_quarantine(self, block: BlockId) -> None:
        try:
            await self._disk.remove(f"quarantine/{block}")
        except NotFound:
            return


class BlockWriter:
    """One block on its way to the disk. `append` its bytes in order, then `finish`; whatever happens, `close` it.

    While one batch is hashed and written, the next is gathered: 2 * WRITE_BYTES are held at most, and CROWDED_WRITE_BYTES when
    all writers together hold more than BUFFERED_BYTES_MAX.
    """

    def __init__(self, store: BlockStore, block: BlockId, size: int, serial: int, path: str, file: File) -> None:
        self.block, self.size, self.serial, self.path = block, size, serial, path
        self._store, self._file = store, file
        self._digest = Digest()
        self._pieces: list[Buffer] = []
        self._pieces_bytes = 0
        self._written = 0  # what was handed to the disk
        self._flushing: asyncio.Task[None] | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._state = "open"  # -> published
        self._closing: asyncio.Task[None] | None = None

    async def append(self, data: Buffer) -> None:
        """The next bytes; the buffer must not change afterwards. Raises InvalidArgument beyond `size`, and DiskFailed,
        perhaps for what was appended before."""
        if self._written + self._pieces_bytes + len(data) > self.size:
            raise InvalidArgument(f"block {self.block[:16]} was announced with {self.size} bytes, more came")
        self._pieces.append(data)
        self._pieces_bytes += len(data)
        self._store.buffered_bytes += len(data)
        enough = CROWDED_WRITE_BYTES if self._store.crowded else WRITE_BYTES
        if self._pieces_bytes >= enough or len(self._pieces) >= PIECES_MAX:
            await self._settled()
            self._begin_flush()
            if self._store.crowded:
                await self._settled()

    def _begin_flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        length, self._pieces_bytes = self._pieces_bytes, 0
        offset, self._written = self._written, self._written + length
        self._flushing = asyncio.create_task(self._flush(offset, pieces, length), name=f"write {self.block[:16]}")

    async def _flush(self, offset: int, pieces: list[Buffer], length: int) -> None:
        try:
            await self._file.write(offset, pieces, also=self._digest.update)
        except DiskFailed as error:
            self._store._note(error)
            raise
        finally:
            self._store.buffered_bytes -= length

    async def _settled(self) -> None:
        """Until the batch under way is written. Raises DiskFailed."""
        if (flushing := self._flushing) is not None:
            await asyncio.wait([flushing])  # not the task itself: who is cancelled here must not cancel it
            self._flushing = None
            flushing.result()

    async def finish(self) -> None:
        """Verify, sync, publish. On return the block survives a loss of power. Raises DecodeError when the bytes are not
        the block's, DiskFailed."""
        assert self._state == "open", f"finish of a block that is {self._state}"
        await self._settled()
        if self._pieces:
            self._begin_flush()
            await self._settled()
        if self._written != self.size or self._digest.block() != self.block:
            raise DecodeError(
                f"{self._written} of {self.size} bytes came that are not block {self.block[:16]}; send again"
            )
        try:
            await self._file.sync()
            # To its end, whoever waits: a file that has its name and is held by nobody would lie there until the next start.
            self._publishing = asyncio.create_task(self._store._publish(self), name=f"publish {self.block[:16]}")
            await asyncio.wait([self._publishing])
            self._publishing.result()
        except DiskFailed as error:
            self._store._note(error)
            raise
        self._state = "published"

    async def close(self) -> None:
        """Let go. Without a finished `finish` the temporary file is removed. Never raises an IdunnoError."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close {self.block[:16]}")
        await asyncio.shield(self._closing)  # to its end, whoever waits: who was cancelled may be cancelled again here

    async def _close(self) -> None:
        published = self._state == "published"
        if self._publishing is not None and not published:
            await asyncio.wait([self._publishing])
            published = not self._publishing.cancelled() and self._publishing.exception() is None
        self._store._end(self.block, self.size)
        self._store.buffered_bytes -= self._pieces_bytes
        self._pieces, self._pieces_bytes = [], 0
        try:
            try:
                with contextlib.suppress(DiskFailed):  # noted already, and nobody wants these bytes any more
                    await self._settled()
            finally:
                await self._file.close()
            if not published:
                await self._store._disk.remove(self.path)
        except NotFound:
            pass  # it was renamed, and what came after the renaming failed: a whole block, found at the next start
        except IdunnoError as error:
            log.warning("temporary file stays until the next start", extra={"path": self.path, "error": str(error)})


def _looked_at(reading: asyncio.Task[bytes]) -> None:
    """Who stopped reading has no use for what was still coming, nor for its error."""
    if not reading.cancelled():
        reading.exception()


def _path(block: BlockId) -> str:
    return f"blocks/{block[:2]}/{block}"


def _is_block(name: str, directory: str) -> bool:
    try:
        return check_block_id(name)[:2] == directory
    except InvalidArgument:
        return False

# idunno/node/survivors.py: what stopped nodes' directories hold: how far their logs go, the machine at their end, their contents.
#
# Rule 1: looking changes nothing (looking.py).
# Rule 2: all entries of the newest log are taken, committed or not: one that was acknowledged is among them, or it is lost.
# Rule 3: a log that cannot be read is no end of the matter: its snapshot holds only what was committed, and counts in its place.
from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from idunno.base.errors import Corrupt, DecodeError, DiskFailed, IdunnoError, Incompatible, NotFound
from idunno.base.ids import BlockId, Index, Term
from idunno.consensus import snapshot as files
from idunno.consensus.log import Log
from idunno.consensus.readmission import PATH as READMISSION_PATH
from idunno.consensus.terms import Terms
from idunno.coordinator import snapshot as snapshots
from idunno.coordinator.effects import KeepSmall
from idunno.coordinator.keeper import small_blocks
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import BLOCK_BYTES_MAX
from idunno.node.config import load_config
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.node.identity import BOOT_FILE, Identity, load_identity
from idunno.node.looking import LookingDisk
from idunno.node.outcast import QUARANTINE_PATH
from idunno.sdfs.small import SmallStore

BATCH_BYTES: Final = 1024 * 1024
BATCH_ENTRIES: Final = 1024
SMALLS_AT_ONCE: Final = 1024
"""4 MiB of contents: a quarter of what the store's queue takes."""


@dataclass(slots=True)
class Survivor:
    directory: Path
    identity: Identity
    name: str
    address: str
    boot: int
    position: tuple[int, int] = (0, 0)
    """Term and index of its newest entry; (0, 0): it has none that can be read."""
    term: int = 0  # the highest it took part in
    base: int = 0  # the log holds entries behind this
    problem: str = ""
    use_log: bool = True  # False: only its snapshot can be read
    is_old: bool = False  # it may lack what it acknowledged: it is used, and proves nothing
    terms: Terms = field(default_factory=Terms)
    blocks: dict[BlockId, int] = field(default_factory=dict)


@asynccontextmanager
async def _looking(directory: Path) -> AsyncIterator[LookingDisk]:
    offload = ThreadOffload(1, "look")
    try:
        yield LookingDisk(RealDisk(str(directory), offload))
    finally:
        offload.close()


async def look(directory: Path) -> Survivor:
    """How far this directory's log goes, and which blocks it holds. Raises InvalidArgument, Corrupt (no node's directory)."""
    identity, config = load_identity(directory), load_config(directory)
    found = Survivor(directory, identity, config.name, config.address, _boot(directory))
    found.blocks = dict(blocks_of(directory))
    if (directory / QUARANTINE_PATH).exists():
        found.problem, found.use_log = "its machine differed from the others': its log and snapshot are not used", False
        return found
    if (directory / READMISSION_PATH).exists():
        found.is_old = True
        found.problem = "its log is an old one, as the others found: it may lack what it acknowledged"
    async with _looking(directory) as disk:
        head = await _head(disk, found)
        try:
            log = await Log.open(disk, snapshot=(head.index, head.term) if head is not None else None)
        except (Corrupt, NotFound, DiskFailed, Incompatible, DecodeError) as error:
            found.problem, found.use_log = found.problem or str(error), False
            if head is not None:
                found.terms = Terms(head.index, head.term)
        else:
            found.terms, found.term = log.terms, int(log.hard.term)
    found.position = (int(found.terms.last_term), int(found.terms.last))
    found.base, found.term = int(found.terms.base), max(found.term, found.position[0])
    return found


async def _head(disk: LookingDisk, found: Survivor) -> files.Head | None:
    try:
        reader = await files.Reader.open(disk, files.PATH)
    except NotFound:
        return None
    except (Corrupt, Incompatible, DiskFailed) as error:
        found.problem = str(error)
        return None
    await reader.close()
    return reader.head


def _boot(directory: Path) -> int:
    try:
        return int((directory / BOOT_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def blocks_of(directory: Path) -> Iterator[tuple[BlockId, int]]:
    """The blocks below a directory, by name and size."""
    for folder in sorted((directory / "blocks").glob("[0-9a-f][0-9a-f]")):
        for path in folder.iterdir():
            size = path.stat().st_size
            if is_block_path(path) and 0 < size <= BLOCK_BYTES_MAX:
                yield BlockId(path.name), size


def is_block_path(path: Path) -> bool:
    return len(path.name) == 64 and path.name[:2] == path.parent.name and set(path.name) <= set("0123456789abcdef")


async def replay(survivor: Survivor) -> tuple[Machine, dict[BlockId, bytes]]:
    """The machine at the end of this one's log, and the small contents that its entries bring.

    Raises Corrupt (nothing to be had here), Incompatible (another version's).
    """
    smalls: dict[BlockId, bytes] = {}
    async with _looking(survivor.directory) as disk:
        machine = await _from_snapshot(disk)
        if not survivor.use_log:
            return machine, smalls
        log = await Log.open(disk, snapshot=await _place(disk))
        terms, first = log.terms, machine.index + 1
        if terms.base > machine.index:
            raise Corrupt(
                f"{survivor.directory}: the log begins behind entry {terms.base}, the snapshot ends before it"
            )
        while first <= terms.last:
            last, _ = terms.batch_end(first, BATCH_BYTES, BATCH_ENTRIES)
            for index, payload in enumerate(await log.read(first, last), first):
                _apply(machine, Index(index), payload, smalls)
            first = last + 1
    return machine, smalls


def _apply(machine: Machine, index: Index, payload: bytes, smalls: dict[BlockId, bytes]) -> None:
    try:
        applied = machine.apply(index, payload)
    except DecodeError as error:
        raise Incompatible(f"entry {index} is of a newer idunno: use that one ({error})") from None
    smalls.update((effect.block, effect.content) for effect in applied.effects if isinstance(effect, KeepSmall))


async def _place(disk: LookingDisk) -> tuple[Index, Term] | None:
    try:
        reader = await files.Reader.open(disk, files.PATH)
    except NotFound:
        return None
    await reader.close()
    return reader.head.index, reader.head.term


async def _from_snapshot(disk: LookingDisk) -> Machine:
    try:
        reader = await files.Reader.open(disk, files.PATH)
    except NotFound:
        return Machine()
    try:
        content = snapshots.Reader()
        async for piece in reader.content():
            content.feed(piece)
        return Machine.restored(content)
    finally:
        await reader.close()


async def newest(survivors: Iterable[Survivor]) -> tuple[Survivor, Machine, dict[BlockId, bytes]]:
    """The survivor whose log goes furthest, and its machine; when it turns out to be damaged, the next one. Raises Corrupt."""
    for survivor in sorted(survivors, key=lambda found: found.position, reverse=True):
        if survivor.position == (0, 0):
            continue
        try:
            machine, smalls = await replay(survivor)
        except (Corrupt, NotFound) as error:
            survivor.problem, survivor.position = survivor.problem or str(error), (0, 0)
            survivor.use_log = False
            continue
        if machine.roster.cluster:
            return survivor, machine, smalls
    raise Corrupt(
        "no log of these directories can be read: find another survivor, or restore a backup (`idunno restore`)"
    )


# -- small contents ---------------------------------------------------------------------------------------------------


def small_wanted(machine: Machine) -> dict[BlockId, None]:
    """The small contents that the machine refers to."""
    wanted: dict[BlockId, None] = {}

    def note(kind: str, record: object) -> None:
        wanted.update((block.block, None) for block in small_blocks(kind, record))

    for _ in machine.capture(note):
        pass
    return wanted


async def small_missing(directories: Iterable[Path], wanted: Iterable[BlockId]) -> set[BlockId]:
    """Those that none of the directories holds."""
    missing = set(wanted)
    for directory in directories:
        async with _looking(directory) as disk:
            store = SmallStore(disk, _at_once)
            await store.open()
            missing = {block for block in missing if block not in store or await store.get(block) is None}
            await store.close()
    return missing


async def share_smalls(
    directories: Iterable[Path], wanted: Iterable[BlockId], given: dict[BlockId, bytes], sources: Iterable[Path]
) -> None:
    """Each directory's store has, on the disk, all that is wanted and that `given` or one of the sources has."""
    wanted, sources = list(wanted), list(sources)
    for directory in directories:
        async with _store(directory) as store:
            lacking = [block for block in wanted if block not in store]
            await _keep(store, ((block, given[block]) for block in lacking if block in given))
            for source in sources:
                lacking = [block for block in lacking if block not in store]
                if lacking and source != directory:
                    await _copy(store, source, lacking)


async def add_smalls(directory: Path, contents: Iterable[list[tuple[BlockId, bytes]]]) -> None:
    """The directory's store has these too, on the disk."""
    async with _store(directory) as store:
        await _keep(store, (small for batch in contents for small in batch))


async def _copy(store: SmallStore, source: Path, lacking: list[BlockId]) -> None:
    async with _looking(source) as disk:
        other = SmallStore(disk, _at_once)
        await other.open()
        for at in range(0, len(lacking), SMALLS_AT_ONCE):
            found = [(block, await other.get(block)) for block in lacking[at : at + SMALLS_AT_ONCE]]
            await _keep(store, ((block, content) for block, content in found if content is not None))
        await other.close()


async def _keep(store: SmallStore, contents: Iterable[tuple[BlockId, bytes]]) -> None:
    for count, (block, content) in enumerate(contents, 1):
        store.keep(block, content)
        if count % SMALLS_AT_ONCE == 0:
            await store.flush()
    await store.flush()


@asynccontextmanager
async def _store(directory: Path) -> AsyncIterator[SmallStore]:
    offload = ThreadOffload(1, "small")
    try:
        store = SmallStore(RealDisk(str(directory), offload), _at_once)
        await store.open()
        try:
            yield store
        finally:
            await store.close()
    finally:
        offload.close()


async def _at_once(work, /):  # type: ignore[no-untyped-def]  # Offload: nobody else waits here
    return work()


__all__ = ["IdunnoError", "Survivor", "look", "newest", "replay", "share_smalls", "small_missing", "small_wanted"]

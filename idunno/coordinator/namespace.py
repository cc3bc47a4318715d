# idunno/coordinator/namespace.py: the files: names, versions, open puts. Never content, never where a block is.
#
# Rule 1: a version number rises per name and goes on after a delete, so "version 3" means one content for ever.
# Rule 2: a put's id is found in what it made: retried, it gets the same version. A deleted file leaves a tombstone that knows
#         the delete's request and the last puts before it.
# Rule 3: an open put ends by commit or by an ordered abort, nothing else; after that a commit is refused.
# Rule 4: what is deleted lies in the trash (trash.py) until it is purged, but for the system's own names: these are gone at once.
# Rule 5: every method either raises and has changed nothing, or has done all of it.
# Rule 6: until the cluster's machine version is raised everything is done as its version does it: releases side by side agree.
from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise, takewhile
from typing import Final

import msgspec
from blake3 import blake3

from idunno.base.errors import Conflict, Exhausted, InvalidArgument, NotFound
from idunno.base.ids import BlockId, check_file_name
from idunno.coordinator import history
from idunno.coordinator.aged import Aged
from idunno.coordinator.commands import BeginPut, CommitPut, PutSmall
from idunno.coordinator.history import Versions
from idunno.coordinator.names import SYSTEM, check_request, is_block_id
from idunno.coordinator.ordered import OrderedNames
from idunno.coordinator.records import BLOCK_BYTES_MAX, SMALL_BYTES_MAX, Block, OpenPut, Record, VersionRecord
from idunno.coordinator.results import Done, FileGone, PutDone, PutOpen
from idunno.coordinator.rows import Row, runs
from idunno.coordinator.steps import free
from idunno.coordinator.trash import Retention, RetentionRule, Trash, TrashEntry

BLOCKS_MAX: Final = 6_000
"""Blocks of one version: 46 GiB, and a commit of at most 500 kB: a log entry has 512 KiB at most."""
OPEN_PUTS_MAX: Final = 10_000
OPEN_PUTS_OF_ONE_MAX: Final = 2_000
"""Of one user or node: nobody keeps the others from putting."""
TOMBSTONES_MAX: Final = 1_000_000
"""Deleted names whose version numbers go on. Beyond it the longest deleted is forgotten and would begin at 1 again."""
PUTS_REMEMBERED: Final = 8
"""Puts that a tombstone knew until machine version 3."""
PUTS_BURIED: Final = 64
"""Puts that a name's deletions know: more than come and go, with deletes among them, while a put is tried again."""


class MadeBefore(Record, frozen=True):
    """What a put made that was deleted since."""

    put: str
    version: int
    size: int
    created_ms: int


class Deletion(Record, frozen=True):
    """The last delete of a name."""

    request: str
    deleted_ms: int
    versions: int
    puts: tuple[MadeBefore, ...] = ()


class FileState(Record, frozen=True):
    name: str
    last: int  # the highest version number given so far
    versions: tuple[VersionRecord, ...] = ()  # rising; () when the file is deleted
    deletion: Deletion | None = None


class NamespaceState(Record, frozen=True):
    files: tuple[FileState, ...] = ()
    tombstones: tuple[FileState, ...] = ()  # longest deleted first
    puts: tuple[OpenPut, ...] = ()  # oldest first
    trash: tuple[TrashEntry, ...] = ()  # oldest first
    trash_last: int = 0
    retention: tuple[RetentionRule, ...] = ()


class _File(msgspec.Struct, gc=False):
    # Neither this nor a tuple of records is searched for garbage: with lists, a search held the loop 0.3 s at a million files.
    last: int
    versions: Versions
    deletion: Deletion | None
    captures: int = 0  # how many captures there had been: a later one holds this very object


class Namespace:
    def __init__(self, state: NamespaceState | None = None, version: int = 1) -> None:
        """`version`: the cluster's machine version."""
        state = state if state is not None else NamespaceState()
        self._version = 1
        self._captures = 0
        self._files = Aged[str, _File]()
        self._tombstones = Aged[str, _File]()
        self._names = OrderedNames([file.name for file in state.files])
        self._puts: dict[str, OpenPut] = {}
        self._puts_of: dict[str, int] = {}  # by owner
        for put in state.puts:
            self._open(put)
        self.trash = Trash(state.trash, state.trash_last)
        self.retention = Retention(state.retention)
        self._made: dict[
            str, tuple[str, int]
        ] = {}  # put -> name, version; of files, tombstones, expired versions in the trash
        for kept, into in ((state.files, self._files), (state.tombstones, self._tombstones)):
            for file in kept:
                into[file.name] = _File(file.last, history.of(file.versions), file.deletion)
                for before in file.deletion.puts if file.deletion is not None else ():
                    self._made[before.put] = (file.name, before.version)
                for record in file.versions:
                    self._made[record.request] = (file.name, record.version)
        self._made.pop("", None)
        self.raise_version(version)
        # Files outside .idunno/
        self.files = sum(not name.startswith(SYSTEM) for name in self._names)

    def free(self) -> None:
        """Nobody looks at it any more: let go of it, in steps."""
        self._files.free()
        self._tombstones.free()
        self.trash.entries.free()
        free(self._made)
        self._names.free()

    def raise_version(self, version: int) -> None:
        """Do as this machine version does from now on."""
        if self._version < 2 <= version:
            expired = [entry for entry in self.trash.entries.values() if entry.expired]
            made = {r.request: (entry.name, r.version) for entry in expired for r in entry.versions if r.request}
            for name, file in chain(self._files.items(), self._tombstones.items()):
                for before in file.deletion.puts if file.deletion is not None else ():
                    made[before.put] = (name, before.version)
            # Version 1 forgot them, so a retry may have made a newer one: that one counts.
            for put, version_of in made.items():
                self._made.setdefault(put, version_of)
        self._version = max(self._version, version)

    def state(self) -> NamespaceState:
        def record(name: str, file: _File) -> FileState:
            return FileState(name, file.last, tuple(file.versions), file.deletion)

        return NamespaceState(
            tuple(record(name, self._files[name]) for name in self._names),
            tuple(record(name, file) for name, file in self._tombstones.items()),
            tuple(self._puts.values()),
            tuple(self.trash.entries.values()),
            self.trash.last,
            self.retention.rules(),
        )

    def capture(self) -> Iterator[Row]:
        """Rows for a snapshot, as things are now."""
        self._captures += 1
        empty = NamespaceState(trash_last=self.trash.last)
        return _rows(
            empty,
            self._files.capture(),
            self._tombstones.capture(),
            list(self._puts.values()),
            self.trash.entries.capture(),
            self.retention.rules(),
        )

    def _own(self, table: Aged[str, _File], name: str) -> _File:
        """The file, to be changed: a copy of it when a capture holds it."""
        file = table[name]
        if file.captures != self._captures:
            file = table[name] = _File(file.last, file.versions, file.deletion, self._captures)
        return file

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, name: str) -> VersionRecord | None:
        """The current version."""
        file = self._files.get(name)
        return file.versions[-1] if file is not None else None

    def latest(self, name: str) -> VersionRecord:
        """Raises NotFound."""
        return self._file(name).versions[-1]

    def version(self, name: str, version: int) -> VersionRecord:
        """Raises NotFound."""
        file = self._file(name)
        at = bisect_left(file.versions, version, key=lambda record: record.version)
        if at == len(file.versions) or file.versions[at].version != version:
            there = f"{file.versions[0].version} to {file.versions[-1].version}"
            raise NotFound(f"{name} has no version {version}, it has {there}; see `idunno versions {name}`")
        return file.versions[at]

    def as_of(self, name: str, at_ms: int) -> VersionRecord:
        """The version that was current at that machine time. Raises NotFound."""
        file = self._file(name)
        at = bisect_right(file.versions, at_ms, key=lambda record: record.created_ms)
        if at == 0:
            raise NotFound(f"{name} has no version that old; see `idunno versions {name}`")
        return file.versions[at - 1]

    def last(self, name: str, count: int) -> tuple[VersionRecord, ...]:
        """The last `count` versions, newest first. Raises NotFound."""
        return self._file(name).versions[: -count - 1 : -1] if count > 0 else ()

    def history(self, name: str) -> Sequence[VersionRecord]:
        """All versions, as they are now, rising; () when there is no such file."""
        file = self._files.get(name)
        return file.versions if file is not None else ()

    def names(self, prefix: str, after: str, limit: int, *, system: bool = False) -> tuple[list[str], bool]:
        """Up to `limit` names with that prefix, greater than `after`, sorted; and whether there are more.

        The system's own are left out unless `system` or the prefix lies within them.
        """
        begin = max(prefix, after + "\0")  # the least that is greater than `after`
        if system or prefix.startswith(SYSTEM):
            names = self._names.span(begin)
        else:
            names = chain(self._names.span(begin, SYSTEM), self._names.span(max(begin, _behind(SYSTEM))))
        found = list(islice(takewhile(lambda name: name.startswith(prefix), names), limit + 1))
        return found[:limit], len(found) > limit

    def each(self) -> Iterator[tuple[str, VersionRecord]]:
        """Every version of every file, by name and version, the system's own included. Not to be held across awaits."""
        for name in self._names:
            for record in self._files[name].versions:
                yield name, record

    def open_put(self, put: str) -> OpenPut | None:
        return self._puts.get(put)

    def open_puts(self) -> list[OpenPut]:
        """Oldest first."""
        return list(self._puts.values())

    def made(self, put: str) -> tuple[str, int] | None:
        """Name and version that a put made, also when it was deleted since."""
        return self._made.get(put)

    def _file(self, name: str) -> _File:
        file = self._files.get(name)
        if file is None:
            raise NotFound(f"no file {name[:200]!r}; see `idunno ls`")
        return file

    # -- puts ---------------------------------------------------------------------------------------------------------

    def begin(self, command: BeginPut, owner: str, now_ms: int) -> PutOpen:
        made = self._made_by(command.put, command.name, owner)
        if made is not None:
            return PutOpen(command.put, command.name, made)
        open_put = self._puts.get(command.put)
        if open_put is not None:
            if (open_put.name, open_put.owner) != (command.name, owner):
                raise Conflict(f"put {command.put} is open already for {open_put.name}; a new put needs a new id")
            return PutOpen(command.put, command.name)
        check_request("put", command.put)
        check_file_name(command.name, system=True)
        self._check_expected(command.name, command.if_version)
        if len(self._puts) >= OPEN_PUTS_MAX:
            raise Exhausted(f"{OPEN_PUTS_MAX} puts are open, the bound; try again when some have ended")
        if self._version >= 2 and self._puts_of.get(owner, 0) >= OPEN_PUTS_OF_ONE_MAX:
            raise Exhausted(
                f"{OPEN_PUTS_OF_ONE_MAX} puts of {owner} are open, the most of one user; end some, or wait: those that nobody "
                "goes on with are aborted after an hour"
            )
        self._open(OpenPut(command.put, command.name, owner, now_ms, command.if_version, command.node))
        return PutOpen(command.put, command.name)

    def commit(self, command: CommitPut, owner: str, now_ms: int) -> PutDone:
        """`owner`: who commits; the version belongs to who began the put."""
        open_put = self._puts.get(command.put)
        if open_put is None:
            made = self._made_by(command.put, command.name, owner)
            if made is not None:
                return PutDone(command.name, made.version, made.size, made.created_ms)
            raise Conflict(f"put {command.put} of {command.name[:200]} is not open: it was aborted, or never begun")
        if open_put.name != command.name:
            raise Conflict(f"put {command.put} is open for {open_put.name}, not for {command.name[:200]}")
        check_blocks(command.blocks, command.size)
        self._check_expected(command.name, open_put.if_version)
        self._close(command.put)
        return self.add(command.name, command.size, command.blocks, open_put.owner, command.put, now_ms, small=False)

    def put_small(self, command: PutSmall, owner: str, now_ms: int) -> PutDone:
        made = self._made_by(command.put, command.name, owner)
        if made is not None:
            return PutDone(command.name, made.version, made.size, made.created_ms)
        check_request("put", command.put)
        if command.name not in self._files:  # else it was checked when its first version was made
            check_file_name(command.name, system=True)
        block = small_block(command.content)
        if block.block != command.block:
            raise InvalidArgument(
                f"content of {command.name} is block {block.block[:16]}, not {command.block[:16]} as it says"
            )
        open_put = self._puts.get(command.put)
        if open_put is not None and (open_put.name, open_put.owner) != (command.name, owner):
            raise Conflict(f"put {command.put} is open already for {open_put.name}; a new put needs a new id")
        self._check_expected(command.name, command.if_version)
        self._close(command.put)
        return self.add(command.name, block.size, (block,), owner, command.put, now_ms, small=True)

    def abort(self, put: str) -> Done:
        """Idempotent: an open put ends; what is committed stays."""
        return Done(changed=self._close(put))

    def _open(self, put: OpenPut) -> None:
        self._puts[put.put] = put
        self._puts_of[put.owner] = self._puts_of.get(put.owner, 0) + 1

    def _close(self, put: str) -> bool:
        """Whether it was open."""
        closed = self._puts.pop(put, None)
        if closed is None:
            return False
        self._puts_of[closed.owner] -= 1
        if not self._puts_of[closed.owner]:
            del self._puts_of[closed.owner]
        return True

    def add(
        self, name: str, size: int, blocks: tuple[Block, ...], owner: str, request: str, now_ms: int, *, small: bool
    ) -> PutDone:
        """A new version, all checks done. `request`: the put that made it, "" for one that no retry asks for."""
        if name not in self._files:
            buried = self._tombstones.pop(name)
            self._files[name] = buried if buried is not None else _File(0, (), None, self._captures)
            self._names.add(name)
            self.files += not name.startswith(SYSTEM)
        file = self._own(self._files, name)
        file.last += 1
        record = VersionRecord(file.last, size, blocks, now_ms, owner, request, small)
        file.versions = history.and_one(file.versions, record)
        if request:
            self._made[request] = (name, file.last)
        return PutDone(name, file.last, size, now_ms)

    def _made_by(self, put: str, name: str, owner: str) -> VersionRecord | None:
        """The version that this put made; without its blocks when it was deleted since."""
        made = self._made.get(put)
        if made is None:
            return None
        if made[0] != name:
            raise Conflict(f"put {put} made version {made[1]} of {made[0]}; a put of {name[:200]} needs a new id")
        file = self._files.get(name) or self._tombstones.get(name)
        if file is not None:
            at = bisect_left(file.versions, made[1], key=lambda record: record.version)
            if at < len(file.versions) and file.versions[at].request == put:
                return file.versions[at]
        expired = (r for entry in self.trash.of(name) if entry.expired for r in entry.versions)
        deleted = file.deletion.puts if file is not None and file.deletion is not None else ()
        gone: VersionRecord | MadeBefore
        for gone in chain[VersionRecord | MadeBefore](expired, deleted):
            if gone.version == made[1]:
                return VersionRecord(gone.version, gone.size, (), gone.created_ms, owner, put)
        raise AssertionError(f"put {put} points to version {made[1]} of {name}, which is nowhere")

    def _check_expected(self, name: str, if_version: int | None) -> None:
        if if_version is None:
            return
        current = self.find(name)
        if if_version == 0 and current is not None:
            raise Conflict(f"{name} exists, in version {current.version}; the put wanted no file there (version 0)")
        if if_version != 0 and (current is None or current.version != if_version):
            there = f"is at version {current.version}" if current is not None else "does not exist (version 0)"
            raise Conflict(f"{name} {there}, the put wanted version {if_version}; read it again with `idunno get`")

    # -- removing -----------------------------------------------------------------------------------------------------

    def deleted_by(self, name: str, request: str) -> FileGone | None:
        """What this very request deleted before, if it did."""
        file = self._files.get(name) or self._tombstones.get(name)
        if request == "" or file is None or file.deletion is None or file.deletion.request != request:
            return None
        return FileGone(name, file.deletion.versions)

    def last_deletion(self, name: str) -> str:
        """The request of the last delete of `name`, "" if there was none."""
        file = self._files.get(name) or self._tombstones.get(name)
        return file.deletion.request if file is not None and file.deletion is not None else ""

    def delete(
        self, name: str, request: str, by: str, now_ms: int
    ) -> tuple[FileGone, tuple[VersionRecord, ...], list[VersionRecord]]:
        """Delete all versions; also says which, and which are gone for good. Raises NotFound. Ask `deleted_by` first."""
        self._file(name)
        file = self._own(self._files, name)
        versions = tuple(file.versions)
        file.versions, file.deletion = (), Deletion(request, now_ms, len(versions), self._buried(name, file))
        self._files.pop(name)
        self._names.remove(name)
        self.files -= not name.startswith(SYSTEM)
        self._tombstones[name] = file
        if len(self._tombstones) > TOMBSTONES_MAX:
            forgotten = self._tombstones.pop(self._tombstones.oldest())
            assert forgotten is not None
            self._forget_puts(forgotten, keep=0)
        if name.startswith(SYSTEM):
            return FileGone(name, len(versions)), versions, list(versions)
        self.trash.put(name, versions, now_ms, by, expired=False)
        return FileGone(name, len(versions)), versions, self._gone(self.trash.overflow())

    def _buried(self, name: str, file: _File) -> tuple[MadeBefore, ...]:
        """The last puts of a file that is deleted; the others are forgotten."""
        there = tuple(MadeBefore(v.request, v.version, v.size, v.created_ms) for v in file.versions if v.request)
        if self._version < 3:  # forgot those that an earlier delete had buried, and knew fewer
            recent = {version.version for version in file.versions[-PUTS_REMEMBERED:]}
            self._forget_puts(file, keep=PUTS_REMEMBERED)
            return tuple(put for put in there if put.version in recent)
        before = file.deletion.puts if file.deletion is not None else ()
        puts = (*before, *there)
        for put in puts[:-PUTS_BURIED]:
            if self._made.get(put.put) == (name, put.version):
                del self._made[put.put]
        return puts[-PUTS_BURIED:]

    def expire(self, name: str, numbers: tuple[int, ...], by: str, now_ms: int) -> tuple[Done, list[VersionRecord]]:
        """Move these versions into the trash, those that are there and not the current one; and what is gone for good."""
        file = self._files.get(name)
        if file is None or name.startswith(SYSTEM):
            return Done(changed=False), []
        kept, gone = history.without(file.versions, frozenset(numbers) - {file.versions[-1].version})
        if not gone:
            return Done(changed=False), []
        file = self._own(self._files, name)
        file.versions = kept
        if self._version < 2:
            for record in gone:
                self._made.pop(record.request, None)
        self.trash.put(name, gone, now_ms, by, expired=True)
        return Done(), self._gone(self.trash.overflow())

    def restore(self, name: str) -> int:
        """Bring back what the trash holds of that name; how many versions. Raises NotFound, Conflict."""
        entries = self.trash.of(name)
        if not entries:
            raise NotFound(f"the trash holds nothing of {name[:200]!r}; see `idunno trash ls`")
        there = self._files.get(name) or self._tombstones.get(name)
        known = there.versions if there is not None else ()
        came = _versions(entries)
        if self._version >= 2:
            came = self._without_repeated_puts(name, came)
        versions = tuple(sorted([*came, *known], key=lambda record: record.version))
        for one, next_one in pairwise(versions):
            if one.version == next_one.version or one.created_ms > next_one.created_ms:
                raise Conflict(
                    f"{name} was begun anew since at version 1, its old versions do not fit: `idunno get` and put"
                )
        if name not in self._files:
            buried = self._tombstones.pop(name)
            self._files[name] = buried if buried is not None else _File(0, (), None, self._captures)
            self._names.add(name)
            self.files += 1
        file = self._own(self._files, name)
        file.versions, file.last = history.of(versions), max(file.last, versions[-1].version)
        if file.deletion is not None:
            # A put is found in its version again. What the tombstone knew beside them went until machine version 3.
            back = {record.version for record in versions}
            puts = tuple(b for b in file.deletion.puts if b.version not in back) if self._version >= 3 else ()
            for before in file.deletion.puts:
                if before not in puts:
                    self._made.pop(before.put, None)
            file.deletion = Deletion(file.deletion.request, file.deletion.deleted_ms, file.deletion.versions, puts)
        for record in versions:
            if record.request:
                self._made[record.request] = (name, record.version)
        for entry in entries:
            self.trash.take(entry.entry)
        return len(_versions(entries))

    def _without_repeated_puts(self, name: str, came: list[VersionRecord]) -> list[VersionRecord]:
        """A put that was forgotten and came again made a second version, and that one counts: the first, out of the trash, no
        longer says that it is that put's. A put with two versions would be found in either, and forgotten with either."""
        kept, made = list[VersionRecord](), dict[str, tuple[str, int]]()
        for record in sorted(came, key=lambda record: record.version, reverse=True):
            this = (name, record.version)
            counts = record.request and made.setdefault(record.request, self._made.get(record.request, this)) == this
            kept.append(record if counts else msgspec.structs.replace(record, request=""))
        return kept

    def purge(self, numbers: tuple[int, ...]) -> list[VersionRecord]:
        """Take these entries out of the trash for good, those that are there; their versions."""
        taken = [self.trash.take(number) for number in numbers]
        return self._gone([entry for entry in taken if entry is not None])

    def _gone(self, entries: list[TrashEntry]) -> list[VersionRecord]:
        """These entries have left the trash for good; their versions."""
        for entry in entries:
            for record in entry.versions if entry.expired else ():
                if self._made.get(record.request) == (entry.name, record.version):
                    del self._made[record.request]
        return _versions(entries)

    def below(self, prefix: str) -> list[str]:
        """The names of all files below `prefix` (which ends in '/'), sorted."""
        return list(self._names.span(prefix, _behind(prefix)))

    def remove(self, names: list[str]) -> list[tuple[str, tuple[VersionRecord, ...]]]:
        """Remove these files (those that are there) without tombstones; says what was removed.

        For names that hold an id and never come again: a job's files, a deploy's.
        """
        gone: list[tuple[str, tuple[VersionRecord, ...]]] = []
        for name in names:
            file = self._files.pop(name)
            if file is not None:
                gone.append((name, tuple(file.versions)))
                self._names.remove(name)
                self._forget_puts(file, keep=0)
                self.files -= not name.startswith(SYSTEM)
        return gone

    def abort_below(self, prefix: str) -> None:
        """End the open puts of names below `prefix`."""
        for put in [put.put for put in self._puts.values() if put.name.startswith(prefix)]:
            self._close(put)

    def _forget_puts(self, file: _File, *, keep: int) -> None:
        """Forget which versions puts made, but for the last `keep` of those there; older tombstones' are forgotten too."""
        for before in file.deletion.puts if file.deletion is not None else ():
            self._made.pop(before.put, None)
        count = len(file.versions) - keep
        # Version 1 forgot some of fewer than `keep`, too: a count below zero was one from the end.
        if self._version >= 2:
            count = max(0, count)
        for record in file.versions[:count]:
            self._made.pop(record.request, None)


def _rows(
    empty: NamespaceState,
    files: list[dict[str, _File]],
    tombstones: list[dict[str, _File]],
    puts: list[OpenPut],
    trash: list[dict[int, TrashEntry]],
    retention: tuple[RetentionRule, ...],
) -> Iterator[Row]:
    yield "namespace", empty, 1
    for name, file in chain.from_iterable(part.items() for part in files):
        for versions, weight in runs(file.versions, _weight):
            yield "file", FileState(name, file.last, versions, file.deletion), weight
    for name, file in chain.from_iterable(part.items() for part in tombstones):
        yield "tombstone", FileState(name, file.last, (), file.deletion), 2
    for put in puts:
        yield "put", put, 1
    for entry in chain.from_iterable(part.values() for part in trash):
        for versions, weight in runs(entry.versions, _weight):
            yield "trash", msgspec.structs.replace(entry, versions=versions), weight
    for rule in retention:
        yield "retention", rule, 1


def _behind(prefix: str) -> str:
    """Greater than all names that begin with `prefix` (which ends in '/'), and than no name behind them."""
    return prefix[:-1] + chr(ord("/") + 1)


def _weight(record: VersionRecord) -> int:
    return 1 + len(record.blocks)


def _versions(entries: list[TrashEntry]) -> list[VersionRecord]:
    return [record for entry in entries for record in entry.versions]


def small_block(content: bytes) -> Block:
    """The block that a small content is. Raises InvalidArgument when it is too large for a command."""
    size = len(content)
    if size > SMALL_BYTES_MAX:
        raise InvalidArgument(f"{size} bytes do not ride in a command: at most {SMALL_BYTES_MAX}")
    return Block(BlockId(blake3(content).hexdigest()), size)


def check_blocks(blocks: tuple[Block, ...], size: int) -> None:
    """Raises InvalidArgument unless these can be the blocks of a version of `size` bytes."""
    if len(blocks) > BLOCKS_MAX:
        raise InvalidArgument(
            f"a version has at most {BLOCKS_MAX} blocks of {BLOCK_BYTES_MAX} bytes, not {len(blocks)}"
        )
    for block in blocks:
        if not is_block_id(block.block) or not 1 <= block.size <= BLOCK_BYTES_MAX:
            raise InvalidArgument(
                f"block {block.block[:70]!r} of {block.size} bytes: a block is named by 64 hex digits and has 1 to "
                f"{BLOCK_BYTES_MAX} bytes"
            )
    if sum(block.size for block in blocks) != size:
        raise InvalidArgument(f"the blocks hold {sum(b.size for b in blocks)} bytes, the version {size}")

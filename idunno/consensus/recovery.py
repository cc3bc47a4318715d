# idunno/consensus/recovery.py: reading the log back at start, and telling a torn write from damage.
#
# Rule 1: every segment but the last was synced whole before the next was begun: any fault in it is damage.
# Rule 2: in the last one, the first place without a valid record is the end if nothing behind it proves that the place was
#         once synced (records.py, Rule 3). Left-overs of a torn write are wiped before the log is used.
# Rule 3: what is found is synced before it counts: a process that was killed may have written it and not lived to sync it, and
#         the next loss of power would take what this one promises.
from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from idunno.base.disk import Disk
from idunno.base.errors import Corrupt
from idunno.base.ids import NodeId
from idunno.consensus.records import (
    RECORD_MAGIC,
    REJOIN,
    SEGMENT_HEADER_BYTES,
    Record,
    decode_record,
    decode_segment_header,
)
from idunno.consensus.terms import Terms
from idunno.consensus.voters import decode_voters, names_voters


@dataclass(slots=True)
class Recovered:
    """What the segments hold, and where the next record goes."""

    terms: Terms = field(default_factory=Terms)  # of a base above 0 the term is not known, and 0
    where: array[int] = field(default_factory=lambda: array("Q"))  # segment << 32 | offset, behind the base
    named: dict[int, frozenset[NodeId]] = field(default_factory=dict)  # entries that name voters, rising
    first_segment: int = 1
    segment: int = 0
    tail: int = 0
    previous: int = 0  # checksum of the last record


async def recover(disk: Disk, directory: str, names: list[str]) -> Recovered:
    """Read the segments `names`, sorted, which must have numbers in a row. Raises Corrupt, Incompatible.

    They begin at 1, or, when a snapshot took the place of earlier ones, later: then the base says behind which index.
    """
    found = Recovered()
    begin = int(names[0][:8]) if names and names[0][:8].isdecimal() else 1
    found.first_segment = begin
    for number, name in enumerate(names, begin):
        path, last = f"{directory}/{name}", number == begin + len(names) - 1
        if name != f"{number:08d}.seg":
            raise Corrupt(f"{directory}/{number:08d}.seg is missing, {path} is there; {REJOIN}")
        file = await disk.open(path)
        try:
            data = await file.read(0, await file.size())
            if last and number > begin and not _begun(data, path, number):
                await disk.remove(path)
                await disk.sync_directory(directory)
                return await recover(disk, directory, names[:-1])
            _read_segment(data, path, number, found)
            unused = len(data) - found.tail
            if last and data[found.tail :] != bytes(unused):
                await file.write(found.tail, [bytes(unused)])
            if last:
                await file.sync()
        finally:
            await file.close()
    if not names:
        raise Corrupt(f"{directory} holds no segment; {REJOIN}")
    return found


def _begun(data: bytes, path: str, number: int) -> bool:
    """Whether the last segment was ever in use: a crash while it was being made leaves neither header nor record."""
    return decode_segment_header(data, path) is not None or _next_valid(data, 0, number) is not None


def _read_segment(data: bytes, path: str, number: int, found: Recovered) -> None:
    header = decode_segment_header(data, path)
    if header is None:
        raise Corrupt(f"{path}: the header, at offset 0, is damaged; {REJOIN}")
    if header.segment != number:
        raise Corrupt(f"{path} is segment {header.segment}; {REJOIN}")
    if number == found.first_segment and number > 1:  # what it follows is gone
        found.previous = header.previous
        found.terms = Terms(header.first - 1, 0)
    if header.previous != found.previous:
        raise Corrupt(
            f"log segment {number - 1} is damaged at offset {found.tail}, entry {found.terms.last + 1} or so: "
            f"{path} was begun after it; {REJOIN}"
        )
    if header.anew:
        found.terms, found.where, found.named = Terms(header.first - 1, 0), array("Q"), {}
    found.segment, found.tail = number, SEGMENT_HEADER_BYTES
    while (record := decode_record(data, found.tail, number, found.tail)) is not None:
        if record.previous != found.previous:
            break  # valid on its own, but not what followed here: left over
        _take(record, path, number, found)
    behind = _next_valid(data, found.tail, number)
    while behind is not None:
        if behind.batch > found.tail:
            raise Corrupt(
                f"{path}: damaged at offset {found.tail}, entry {found.terms.last + 1} or so; it was synced, for the "
                f"record at offset {behind.offset} (entry {behind.index}) was written later; {REJOIN}"
            )
        behind = _next_valid(data, behind.offset + 1, number)


def _take(record: Record, path: str, number: int, found: Recovered) -> None:
    if not 1 <= record.index <= found.terms.last + 1:
        raise Corrupt(f"{path}: entry {record.index} at offset {record.offset} follows {found.terms.last}; {REJOIN}")
    if record.index <= found.terms.base:  # it replaced entries of segments that are gone, when they still were there
        found.terms, found.where, found.named = Terms(record.index - 1, 0), array("Q"), {}
    elif record.index <= found.terms.last:
        found.terms.truncate(record.index)
        del found.where[record.index - 1 - found.terms.base :]
        found.named = {at: voters for at, voters in found.named.items() if at < record.index}
    if record.term < found.terms.last_term:
        raise Corrupt(f"{path}: term {record.term} at offset {record.offset} follows a later one; {REJOIN}")
    found.terms.append(record.term, len(record.payload))
    found.where.append(number << 32 | record.offset)
    if names_voters(record.payload):
        found.named[record.index] = decode_voters(record.payload)
    found.tail, found.previous = record.end, record.checksum


def _next_valid(data: bytes, start: int, number: int) -> Record | None:
    """The first record at or behind `start` that is valid by itself, wherever it stands."""
    at = data.find(RECORD_MAGIC, start)
    while at >= 0:
        record = decode_record(data, at, number, at)
        if record is not None:
            return record
        at = data.find(RECORD_MAGIC, at + 1)
    return None

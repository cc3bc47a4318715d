# idunno/consensus/records.py: the bytes of the log: segment headers, records, the hard state. No I/O.
#
# Rule 1: all integers are little-endian. The format's version is in every segment's header and in the state file; a version
#         that is not known is Incompatible, never guessed at.
# Rule 2: a record's checksum covers its place (segment, offset), the previous record's checksum, its header and payload: a
#         record that was moved, copied into a payload, or left from before is not valid where it stands.
# Rule 3: a record names where the write it was part of began (`batch`). The one before it was synced by then, so a valid
#         record whose batch begins behind a bad place proves that the bad place was once synced: rot, not a torn write.
from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from idunno.base.errors import Corrupt, Incompatible
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.events import HardState
from idunno.consensus.messages import PAYLOAD_BYTES_MAX

FORMAT: Final = 1
SEGMENT_MAGIC: Final = b"idunnoLG"
STATE_MAGIC: Final = b"idunnoHS"
RECORD_MAGIC: Final = b"\xc5Rc\x91"  # not text, so that payloads rarely hold it

_SEGMENT: Final = struct.Struct("<8sHHIQQI")  # magic, format, flags, segment, first index, zero, previous checksum
_ANEW: Final = 1  # of the flags
_CRC: Final = struct.Struct("<I")
_PLACE: Final = struct.Struct("<II")
_RECORD: Final = struct.Struct("<4sIIIIQQ")  # magic, checksum, previous checksum, payload length, batch, index, term
_COVERED: Final = struct.Struct("<IIIIIQQ")  # segment, offset, and the part of it behind the checksum
_STATE: Final = struct.Struct("<8sHHIQQ")  # magic, format, length of voted_for, zero, term, end

SEGMENT_HEADER_BYTES: Final = _SEGMENT.size + _CRC.size
RECORD_HEADER_BYTES: Final = _RECORD.size
RECORD_BYTES_MAX: Final = RECORD_HEADER_BYTES + PAYLOAD_BYTES_MAX
STATE_BYTES_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Record:
    offset: int
    checksum: int
    previous: int  # the previous record's checksum
    batch: int  # offset in this segment
    index: Index
    term: Term
    payload: bytes

    @property
    def end(self) -> int:
        return self.offset + RECORD_HEADER_BYTES + len(self.payload)


def encode_record(
    segment: int, offset: int, previous: int, batch: int, index: int, term: int, payload: bytes
) -> tuple[bytes, int]:
    """The record's header, to be followed by the payload, and its checksum."""
    length = len(payload)
    checksum = zlib.crc32(payload, zlib.crc32(_COVERED.pack(segment, offset, previous, length, batch, index, term)))
    return _RECORD.pack(RECORD_MAGIC, checksum, previous, length, batch, index, term), checksum


def decode_record(data: bytes, at: int, segment: int, offset: int) -> Record | None:
    """The record at `data[at:]`, which lies at `offset` of `segment`; None if none is valid there."""
    if at + RECORD_HEADER_BYTES > len(data):
        return None
    magic, checksum, previous, length, batch, index, term = _RECORD.unpack_from(data, at)
    start = at + RECORD_HEADER_BYTES
    if magic != RECORD_MAGIC or length > PAYLOAD_BYTES_MAX or start + length > len(data):
        return None
    payload = data[start : start + length]
    found = zlib.crc32(payload, zlib.crc32(data[at + 8 : start], zlib.crc32(_PLACE.pack(segment, offset))))
    if found != checksum:
        return None
    return Record(offset, checksum, previous, batch, Index(index), Term(term), payload)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    segment: int
    first: Index  # the index that its first record was expected to have
    previous: int  # checksum of the last record of the segment before; 0 for the first
    anew: bool = False  # what earlier segments hold counts no more: a snapshot took its place


def encode_segment_header(header: SegmentHeader) -> bytes:
    flags = _ANEW if header.anew else 0
    data = _SEGMENT.pack(SEGMENT_MAGIC, FORMAT, flags, header.segment, header.first, 0, header.previous)
    return data + _CRC.pack(zlib.crc32(data))


def decode_segment_header(data: bytes, path: str) -> SegmentHeader | None:
    """None if there is no valid header. Raises Incompatible for a format of another version."""
    if len(data) < SEGMENT_HEADER_BYTES or data[:8] != SEGMENT_MAGIC:
        return None
    _, format_, flags, segment, first, _, previous = _SEGMENT.unpack_from(data)
    if _CRC.unpack_from(data, _SEGMENT.size)[0] != zlib.crc32(data[: _SEGMENT.size]):
        return None
    _check_format(format_, path)
    return SegmentHeader(segment, Index(first), previous, bool(flags & _ANEW))


def encode_state(state: HardState, end: int = 0) -> bytes:
    """`end` (segment << 32 | offset) is a place up to which the log was surely synced: it may never again end before."""
    voted = (state.voted_for or "").encode()
    data = _STATE.pack(STATE_MAGIC, FORMAT, len(voted), 0, state.term, end) + voted
    return data + _CRC.pack(zlib.crc32(data))


def decode_state(data: bytes, path: str) -> tuple[HardState, int]:
    """The hard state, and `end` as above. Raises Corrupt, Incompatible."""
    if len(data) < _STATE.size + _CRC.size or data[:8] != STATE_MAGIC:
        raise Corrupt(f"{path} is no state file of the log ({len(data)} bytes); {REJOIN}")
    if _CRC.unpack_from(data, len(data) - _CRC.size)[0] != zlib.crc32(data[: -_CRC.size]):
        raise Corrupt(f"{path}: wrong checksum over {len(data)} bytes; {REJOIN}")
    _, format_, length, _, term, end = _STATE.unpack_from(data)
    _check_format(format_, path)
    voted = data[_STATE.size : _STATE.size + length].decode()
    return HardState(Term(term), NodeId(voted) if voted else None), end


def _check_format(format_: int, path: str) -> None:
    if format_ != FORMAT:
        raise Incompatible(
            f"{path} has log format {format_}, this version of idunno reads {FORMAT}: "
            "run the version that wrote it, or a newer one"
        )


REJOIN: Final = "this node's log cannot be trusted: move its directory away and let it join again as a new node"

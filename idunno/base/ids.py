# idunno/base/ids.py: the identities everything else speaks of, as types.
from __future__ import annotations

import re
from typing import Final, NewType

from idunno.base.errors import InvalidArgument

NodeId = NewType("NodeId", str)  # 16 hex digits, minted once per data directory, never reused
BlockId = NewType("BlockId", str)  # 64 hex digits: the BLAKE3 of the block's content
Term = NewType("Term", int)  # Raft's term; orders to nodes carry it
Index = NewType("Index", int)  # position in the replicated log, from 1
RequestId = NewType("RequestId", str)  # made by the client once per intention; equal on every retry

NAME_BYTES_MAX: Final = 512
"""A file's name, in UTF-8. Long enough for paths, short enough that a listing of 1,000 stays under 1 MiB."""

# C0, DEL and C1 controls; line and paragraph separators; marks that reorder or hide text on a terminal; surrogates. Fixed
# ranges, because the replicated machine must answer alike on every node: `str.isprintable` follows the interpreter's tables.
_REFUSED: Final = (
    (0x00, 0x1F),
    (0x7F, 0x9F),
    (0x200B, 0x200F),
    (0x2028, 0x202E),
    (0x2060, 0x206F),
    (0xD800, 0xDFFF),
    (0xFEFF, 0xFEFF),
)

_LABEL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62})?")


def check_label(kind: str, label: str) -> str:
    """`label` itself if it can name a node, a user or a model: 1 to 63 of A-Z a-z 0-9 . _ -, a letter or digit first.

    Raises InvalidArgument.
    """
    if not _LABEL.fullmatch(label):
        raise InvalidArgument(
            f"{label[:80]!r} cannot name a {kind}: use 1 to 63 letters, digits, '.', '_' or '-', a letter or digit first"
        )
    return label


def printable(text: str) -> bool:
    """Whether `text` holds no control character, by ranges that never change."""
    return (text.isascii() and text.isprintable()) or not any(lo <= ord(c) <= hi for c in text for lo, hi in _REFUSED)


_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


def check_file_name(name: str, *, system: bool = False) -> str:
    """`name` itself if it can name a file in SDFS.

    Refused: empty, over NAME_BYTES_MAX bytes, control characters, a leading or trailing '/', empty, '.' or '..' parts, and
    (unless `system`) anything below `.idunno/`, which is the system's own. Raises InvalidArgument.
    """
    if len(name) <= NAME_BYTES_MAX and _PLAIN_NAME.fullmatch(name):
        return name  # the usual kind, in a quarter of the time
    shown = name[:80]
    if any("\ud800" <= letter <= "\udfff" for letter in shown):
        raise InvalidArgument(f"{shown!r} is no file name: it is no UTF-8")
    if not printable(name):
        raise InvalidArgument(f"{shown!r} is no file name: it holds control characters")
    size = len(name.encode())
    if not 1 <= size <= NAME_BYTES_MAX:
        raise InvalidArgument(f"a file name has 1 to {NAME_BYTES_MAX} bytes, this one has {size}: {shown!r}")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidArgument(f"{shown!r} is no file name: every part between '/' must be a plain name")
    if parts[0] == ".idunno" and not system:
        raise InvalidArgument(f"{shown!r} is the system's own: choose a name outside .idunno/")
    return name

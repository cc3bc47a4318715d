# idunno/sdfs/config.py: the file store's numbers, each with its unit and reason.
from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from idunno.base.disk import Space
from idunno.base.errors import InvalidArgument

FILE_BLOCKS_MAX: Final = 4_096
"""Blocks of one version, 32 GiB: its list, with the holders of each block, still fits one message header (1 MiB)."""
FILE_SYSTEM_PREFIX: Final = ".idunno/"


@dataclass(frozen=True, slots=True, kw_only=True)
class SdfsConfig:
    floor_percent: int = 5
    """Blocks are refused below this share of free space: the log, the models and the system need room too."""
    floor_bytes: int = 2_000_000_000
    """... and below this. On a small disk the percentage alone would be too little for one model's files."""
    writes_max: int = 8
    """Blocks from clients that one node takes at once. Each holds at most the stream's credit and a 1 MiB write buffer."""
    writes_waiting_max: int = 16
    """Clients' blocks that wait for one of those; one more is refused at once."""
    forwards_max: int = 32
    """Blocks taken from other nodes at once. More are refused, never queued: two nodes that wait for each other would
    stand still."""
    reads_max: int = 64
    """Blocks that one node sends at once; each holds at most 1 MiB and the stream's credit."""
    stall_s: float = 3.0
    """How long the last node of a chain may take nothing before it counts as failed. A node with k more behind it gets k
    times as long, so that the stalled one is blamed and not those before it."""
    answer_s: float = 10.0
    """How long the last node of a chain may take to sync a block: 8 MiB on a slow SD card take 2 s. Times k as above."""
    idle_s: float = 30.0
    """How long the other side of a block may neither send nor take anything before it loses its place here."""
    report_s: float = 10.0
    """How often a node tells the leader its free space when nothing else changes."""
    put_open_max_ms: int = 3_600_000
    """The leader aborts a put that is still open after this: the client is gone, or may begin anew."""

    def __post_init__(self) -> None:
        if not 0 <= self.floor_percent < 100:
            raise InvalidArgument(f"floor_percent={self.floor_percent}: between 0 and 99")

    def floor(self, space: Space) -> int:
        """Free bytes below which a node with that disk takes no block."""
        return max(space.total_bytes * self.floor_percent // 100, self.floor_bytes)

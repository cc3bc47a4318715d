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
    """Blocks from clients that one node takes at once. Each holds at most the stream's credit and two batches of 1 MiB."""
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
    block_s: float = 120.0
    """How long one block may take to arrive here in all: a client gives it half of that, and who sends a byte now and then
    must not keep a place that others wait for."""
    report_s: float = 10.0
    """How often a node tells the leader its free space when nothing else changes."""
    put_open_max_ms: int = 3_600_000
    """The leader aborts a put that is still open after this: the client is gone, or may begin anew."""

    repair_link_percent: int = 30
    """How much of its time a node spends on taking the copies that repair orders, so that users keep the rest."""
    repair_copies_max: int = 64
    """Copies under way in the whole cluster."""
    repair_copies_per_node: int = 2
    """... and at one node: it takes one and has the next one's order."""
    repair_early_bytes: int = 256_000_000
    """So much of what still has 3 copies is copied at once: the loss of a small node is repaired within seconds."""
    repair_wait_ms: int = 60_000
    """The rest waits so long: a reboot is no storm."""
    copy_s: float = 50.0
    """For one block from one source: less than the order has."""
    repair_again_ms: int = 10_000
    """A node that did not take a copy is asked again after this."""
    stopped_wait_ms: int = 600_000
    """A node that announced `stopped` is expected back for so long (design.md, section 7)."""
    settle_ms: int = 2_000
    """After a commit its blocks are left alone: nodes gather their reports for 0.2 s, and may be busy."""
    report_wait_ms: int = 30_000
    """A present node that does not report to a new leader is waited for so long; without it copies are made, never removed."""
    trims_max: int = 4
    trim_wait_ms: int = 15_000
    """How long a block must have been surplus: a node that comes and goes moves nothing."""
    sweep_s: float = 30.0
    """Between looks for blocks that nothing refers to; the first follows a second after something was freed."""
    scrub_bytes_per_s: int = 10_000_000
    """What a node reads of its own blocks to find rot: a hundredth of what a disk can. 0: never."""
    scrub_period_s: float = 86_400.0
    """All blocks are read at most once in this time."""
    probe_s: float = 30.0
    """A disk that failed is tried again this often."""
    trash_ms: int = 86_400_000
    """How long deleted and expired versions can be restored."""
    retain_s: float = 60.0
    """Between looks for versions that have expired, and for trash to be purged."""

    def __post_init__(self) -> None:
        if not 0 <= self.floor_percent < 100:
            raise InvalidArgument(f"floor_percent={self.floor_percent}: between 0 and 99")
        if not 1 <= self.repair_link_percent <= 100:
            raise InvalidArgument(f"repair_link_percent={self.repair_link_percent}: between 1 and 100")

    def floor(self, space: Space) -> int:
        """Free bytes below which a node with that disk takes no block."""
        return max(space.total_bytes * self.floor_percent // 100, self.floor_bytes)

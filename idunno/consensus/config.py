# idunno/consensus/config.py: the numbers of consensus, each with its unit and its reason.
from __future__ import annotations

from dataclasses import dataclass

from idunno.base.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftConfig:
    heartbeat_ms: int = 150
    """Six to thirteen fit an election timeout, so several may be lost; seven a second cost an idle leader nothing."""
    election_timeout_ms: int = 1_000
    """The least silence of a leader that starts an election, and the longest a leader goes on without a majority. Python's
    pauses and a slow disk sync stay well below it; a dead process is noticed sooner, by its closed connection."""
    election_spread_ms: int = 1_000
    """Added by chance to each timeout. As wide as the timeout itself: split votes stay rare (Raft thesis, 9.4)."""
    lost_leader_spread_ms: int = 100
    """The chance delay when the leader's connection closed: twenty times a LAN round trip with a disk sync."""
    commit_notice_ms: int = 10
    """How long followers may lag in hearing of a commit when no append carries it. A read on one of them does not wait for it:
    the round that its index takes tells whoever has yet to hear. Above the time to the next append of a busy leader."""
    read_wait_ms: int = 5
    """A read asks no more voters than make a majority; when these are silent for so long it asks all: several round trips of a
    LAN, and a small part of what a user notices."""
    inflight_bytes_max: int = 1024 * 1024
    """Appended but not acknowledged, a follower: 8 ms of a gigabit link, above its round trip with a disk sync."""
    inflight_messages_max: int = 64
    """Likewise in messages: bounds what a lost connection makes us send again."""
    inflight_small_max: int = 2
    """With so many appends under way to a follower a further one waits until it has gathered `gather_bytes`, or one of them is
    acknowledged: many small messages cost a busy leader more than the entries in them. Two: one is synced while one travels."""
    gather_bytes: int = 64 * 1024
    """See inflight_small_max. A message of this size costs more for its bytes than for being one."""
    proposals_max: int = 10_000
    """Proposals and reads that wait at the leader, each. Ten times what a busy cluster has in flight."""
    persists_max: int = 1_024
    """Promises that wait for a disk that does not answer; further messages that need one are dropped, as if lost."""
    segment_bytes: int = 16 * 1024 * 1024
    """A file of the log. Large enough that making one (a few ms) is rare, small enough that a new node has spent little."""
    apply_slice_ms: int = 5
    """Apply this long, then let the loop breathe: a fraction of a heartbeat."""

    snapshot_slice_ms: int = 2
    """Encode a snapshot this long, then leave the loop to others `snapshot_rest` times as long. All nodes take theirs behind the
    same entry, so a caller feels the slices of each."""
    snapshot_rest: int = 4
    """A fifth of the loop: a million files take half a minute, in which a busy cluster writes three snapshots' worth of log."""
    snapshot_entries: int = 50_000
    """Entries applied since the last snapshot that make the next due: a restart applies as many again, in about two seconds."""
    snapshot_bytes: int = 256 * 1024 * 1024
    """Likewise bytes of log, which are about as many entries of the largest small files; a restart reads them in a second."""
    keep_entries: int = 10_000
    """Kept in the log behind the snapshot, for followers that are a little behind: seconds of a busy cluster."""
    keep_bytes: int = 16 * 1024 * 1024
    """Likewise: what an entry more would cost is more than what a snapshot would."""

    @property
    def silent_heartbeats_max(self) -> int:
        """Heartbeats a voter may leave unanswered and still count for the leader: the next one but one is due within an
        election timeout."""
        return self.election_timeout_ms // self.heartbeat_ms - 1

    @property
    def election_ms_max(self) -> int:
        """The longest silence after which a follower stands for election."""
        return self.election_timeout_ms + self.election_spread_ms

    def __post_init__(self) -> None:
        if self.heartbeat_ms < 1 or self.election_timeout_ms < 3 * self.heartbeat_ms:
            raise InvalidArgument(
                f"election_timeout_ms={self.election_timeout_ms} is too short for heartbeat_ms={self.heartbeat_ms}: "
                f"at least {3 * self.heartbeat_ms}, so that two heartbeats may be lost"
            )
        if min(self.snapshot_entries, self.snapshot_bytes) < 1 or min(self.keep_entries, self.keep_bytes) < 0:
            raise InvalidArgument("snapshot_entries and snapshot_bytes must be at least 1, keep_* at least 0")
        if self.election_spread_ms < 1 or self.lost_leader_spread_ms < 1:
            raise InvalidArgument(
                "election_spread_ms and lost_leader_spread_ms must be at least 1: equal timeouts split votes"
            )

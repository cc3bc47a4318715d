# idunno/membership/config.py: the detector's times, each with its reason. Contradictions fail at start, with the numbers.
from __future__ import annotations

from dataclasses import dataclass

from idunno.base.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class SwimConfig:
    period_ms: int = 500
    """One of three ring neighbours is pinged per period, so each member is pinged by three others every 1.5 s."""
    retry_ms: int = 200
    """An unanswered ping is sent again after this: one lost datagram is no miss. Round trips stay far below it."""
    misses_to_suspect: int = 2
    """Periods in a row without any answer before a prober accuses: a pause of a second accuses nobody."""
    t_fail_ms: int = 1_000
    """How long a suspect may defend itself once two members accuse it."""
    t_fail_lone_ms: int = 2_000
    """The same while only one accuses: the fault may be the accuser's (Lifeguard, section IV.B, with K = 1)."""
    bystander_ms: int = 500
    """Who accuses nobody waits this much longer for the accusers' verdict: a refutation reaches them first."""
    t_delete_ms: int = 1_000
    """A failed member stays this long in the ring before it is deleted from it."""
    late_ms: int = 250
    """A timer that fires later than this was held up by this process: what it seems to have missed proves nothing."""
    gossip_ms: int = 100
    """While there is news, it is sent to `gossip_fanout` random members this often: 50 members hear it in 0.4 s."""
    gossip_fanout: int = 3
    away_ms: int = 2_000
    """One failed or stopped member is pinged this often, so that a healed partition or a restart is noticed."""
    announce_ms: int = 1_000
    """How long `stopped` or `left` waits for acknowledgements: an exit must not hang on dead members."""
    announce_members: int = 5
    """So many are told directly. One that lives is enough, gossip does the rest."""
    members_max: int = 2_048
    """Records kept. Twice the largest cluster that is simulated; more is somebody's mistake."""

    def __post_init__(self) -> None:
        if not 0 < self.retry_ms < self.period_ms:
            raise InvalidArgument(
                f"retry_ms={self.retry_ms} must lie within the period of {self.period_ms} ms, so that a retry can be answered"
            )
        if self.t_fail_ms < 2 * self.period_ms or self.t_fail_lone_ms < self.t_fail_ms:
            raise InvalidArgument(
                f"t_fail_ms={self.t_fail_ms} must be at least {2 * self.period_ms} (a suspect is told once per period) "
                f"and at most t_fail_lone_ms={self.t_fail_lone_ms}"
            )

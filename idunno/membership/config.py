# idunno/membership/config.py: the detector's times, each with its reason. Contradictions fail at start, with the numbers.
from __future__ import annotations

import msgspec

from idunno.base.errors import InvalidArgument


class SwimConfig(msgspec.Struct, frozen=True, kw_only=True):
    period_ms: int = 500
    """One of three ring neighbours is probed per period, so each member is probed by three others every 1.5 s."""
    retry_ms: int = 150
    """An unanswered ping is sent again after this, and helpers are asked. Round trips in one site stay far below it."""
    tcp_ms: int = 250
    """Still no answer: the target is asked over TCP, which resends by itself and passes where UDP is blocked."""
    probe_ms: int = 400
    """Without an answer until then a probe has failed: pings by two messages, three helpers, and TCP were all in vain."""
    look_ms: int = 30
    """A verdict waits so much longer, for what lies in the socket unread: a blocked loop runs timers before it reads."""
    helpers: int = 3
    """Members asked to ping in our stead (k in SWIM; memberlist asks three as well)."""
    confirmations: int = 2
    """So many accusers besides the first halve a suspect's time (K in Lifeguard): all three who watch it agree."""
    t_fail_ms: int = 1_000
    """How long a suspect may defend itself once `confirmations` others agree with the first accuser."""
    t_fail_lone_ms: int = 2_000
    """The same while only one accuses: the fault may be the accuser's."""
    bystander_ms: int = 500
    """Who accuses nobody waits this much longer for the accusers' verdict: a refutation reaches them first."""
    t_delete_ms: int = 1_000
    """A failed member stays this long in the ring before it is deleted from it."""
    late_ms: int = 250
    """A timer that fires later than this was held up by this process: what it seems to have missed proves nothing."""
    gossip_ms: int = 100
    """While there is news, it is sent to `gossip_fanout` random members this often: 50 members hear it in 0.4 s."""
    gossip_fanout: int = 3
    random_ms: int = 2_000
    """This often a random member is probed, whose list may differ from the neighbours', and one that failed or stopped is
    pinged, so that a healed partition or a restart is noticed."""
    introduce_ms: int = 5_000
    """Who was named but never heard is accused after this: a process needs seconds to start after its name is known."""
    exchange_ms: int = 1_000
    """A digest that differs is a difference that lasts if nothing has changed here for so long. Exchanges that do not end
    it are repeated after twice the time each, up to `exchange_max_ms`."""
    exchange_max_ms: int = 30_000
    announce_ms: int = 1_000
    """How long `stopped` or `left` waits for acknowledgements: an exit must not hang on dead members."""
    announce_members: int = 5
    """So many are told directly. One that lives is enough, gossip does the rest."""
    members_max: int = 2_048
    """Records kept. Twice the largest cluster that is simulated; more is somebody's mistake."""

    def __post_init__(self) -> None:
        if not 0 < self.retry_ms <= self.tcp_ms < self.probe_ms <= self.period_ms:
            raise InvalidArgument(
                f"a probe's steps must follow each other within a period: retry_ms={self.retry_ms}, tcp_ms={self.tcp_ms}, "
                f"probe_ms={self.probe_ms}, period_ms={self.period_ms}"
            )
        if self.t_fail_ms < 2 * self.period_ms or self.t_fail_lone_ms < self.t_fail_ms:
            raise InvalidArgument(
                f"t_fail_ms={self.t_fail_ms} must be at least {2 * self.period_ms} (a suspect is told once per period) "
                f"and at most t_fail_lone_ms={self.t_fail_lone_ms}"
            )

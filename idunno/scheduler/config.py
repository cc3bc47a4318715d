# idunno/scheduler/config.py: what an operator may set, and the bounds of what waits here.
from __future__ import annotations

import msgspec

from idunno.base.errors import InvalidArgument
from idunno.scheduler.deploy import SCHEDULER_WORKS


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    scheduler_works: str = "auto"
    """Whether the scheduler holds models too: auto (with fewer than five nodes present), always, never."""
    poll_max_s: float = 10.0
    """The longest long poll: a third of the time after which a silent worker counts as lost."""
    tick_s: float = 0.5
    """How often leases, presence and deployments are looked at even if nothing was heard: one protocol period of membership."""
    propose_s: float = 5.0
    """How long one of the scheduler's own commands may take; what failed is decided anew at the next tick."""
    waiters_max: int = 1_000
    """Long polls about models and jobs that wait at once; one more is answered without waiting."""

    def __post_init__(self) -> None:
        if self.scheduler_works not in SCHEDULER_WORKS:
            raise InvalidArgument(f"scheduler_works={self.scheduler_works!r}: one of {', '.join(SCHEDULER_WORKS)}")

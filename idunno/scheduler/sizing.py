# idunno/scheduler/sizing.py: how many queries make a task.
from __future__ import annotations

from typing import Final

TASK_US: Final = 250_000
"""A task costs about a quarter of a second: 0.4 % of it is spent on handing it out (1 ms), and a worker that is lost, or a
model that must be let in, loses or waits no more than that (design.md, section 8)."""
QUERIES_UNMEASURED: Final = 32
"""Before the first measurement: below half a second for models of up to 15 ms a query, and a start for those that are slower."""
QUERIES_MAX: Final = 4_096
"""Bounds a task's output, and what one lost attempt repeats."""
MEASURED_MIN: Final = 1
"""Queries that must have been timed before their mean counts; the first task already is a batch."""


def task_queries(job_batch: int, model_batch: int, timed: int, sum_us: int) -> int:
    """Queries a task: the job's batch size, else the model's, else about TASK_US of measured cost.

    Args: batch sizes, 0 when not given; `timed` queries took `sum_us` microseconds in all. Returns 1 to QUERIES_MAX.
    """
    given = job_batch or model_batch
    if given:
        return max(1, min(QUERIES_MAX, given))
    if timed < MEASURED_MIN:
        return QUERIES_UNMEASURED
    return max(1, min(QUERIES_MAX, TASK_US * timed // max(1, sum_us)))

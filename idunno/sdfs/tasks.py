# idunno/sdfs/tasks.py: background tasks whose end is never overlooked.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("idunno.sdfs")


def begin(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task that is to run until it is cancelled; if it ends by an error, that is logged with its story."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_look)
    return task


def _look(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("background task failed", extra={"task": task.get_name()}, exc_info=error)


async def end(task: asyncio.Task[None] | None) -> None:
    """Cancel and wait."""
    if task is not None:
        task.cancel()
        await asyncio.wait([task])

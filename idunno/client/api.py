# idunno/client/api.py: `idunno.connect_async`: everything a cluster does, for asyncio programs. sync.py mirrors it.
from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from types import TracebackType
from typing import Final

from idunno.client.backups import Backups
from idunno.client.dumps import Dumps
from idunno.client.jobs import Job, Jobs
from idunno.client.locate import Place, locate
from idunno.client.operations import Operations
from idunno.client.session import Dial, Session

CONNECT_S: Final = 10.0
"""To reach the first node: three doors that do not answer, and one that does."""

__all__ = ["Cluster", "Job", "connect_async", "open_cluster"]


class Cluster(Jobs, Operations, Backups, Dumps):
    """A connection to a cluster; goes on through the loss of nodes. Use as `async with`."""

    async def close(self) -> None:
        await self.session.close()

    async def __aenter__(self) -> Cluster:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def connect_async(where: str | Path | None = None, *, timeout_s: float | None = None) -> Cluster:
    """Connect to WHERE (docs/commands.md); `timeout_s` bounds every call, by default each kind has its own.

    Raises NotFound (no cluster there), Unauthenticated (no login), Unavailable (no node answers).
    """
    from idunno.client.dial import dialer

    place = locate(where, os.environ)
    return await open_cluster(place, dialer(place), timeout_s=timeout_s)


async def open_cluster(
    place: Place, dial: Dial, *, timeout_s: float | None = None, rng: random.Random | None = None
) -> Cluster:
    """A Cluster over any way to open doors."""
    from idunno.sdfs.client import FileClient

    rng = rng or random.Random()
    session = Session(place, dial, rng)
    try:
        await session.connect(min(CONNECT_S, timeout_s) if timeout_s is not None else CONNECT_S)
    except BaseException:
        await session.close()
        raise
    return Cluster(session, FileClient(session.caller, offload=asyncio.to_thread, rng=rng), timeout_s)

# idunno/consensus/bell.py: how one task of the shell is woken.
from __future__ import annotations

import asyncio


class Bell:
    """For one task, which waits until it is rung. asyncio.Event, for any number of them, makes twice the calls: an append rings
    twice on each node."""

    def __init__(self) -> None:
        self._was_rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self._was_rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def rung(self) -> None:
        """Returns once it was rung since this returned last."""
        if not self._was_rung:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._was_rung = False

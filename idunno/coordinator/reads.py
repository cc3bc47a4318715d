# idunno/coordinator/reads.py: many reads, one round to the leader.
#
# Rule 1: a read may only use an index that was asked for after the read began (Raft thesis, 6.4): whoever comes while a round
#         is under way takes part in the next one.
# Rule 2: a round that fails for a reason that passes is begun again for those who still wait; each waits to its own deadline.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from idunno.base.errors import (
    WHEN_LOST,
    Exhausted,
    IdunnoError,
    InternalError,
    NoQuorum,
    NotLeader,
    Unavailable,
    Unconfirmed,
)
from idunno.base.ids import Index

log = logging.getLogger("idunno.coordinator")

READERS_MAX: Final = 10_000
"""Reads that wait at once on one node."""
ROUND_S: Final = 2.0
"""The longest that one round is waited for before the leader is looked for anew: two elections."""
PASSES: Final = (NotLeader, NoQuorum, Unavailable, Unconfirmed)
"""Why a round may fail, and the next one go well."""


class ReadRounds:
    def __init__(self, ask: Callable[[float], Awaitable[Index]]) -> None:
        """`ask(timeout_s)`: one round, wherever the leader is."""
        self._ask = ask
        self._waiting: list[asyncio.Future[Index]] = []
        self._round: asyncio.Task[None] | None = None
        self._last: IdunnoError | None = None

    async def join(self, timeout_s: float) -> Index:
        """An index that is safe to read at. Raises NoQuorum when none could be had in time, Exhausted."""
        if len(self._waiting) >= READERS_MAX:
            raise Exhausted(f"{READERS_MAX} reads are waiting for the leader; try again later")
        answer: asyncio.Future[Index] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        if self._round is None:
            self._round = asyncio.create_task(self._run(), name="read rounds")
            self._round.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            if isinstance(
                self._last, NoQuorum
            ):  # it says what to do, and of a time that means more than the last attempt's
                raise NoQuorum(f"no consistent read: {self._last}") from None
            why = str(self._last) if self._last is not None else "the leader has not answered yet"
            raise NoQuorum(
                f"no consistent read within {timeout_s:g} s: {why}; see `idunno status`; {WHEN_LOST}"
            ) from None

    @property
    def idle(self) -> bool:
        return self._round is None

    async def close(self) -> None:
        if self._round is not None:
            self._round.cancel()
            await asyncio.wait({self._round})

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = [answer for answer in self._waiting if not answer.done()], []
            if not batch:
                continue
            try:
                index = await self._ask(ROUND_S)
            except PASSES as error:
                self._last = error
                self._waiting = batch + self._waiting
            except IdunnoError as error:
                _fail(batch, error)
            except BaseException:
                self._waiting = batch + self._waiting  # `_ended` tells them
                raise
            else:
                self._last = None
                for answer in batch:
                    if not answer.done():
                        answer.set_result(index)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._round = None
        waiting, self._waiting = self._waiting, []
        if task.cancelled():
            _fail(waiting, Unavailable("this node is stopping; ask another"))
        elif (error := task.exception()) is not None:
            log.error("read round failed", exc_info=error)
            _fail(waiting, InternalError(f"a read round failed: {error!r}"))
        elif waiting:  # they came after the last look of `_run`
            self._waiting = waiting
            self._round = asyncio.create_task(self._run(), name="read rounds")
            self._round.add_done_callback(self._ended)


def _fail(waiting: list[asyncio.Future[Index]], error: IdunnoError) -> None:
    for answer in waiting:
        if not answer.done():
            answer.set_exception(error)

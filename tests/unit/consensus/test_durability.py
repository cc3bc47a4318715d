# What the task that writes the log does, one flush behind the other, on a log that is none.
from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from idunno.base.ids import Index
from idunno.consensus.durability import FLUSHES_BEFORE_CUT, Durability
from idunno.consensus.events import Compacted, Persist, Persisted


def nothing_but(seq: int) -> Persist:
    return Persist(seq, None, Index(0), (), ())


def test_the_log_is_cut_also_when_there_is_always_something_to_write() -> None:
    """Callers out of step: each flush is answered by the next entry."""

    async def story() -> None:
        flushes, cut_behind, all_written = 0, list[int](), asyncio.Event()

        async def flush() -> None:
            nonlocal flushes
            flushes += 1
            if flushes == 10 * FLUSHES_BEFORE_CUT:
                all_written.set()
            else:
                durability.persist(nothing_but(flushes + 1))
            if flushes == 10:
                durability.forget(Index(5))

        async def forget(index: Index) -> Index:
            cut_behind.append(flushes)
            return index

        async def nothing(*_: object) -> None:
            pass

        def step(event: Persisted | Compacted) -> None:
            stepped.append(event)
            if isinstance(event, Compacted):
                terms.base = event.index

        stepped: list[Persisted | Compacted] = []
        terms = SimpleNamespace(base=Index(0))
        log = SimpleNamespace(flush=flush, roll=nothing, forget=forget)
        durability = Durability(
            cast(Any, log),
            cast(Any, terms),
            cast(Any, SimpleNamespace(disk_works=lambda doing: None)),
            send=lambda to, message: None,
            step=step,
        )
        durability.persist(nothing_but(1))
        durability.begin()
        running = asyncio.create_task(durability.run())
        async with asyncio.timeout(10):
            await all_written.wait()
        durability.end()
        await running
        assert cut_behind == [FLUSHES_BEFORE_CUT]
        assert stepped.count(Compacted(Index(5))) == 1
        assert len(stepped) == flushes + 1

    asyncio.run(story())

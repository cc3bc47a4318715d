# idunno/scheduler/waiters.py: long polls that wait for a model or a job to change.
#
# Rule 1: whoever waits looks first, then waits, then looks again: a wake-up says "look", never what there is to see.
# Rule 2: bounded: beyond `waiters_max` nobody waits, and a long poll becomes a plain one.
from __future__ import annotations

import asyncio


class Waiters:
    def __init__(self, waiters_max: int) -> None:
        self._max = waiters_max
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._count = 0

    def tell(self, key: str) -> None:
        """Wake everybody who waits for `key`."""
        for future in self._waiting.pop(key, ()):
            if not future.done():
                future.set_result(None)

    async def wait(self, key: str, timeout_s: float) -> bool:
        """True when `key` was told; False when the time is over, or too many wait already.

        Nothing runs between the caller's look and the registration here: there is no await before it.
        """
        if timeout_s <= 0 or self._count >= self._max:
            return False
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, set()).add(future)
        self._count += 1
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            return False
        finally:
            self._count -= 1
            others = self._waiting.get(key)
            if others is not None:
                others.discard(future)
                if not others:
                    del self._waiting[key]
        return True

    def close(self) -> None:
        """Wake everybody."""
        for key in list(self._waiting):
            self.tell(key)

    def __len__(self) -> int:
        return self._count

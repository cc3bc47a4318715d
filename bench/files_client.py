"""The client process of bench/files.py: orders as JSON lines on standard input, answers as JSON lines on standard output."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import idunno
from idunno.client.api import Cluster
from idunno.node.running import run_async
from idunno.sdfs.client import source_of

SMALL_BYTES = 4096


async def each(
    count: int, in_flight: int, seconds: float, one: Callable[[int], Coroutine[Any, Any, None]]
) -> dict[str, Any]:
    """Run `one(0)` ... `one(count - 1)`, so many at a time, as far as it gets in the time. How many, and how long it took."""
    numbers, done = iter(range(count)), 0
    began = time.perf_counter()

    async def worker() -> None:
        nonlocal done
        for number in numbers:
            await one(number)
            done += 1
            if time.perf_counter() - began > seconds:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())
    return {"done": done, "seconds": time.perf_counter() - began}


class Orders:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    async def put(self, path: str, name: str) -> dict[str, Any]:
        began = time.perf_counter()
        answer = await self.cluster.put(path, name)
        assert not answer.degraded, answer.why
        return {"seconds": time.perf_counter() - began}

    async def get(self, path: str, name: str) -> dict[str, Any]:
        began = time.perf_counter()
        await self.cluster.get(name, path)
        return {"seconds": time.perf_counter() - began}

    async def puts(self, name: str, count: int, in_flight: int, seconds: float = 60.0) -> dict[str, Any]:
        client = self.cluster.file_client
        contents = [os.urandom(SMALL_BYTES) for _ in range(count)]

        async def one(number: int) -> None:
            await client.put(source_of(contents[number]), f"{name}{number}", size=SMALL_BYTES)

        return await each(count, in_flight, seconds, one)

    async def gets(self, name: str, count: int, in_flight: int, known: int, seconds: float = 60.0) -> dict[str, Any]:
        client = self.cluster.file_client
        got = 0

        async def sink(_: int, content: Any) -> None:
            nonlocal got
            got += len(content)

        async def one(number: int) -> None:
            await client.get(f"{name}{number % known}", sink)

        answer = await each(count, in_flight, seconds, one)
        assert got == answer["done"] * SMALL_BYTES
        return answer

    async def late(self) -> dict[str, int]:
        return dict((await self.cluster.status()).loop_late)

    async def _until(self, wanted: Callable[[Any], bool], seconds: float) -> None:
        end = time.perf_counter() + seconds
        while not wanted(answer := await self.cluster.repair()):
            assert time.perf_counter() < end, f"after {seconds} s: {answer}"
            await asyncio.sleep(0.02)

    async def whole(self, seconds: float) -> None:
        await self._until(lambda answer: not answer.blocks and not answer.recovering, seconds)

    async def restored(self, victim: str, seconds: float) -> None:
        """Until the dead node no longer counts and everything has its copies on the others."""

        def wanted(answer: Any) -> bool:
            presence = {row.node: row.presence for row in answer.nodes}
            return presence[victim] != "present" and not answer.blocks and not answer.recovering

        await self._until(wanted, seconds)

    async def delete(self, name: str) -> None:
        await self.cluster.delete(name)


async def main(where: str) -> None:
    loop = asyncio.get_running_loop()
    async with await idunno.connect_async(where) as cluster:
        orders = Orders(cluster)
        print('"ready"', flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = json.loads(line)
            print(json.dumps(await getattr(orders, order.pop("what"))(**order)), flush=True)


if __name__ == "__main__":
    run_async(main(sys.argv[1]))

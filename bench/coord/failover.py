# bench/coord/failover.py: for how long no write succeeds after the leader is killed, frozen, or cut off.
#
# A put every 10 ms to the survivors, whatever became of those before (open loop). The gap is the longest time between two
# successes from just before the fault on: what somebody who writes all the time sees.
from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
import uuid
from collections.abc import Awaitable, Callable
from itertools import pairwise

from bench.coord import cutting
from bench.coord.cluster import Nodes, closed
from idunno.base.errors import IdunnoError
from idunno.client.session import Session
from idunno.sdfs.messages import PUT_SMALL, PutSmallFile

EVERY_S = 0.010
PUT_S = 8.0
GIVE_UP_S = 30.0
CONTENT = os.urandom(64)

Fault = Callable[[str], Awaitable[Callable[[], Awaitable[None]]]]
"""Strikes a node; what it returns heals it."""


async def trial(nodes: Nodes, fault: Fault) -> float:
    """The gap in seconds."""
    leader = nodes.leader()
    survivors = [name for name in nodes.names() if name != leader]
    sessions = [nodes.session(name) for name in survivors]
    for session in sessions:
        await session.connect(10.0)
    ended: list[float] = []
    done = asyncio.Event()  # a put that ended well after the fault
    struck = float("inf")
    tasks: set[asyncio.Task[None]] = set()
    stopping = False

    async def put(session: Session, number: int) -> None:
        request = PutSmallFile(uuid.uuid4().hex, f"failover/{number % 100}")
        try:
            await session.call(PUT_SMALL, request, body=CONTENT, timeout_s=PUT_S)
        except IdunnoError:
            return
        ended.append(time.perf_counter())
        if ended[-1] > struck + 0.05:
            done.set()

    async def writer() -> None:
        number = 0
        while not stopping:
            task = asyncio.create_task(put(sessions[number % len(sessions)], number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            await asyncio.sleep(EVERY_S)

    writing = asyncio.create_task(writer())
    await asyncio.sleep(1.0 + random.random() * 0.3)
    struck = time.perf_counter()
    heal = await fault(leader)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GIVE_UP_S):
            await done.wait()
    await asyncio.sleep(0.3)
    stopping = True
    await writing
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await heal()
    await closed(*sessions)
    times = [at for at in sorted(ended) if at > struck - 0.5]
    gaps = [after - before for before, after in pairwise(times)]
    return max(gaps) if gaps and times[-1] > struck + 0.05 else GIVE_UP_S


def killed(nodes: Nodes) -> Fault:
    async def strike(name: str) -> Callable[[], Awaitable[None]]:
        nodes.signal(name, signal.SIGKILL)

        async def heal() -> None:
            await asyncio.to_thread(nodes.up)

        return heal

    return strike


def frozen(nodes: Nodes) -> Fault:
    async def strike(name: str) -> Callable[[], Awaitable[None]]:
        nodes.signal(name, signal.SIGSTOP)

        async def heal() -> None:
            nodes.signal(name, signal.SIGCONT)

        return heal

    return strike


def cut(nodes: Nodes) -> Fault:
    """A silent partition: no packet of the node's sockets gets through, either way; nobody is told. Needs root and iptables."""

    async def strike(name: str) -> Callable[[], Awaitable[None]]:
        pid = nodes.pid(name)
        assert pid is not None
        every = [nodes.port + i for i in range(nodes.count)]
        rules = cutting.rules(pid, [nodes.port + int(name[1:]) - 1], every)
        await asyncio.to_thread(cutting.apply, rules)

        async def heal() -> None:
            await asyncio.to_thread(cutting.lift, rules)

        return heal

    return strike

# bench/coord/load.py: a closed loop of small puts or linearizable reads, so many in flight, over at most 8 connections.
from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from bench.coord.cluster import Nodes, closed
from idunno.client.session import Session
from idunno.sdfs.messages import PUT_SMALL, STAT, PutSmallFile, Stat

CONNECTIONS_MAX: Final = 8
WARM_S: Final = 1.0
KEYS: Final = 10_000
VALUE: Final = os.urandom(256)


@dataclass(frozen=True, slots=True)
class Rate:
    """Times in milliseconds; `server_ms` and `client_ms` are processor time for each operation."""

    in_flight: int
    per_s: float
    p50_ms: float
    p99_ms: float
    server_ms: float
    leader_cores: float
    client_ms: float


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))] if ordered else 0.0


async def put(session: Session, rng: random.Random) -> None:
    request = PutSmallFile(uuid.UUID(int=rng.getrandbits(128)).hex, f"bench/{rng.randrange(KEYS):06}")
    await session.call(PUT_SMALL, request, body=VALUE, timeout_s=10.0)


async def read(session: Session, rng: random.Random) -> None:
    answer = await session.call(STAT, Stat(f"bench/{rng.randrange(KEYS):06}"), timeout_s=10.0)
    assert answer.versions[0].size == len(VALUE)


async def run(
    nodes: Nodes,
    operation: Callable[[Session, random.Random], Awaitable[None]],
    in_flight: int,
    seconds: float,
    *,
    spread: bool = False,
    tls: bool = True,
) -> Rate:
    leader = nodes.leader()
    names = nodes.names() if spread else [leader]
    count = min(in_flight, CONNECTIONS_MAX)
    sessions = [
        nodes.session(names[i % len(names)]) if tls else nodes.local_session(names[i % len(names)])
        for i in range(count)
    ]
    for session in sessions:
        await session.connect(10.0)
    taken: list[float] = []
    warm = time.perf_counter() + WARM_S
    end = warm + seconds

    async def worker(number: int) -> None:
        rng = random.Random(os.urandom(8))
        session = sessions[number % count]
        while (begun := time.perf_counter()) < end:
            await operation(session, rng)
            if begun >= warm:
                taken.append(time.perf_counter() - begun)

    workers = [asyncio.create_task(worker(i)) for i in range(in_flight)]
    await asyncio.sleep(WARM_S)
    servers, client = nodes.cpu_s(), time.process_time()
    await asyncio.gather(*workers)
    now, done = nodes.cpu_s(), len(taken)
    used = {name: now[name] - servers[name] for name in now}
    client_s = time.process_time() - client
    await closed(*sessions)
    return Rate(
        in_flight,
        done / seconds,
        percentile(taken, 0.50) * 1e3,
        percentile(taken, 0.99) * 1e3,
        sum(used.values()) / done * 1e3,
        used[leader] / seconds,
        client_s / done * 1e3,
    )


async def fill(nodes: Nodes) -> None:
    """Each key of the reads exists."""
    sessions = [nodes.session(nodes.leader()) for _ in range(CONNECTIONS_MAX)]
    for session in sessions:
        await session.connect(10.0)
    left = list(range(KEYS))

    async def worker(session: Session) -> None:
        while left:
            name = f"bench/{left.pop():06}"
            await session.call(PUT_SMALL, PutSmallFile(uuid.uuid4().hex, name), body=VALUE, timeout_s=10.0)

    await asyncio.gather(*(worker(sessions[i % CONNECTIONS_MAX]) for i in range(64)))
    await closed(*sessions)

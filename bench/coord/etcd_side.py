# bench/coord/etcd_side.py: the same loads against etcd, run by the peers' own Python (grpcio): prints JSON lines.
#
# The peers' script is loaded from where it lies (argument 1) for its cluster of three and its hand-encoded messages; nothing of
# it is kept here. Run by bench/coordinator.py; alone: PYTHON etcd_side.py PEERS puts 64 6 | reads 64 6 | killed 5 | frozen 5
# | cut 5
from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

peers = Path(sys.argv[1])
sys.path[:0] = [str(peers), str(Path(__file__).resolve().parents[2])]
from bench.coord import cutting  # noqa: E402 - the path comes first

ref: dict[str, Any] = {"__name__": "etcd_ref"}
exec(  # the script runs its own main at the end; its parts are wanted
    compile((peers / "etcd_ref.py").read_text().replace("asyncio.run(main())", ""), "etcd_ref.py", "exec"), ref
)


def linear_read(key: bytes) -> bytes:
    """A Range of one key that is linearizable, as it is unless asked otherwise."""
    return bytes(ref["lenf"](1, key))


async def load(cluster: Any, what: str, in_flight: int, seconds: float) -> None:
    leader, _ = await ref["leader_index"]()
    channels = [ref["chan"](leader) for _ in range(min(in_flight, 8))]
    same = ref["SER"]
    value = os.urandom(256)
    puts = [channel.unary_unary("/etcdserverpb.KV/Put", same, same) for channel in channels]
    ranges = [channel.unary_unary("/etcdserverpb.KV/Range", same, same) for channel in channels]
    if what == "reads":
        await asyncio.gather(*(_fill(puts[i % len(puts)], i, value) for i in range(64)))
    taken: list[float] = []
    warm = time.perf_counter() + 1.0
    end = warm + seconds

    async def worker(number: int) -> None:
        rng = random.Random(number)
        call = (puts if what == "puts" else ranges)[number % len(channels)]
        while (begun := time.perf_counter()) < end:
            key = b"bench/%06d" % rng.randrange(10_000)
            await call(ref["put_req"](key, value) if what == "puts" else linear_read(key), timeout=10)
            if begun >= warm:
                taken.append(time.perf_counter() - begun)

    workers = [asyncio.create_task(worker(i)) for i in range(in_flight)]
    await asyncio.sleep(1.0)
    before = sum(ref["cpu_of"](member.pid) for member in cluster.m)
    await asyncio.gather(*workers)
    used = sum(ref["cpu_of"](member.pid) for member in cluster.m) - before
    for channel in channels:
        await channel.close()
    ordered, done = sorted(taken), len(taken)
    row = {
        "per_s": done / seconds,
        "p50_ms": ordered[done // 2] * 1e3,
        "p99_ms": ordered[round(0.99 * (done - 1))] * 1e3,
        "server_ms": used / done * 1e3,
    }
    print(json.dumps(row), flush=True)


async def _fill(put: Any, first: int, value: bytes) -> None:
    for number in range(first, 10_000, 64):
        await put(ref["put_req"](b"bench/%06d" % number, value), timeout=10)


async def failover(cluster: Any, fault: str, trials: int) -> None:
    for _ in range(trials):
        leader, _ = await ref["leader_index"]()
        channels = [ref["chan"](i) for i in range(3) if i != leader]
        puts = [channel.unary_unary("/etcdserverpb.KV/Put", ref["SER"], ref["SER"]) for channel in channels]
        ended: list[float] = []
        tasks: set[asyncio.Task[None]] = set()
        running = True

        async def put(number: int, puts: list[Any] = puts, ended: list[float] = ended) -> None:
            try:
                request = ref["put_req"](b"fo/%d" % (number % 100), b"x" * 64)
                await puts[number % 2](request, timeout=8)
            except ref["grpc"].aio.AioRpcError:
                return
            ended.append(time.perf_counter())

        struck, heard, number = 0.0, 0.0, 0
        pid, every = cluster.m[leader].pid, [*ref["CP"], *ref["PP"]]
        rules = cutting.rules(pid, [ref["CP"][leader], ref["PP"][leader]], every) if fault == "cut" else []
        begun = time.perf_counter()
        while running:
            task = asyncio.create_task(put(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            await asyncio.sleep(0.01)
            now = time.perf_counter()
            if not struck and now > begun + 1.2:
                struck = now
                if rules:
                    await asyncio.to_thread(cutting.apply, rules)
                else:
                    os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            if struck and not heard and any(at > struck + 0.05 for at in ended):
                heard = now
            running = not (heard and now > heard + 0.3) and now < begun + 30
        for left in list(tasks):
            left.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if fault == "killed":
            cluster.m[leader].kill9()
            cluster.start(leader)
        elif rules:
            cutting.lift(rules)
        else:
            os.kill(pid, signal.SIGCONT)
        for channel in channels:
            await channel.close()
        times = [at for at in sorted(ended) if at > struck - 0.5]
        print(json.dumps({"gap_s": max(b - a for a, b in pairwise(times))}), flush=True)
        await ref["leader_index"]()
        await asyncio.sleep(1.0)


async def run() -> None:
    what, count = sys.argv[2], int(sys.argv[3])
    cluster = ref["Cluster"]()
    try:
        await ref["leader_index"]()
        if what in ("puts", "reads"):
            await load(cluster, what, count, float(sys.argv[4]))
        else:
            await failover(cluster, what, count)
    finally:
        for member in cluster.m:
            if member.alive():
                os.kill(member.pid, signal.SIGCONT)
        cluster.stop()


asyncio.run(run())

# bench/consensus.py: commits per second of three nodes in one process on the real disk, beside the disk's own sync rate.
#
# What is measured: propose -> append, sync, replicate, commit, apply, answer; messages are packed and unpacked as on the
# wire, without sockets. All three nodes share this one process and its interpreter lock: separate processes do better.
# Run: python bench/consensus.py [--directory DIR] [--seconds 3]
from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import tempfile
import time
from typing import Any

import msgspec
import uvloop

from idunno.base.ids import Index, NodeId
from idunno.consensus.config import RaftConfig
from idunno.consensus.driver import RaftDriver
from idunno.consensus.log import Log
from idunno.consensus.messages import RaftEnvelope, RaftMessage
from idunno.node.disk import RealDisk, ThreadOffload

PAYLOAD = os.urandom(200)  # a typical command


def raw_syncs_per_s(directory: str, seconds: float) -> float:
    """One record written and fdatasync'ed after the other, to space reserved before: what no log can beat one at a time."""
    path = os.path.join(directory, "raw")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, 16 << 20)
        os.fsync(descriptor)
        record, offset, count = bytes(240), 0, 0
        end = time.perf_counter() + seconds
        begun = time.perf_counter()
        while time.perf_counter() < end:
            os.pwrite(descriptor, record, offset)
            os.fdatasync(descriptor)
            offset, count = (offset + len(record)) % (15 << 20), count + 1
        return count / (time.perf_counter() - begun)
    finally:
        os.close(descriptor)


async def cluster(directory: str, nodes: int) -> tuple[dict[NodeId, RaftDriver], list[ThreadOffload]]:
    names = [NodeId(f"n{i}") for i in range(1, nodes + 1)]
    drivers: dict[NodeId, RaftDriver] = {}
    pools: list[ThreadOffload] = []
    loop = asyncio.get_running_loop()

    def sender(me: NodeId) -> Any:
        def send(to: NodeId, message: RaftMessage) -> None:
            data = msgspec.msgpack.encode(RaftEnvelope(message))
            loop.call_soon(receive, to, me, data)

        return send

    def receive(to: NodeId, sender_: NodeId, data: bytes) -> None:
        drivers[to].receive(sender_, msgspec.msgpack.decode(data, type=RaftEnvelope).message)

    def apply(index: Index, payload: bytes) -> int:
        return index

    for name in names:
        root = os.path.join(directory, name)
        os.mkdir(root)
        pools.append(ThreadOffload(1, f"disk-{name}"))
        disk = RealDisk(root, pools[-1])
        await Log.create(disk, b"first")
        drivers[name] = RaftDriver(
            name, disk, send=sender(name), apply=apply, config=RaftConfig(), rng=random.Random(name), voters=names
        )
    return drivers, pools


async def elected(drivers: dict[NodeId, RaftDriver]) -> RaftDriver:
    """Start them all; the first that leads."""
    leads: asyncio.Future[RaftDriver] = asyncio.get_running_loop().create_future()

    def told(driver: RaftDriver, is_leader: bool) -> None:
        if is_leader and not leads.done():
            leads.set_result(driver)

    for driver in drivers.values():
        driver.on_role.append(lambda is_leader, _, driver=driver: told(driver, is_leader))  # type: ignore[misc]
        await driver.start()
    return await asyncio.wait_for(leads, 30)


async def measure(directory: str, nodes: int, in_flight: int, seconds: float) -> tuple[float, float, float]:
    """Commits/s, and the median and 99th percentile of their latency in ms."""
    drivers, pools = await cluster(directory, nodes)
    leading = await elected(drivers)
    latencies: list[float] = []
    begun = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - begun < seconds:
            sent = time.perf_counter()
            await leading.propose(PAYLOAD, 30)
            latencies.append((time.perf_counter() - sent) * 1000)

    await asyncio.gather(*(client() for _ in range(in_flight)))
    spent = time.perf_counter() - begun
    await asyncio.gather(*(driver.stop(transfer=False) for driver in drivers.values()))
    for pool in pools:
        pool.close()
    assert leading.applied_index > len(latencies), "answered without being applied"
    latencies.sort()
    return len(latencies) / spent, latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", help="where to make the logs: on the disk to be measured")
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    print(
        f"{'nodes':>5} {'in flight':>9} {'commits/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'fdatasync/s':>12} {'ratio':>6}"
    )
    for nodes in (1, 3):
        for in_flight in (1, 16, 64):
            top = tempfile.mkdtemp(prefix="idunno-bench-", dir=arguments.directory)
            try:
                raw = raw_syncs_per_s(top, 1.0)
                rate, p50, p99 = uvloop.run(measure(top, nodes, in_flight, arguments.seconds))
            finally:
                shutil.rmtree(top)
            print(f"{nodes:5} {in_flight:9} {rate:10.0f} {p50:8.2f} {p99:8.2f} {raw:12.0f} {rate / raw:6.2f}")


if __name__ == "__main__":
    main()

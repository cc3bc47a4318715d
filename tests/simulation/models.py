# tests/simulation/models.py: what stands for a model's child process: a declared cost instead of a computation.
#
# Rule 1: inputs are `.jsonl`, a query a line. The answer to a line is a function of the line alone (`answer_to`), so that a
#         checker can tell whether a query was answered, by whomever, with its own answer.
# Rule 2: it reads and writes the machine's simulated disk, and takes the time that its `Cost` says.
from __future__ import annotations

import asyncio
import random
import zlib
from collections import Counter
from dataclasses import dataclass

import msgspec

from idunno.base.disk import Disk
from idunno.base.errors import ModelFailed
from idunno.coordinator.timing import TimingTotal
from idunno.worker.protocol import Ran

READ_MAX = 1 << 30


@dataclass(slots=True)
class Cost:
    start_s: float = 0.3
    load_s: float = 0.4
    query_s: float = 0.01
    noise: float = 0.2
    """Relative, of each task."""
    crash: float = 0.0
    """The chance that a task kills the process."""


def answer_to(line: bytes) -> int:
    return zlib.crc32(line)


class SimRunner:
    """worker.runner.Runner."""

    def __init__(self, prefix: str, disk: Disk, cost: Cost, rng: random.Random, counts: Counter[str]) -> None:
        self._prefix, self._disk, self._cost, self._rng, self._counts = prefix, disk, cost, rng, counts
        self._alive = True

    @property
    def alive(self) -> bool:
        return self._alive

    async def load(self, model: str, folder: str, runtime: str, *, threads: int, timeout_s: float) -> str:
        await self._take(self._cost.load_s, timeout_s)
        if not await self._disk.list(self._path(folder)):
            raise ModelFailed(f"model {model} has no files in {folder}")
        return "line -> number"

    async def count(self, path: str, kind: str, *, timeout_s: float) -> int:
        await self._take(0.01, timeout_s)
        return len(await self._lines(path))

    async def run(self, path: str, kind: str, first: int, last: int, out_path: str, *, timeout_s: float) -> Ran:
        lines = (await self._lines(path))[first:last]
        took_s = self._cost.query_s * len(lines) * (1.0 + self._cost.noise * self._rng.random())
        await self._take(took_s, timeout_s)
        if self._cost.crash and self._rng.random() < self._cost.crash:
            self._counts["model crashed"] += 1
            self._alive = False
            raise ModelFailed("model died: signal 9 (killed)")
        encode = msgspec.json.encode
        out = b"".join(
            encode({"query": number, "output": answer_to(line)}) + b"\n" for number, line in enumerate(lines, first)
        )
        file = await self._disk.open(self._path(out_path), create=True)
        await file.truncate(0)
        await file.write(0, [out])
        await file.close()
        timing = TimingTotal()
        timing.measure(int(took_s / max(1, len(lines)) * 1e6), len(lines))
        return Ran(len(lines), 0, len(out), timing.record())

    async def close(self) -> None:
        self._alive = False

    async def _lines(self, path: str) -> list[bytes]:
        return (await self._disk.read_all(self._path(path), bytes_max=READ_MAX)).splitlines()

    async def _take(self, seconds: float, timeout_s: float) -> None:
        try:
            await asyncio.sleep(min(seconds, timeout_s))
        except asyncio.CancelledError:
            self._alive = False  # who stops waiting has killed the process
            raise
        if seconds > timeout_s:
            self._alive = False
            raise ModelFailed(f"killed after {timeout_s:g} s")

    def _path(self, absolute: str) -> str:
        assert absolute.startswith(self._prefix), f"{absolute} is not below {self._prefix}"
        return absolute[len(self._prefix) :]

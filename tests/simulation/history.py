# tests/simulation/history.py: users who all write the same few names at once, and write down what they asked and what they heard.
#
# Rule 1: the shipped client asks; an answer is noted as it came. An error that says "may have happened" leaves the operation open
#         for ever; one that says "certainly not" is believed: if it lies, the history is not legal.
# Rule 2: what is written is different each time, so a read says whose write it saw.
# Rule 3: objects: small files (in the log), files of blocks, and registers (a retention rule of a prefix in which no file lies).
from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from idunno.base.disk import Buffer
from idunno.base.errors import Conflict, IdunnoError, NotFound
from idunno.sdfs.client import source_of
from tests.simulation.clients import Client, Promises
from tests.simulation.linearizable import (
    CONFLICT,
    DONE,
    NOT_FOUND,
    OPEN,
    Delete,
    FileState,
    Found,
    Get,
    Operation,
    Put,
    Read,
    Verdict,
    Versions,
    Write,
    check,
    file,
    plain,
    register,
    told,
    versions_too_far,
)
from tests.simulation.world import World

SMALL: Final = tuple(f"shared/small-{n}" for n in range(5))
LARGE: Final = tuple(f"shared/large-{n}" for n in range(3))
REGISTERS: Final = tuple(f"register-{n}/" for n in range(2))
OPERATION_S: Final = 6.0
"""A user's patience: longer than an election, shorter than many faults, so that some outcomes stay unknown."""
THINK_S: Final = 0.06


class History:
    """What was asked of each object, and what was answered."""

    def __init__(self, world: World, promises: Promises) -> None:
        self._world, self._promises = world, promises
        self.objects: dict[str, list[Operation]] = {name: [] for name in (*SMALL, *LARGE, *REGISTERS)}
        self.counts: Counter[str] = Counter()

    async def take(self, name: str, by: str, asked: Any, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do it and note it; returns the answer, None when there is none."""
        begin, puts = self._world.scheduler.now, isinstance(asked, Put)
        kind = type(asked).__name__.lower()
        self._promises.puts_under_way += puts
        try:
            answer = await work()
        except NotFound:
            answer = NOT_FOUND
        except IdunnoError as error:
            if isinstance(error, Conflict) and isinstance(asked, Put) and "the put wanted" in str(error):
                answer = CONFLICT
            else:
                changes = isinstance(asked, Put | Delete | Write)
                self.counts[f"{kind}: {error.code}"] += 1
                if changes and error.may_have_happened:
                    self.objects[name].append(Operation(begin, None, asked, OPEN, by))
                elif changes:
                    self._world.trace.note("certainly not", by, name, str(asked), error.code)
                return None
        finally:
            self._promises.puts_under_way -= puts
        self.objects[name].append(Operation(begin, self._world.scheduler.now, asked, answer, by))
        self.counts[kind if answer not in (NOT_FOUND, CONFLICT) else f"{kind} {answer}"] += 1
        self._world.trace.note("answered", by, name, str(asked), str(answer))
        return answer

    @property
    def operations(self) -> int:
        return sum(len(operations) for operations in self.objects.values())

    def judge(self) -> list[str]:
        """What is wrong with it, object by object; [] when every object's history could have happened."""
        wrong = []
        for name, operations in self.objects.items():
            history = plain(operations)
            found = self._check(name, history)
            self.counts["steps of the checker"] += found.steps
            if found.verdict is Verdict.UNDECIDED:
                self.counts["undecided"] += 1
            elif found.verdict is Verdict.ILLEGAL:
                wrong.append(f"{name} is not linearizable: {told(found, history)}")
        return wrong

    def _check(self, name: str, history: list[Operation]) -> Found:
        if name in REGISTERS:
            return check(register, 0, history)
        return check(file, FileState(), history, too_far=versions_too_far)


class User:
    """One of the clients, at work on what all of them share."""

    def __init__(self, client: Client, history: History) -> None:
        self._client, self._history, self._rng = client, history, random.Random(f"{client.world.seed} {client.name}")
        self._numbers = 0
        self._known: dict[str, int] = {}  # the version of each file that it heard of last

    def work(self, operations: int) -> Callable[[], Coroutine[Any, Any, None]]:
        async def do() -> None:
            for _ in range(operations):
                await asyncio.sleep(self._rng.expovariate(1.0 / THINK_S))
                await self._one()

        return do

    async def _one(self) -> None:
        rng = self._rng
        chance = rng.random()
        if chance < 0.12:
            await self._register(rng.choice(REGISTERS))
        else:
            await self._file(rng.choice(SMALL if chance < 0.75 else LARGE), rng.random())

    async def _register(self, prefix: str) -> None:
        files, take, me = self._client.files, self._history.take, self._client.name
        if self._rng.random() < 0.5:
            value = self._number()

            async def write() -> str:
                await files.retain(prefix, versions=value, timeout_s=OPERATION_S)
                return DONE

            await take(prefix, me, Write(value), write)
            return

        async def read() -> int:
            rules = await files.retain(prefix, show=True, timeout_s=OPERATION_S)
            return next((rule.versions for rule in rules if rule.prefix == prefix), 0)

        await take(prefix, me, Read(), read)

    async def _file(self, name: str, chance: float) -> None:
        files, take, me = self._client.files, self._history.take, self._client.name
        if chance < 0.32:
            await self._put(name, None)
        elif chance < 0.5:
            await self._put(name, self._known.get(name, 0))
        elif chance < 0.84:
            answer = await take(name, me, Get(), lambda: self._get(name))
            if answer is not None:
                self._known[name] = answer[0] if answer != NOT_FOUND else 0
        elif chance < 0.92:

            async def versions() -> tuple[int, ...]:
                return tuple(row.version for row in await files.versions(name, timeout_s=OPERATION_S))

            await take(name, me, Versions(), versions)
        else:

            async def delete() -> str:
                await files.delete(name, timeout_s=OPERATION_S)
                return DONE

            await take(name, me, Delete(), delete)

    async def _put(self, name: str, if_version: int | None) -> None:
        label = f"{self._client.name}.{self._number()}"
        size = self._rng.randrange(4_200, 12_000) if name in LARGE else self._rng.randrange(20, 400)
        content = label.encode().ljust(size, b".")

        async def put() -> int:
            source = source_of(content)
            answer = await self._client.files.put(source, name, size=size, if_version=if_version, timeout_s=OPERATION_S)
            return answer.version

        version = await self._history.take(name, self._client.name, Put(label, if_version), put)
        if isinstance(version, int):
            self._known[name] = version

    async def _get(self, name: str) -> tuple[int, str]:
        pieces: dict[int, bytes] = {}

        async def sink(offset: int, content: Buffer) -> None:
            pieces[offset] = bytes(content)

        info = await self._client.files.get(name, sink, timeout_s=OPERATION_S)
        return info.version, b"".join(pieces[offset] for offset in sorted(pieces)).rstrip(b".").decode()

    def _number(self) -> int:
        self._numbers += 1
        return int(self._client.name[1:]) * 1_000_000 + self._numbers

# idunno/sdfs/expiry.py: the leader's proposals of what expires and what leaves the trash.
#
# Rule 1: commands name explicit versions and entries; a leader that is deposed in the middle has proposed nothing wrong.
# Rule 2: machine time stands still while nobody gives a command; what is due is judged by the stamp of the next one.
# Rule 3: a look is bounded: so many proposals, so many names in one turn of the loop; the next look goes on
#         behind the file where it ended, so that nobody who writes fast keeps it from others' files.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from idunno.base.errors import IdunnoError
from idunno.base.ids import NodeId
from idunno.coordinator.commands import Command, Expire, Purge
from idunno.coordinator.machine import Machine
from idunno.coordinator.names import SYSTEM
from idunno.coordinator.trash import expired
from idunno.sdfs import tasks
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.ports import Coordination
from idunno.wire.calls import Actor, Role

log = logging.getLogger("idunno.sdfs")

PROPOSALS_MAX: Final = 1_000
"""In one look: about a second of the log's time."""
VERSIONS_MAX: Final = 1_000
"""In one command."""
NAMES_SLICE: Final = 200
PROPOSE_S: Final = 10.0


class Expiry:
    def __init__(self, me: NodeId, coordinator: Coordination, *, config: SdfsConfig) -> None:
        self._actor, self._coordinator, self._config = Actor(me, Role.NODE), coordinator, config
        self._ended_at = ""  # the file with which the last look had proposed all it may
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, leads: Callable[[], bool]) -> None:
        self._task = tasks.begin(self._run(leads), "expiry")

    async def stop(self) -> None:
        await tasks.end(self._task)
        self._task = None

    def wake(self) -> None:
        """A rule has changed: look now."""
        self._wake.set()

    async def _run(self, leads: Callable[[], bool]) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.retain_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if not leads():
                continue
            try:
                await self.look()
            except IdunnoError as error:  # the next look, or another leader, goes on
                log.warning("not expired", extra={"code": error.code, "error": str(error)})

    async def look(self) -> None:
        """Propose what is due. Raises IdunnoError."""
        machine = await self._coordinator.read(PROPOSE_S)
        left = PROPOSALS_MAX
        while left > 0 and (entries := _due(machine, self._now_ms(machine) - self._config.trash_ms)):
            await self._propose(Purge(entries))
            log.info("trash purged", extra={"entries": len(entries)})
            left -= 1
        if left > 0:
            begin, self._ended_at = self._ended_at, ""
            left -= await self._look_at_files(machine, begin, "", left)
            if begin:
                left -= await self._look_at_files(machine, "", begin, left)
        if left <= 0:  # there may be more
            self._wake.set()

    async def _look_at_files(self, machine: Machine, after: str, last: str, limit: int) -> int:
        """Expire what the rules say of the files behind `after`, up to `last` ("" all); the number of proposals."""
        proposed = 0
        for prefix in machine.namespace.retention.roots():
            more = limit > 0
            while more:
                # A snapshot may take the namespace's place while others have their turn.
                names, more = machine.namespace.names(prefix, after, NAMES_SLICE)
                for name in names:
                    if last and name > last:
                        return proposed
                    proposed += await self._expire(machine, name, limit - proposed)
                    if proposed == limit:
                        self._ended_at = name
                        return proposed
                after = names[-1] if names else after
                await asyncio.sleep(0)
        return proposed

    async def _expire(self, machine: Machine, name: str, limit: int) -> int:
        """Expire what is due of one file; the number of proposals."""
        for proposed in range(limit):
            namespace = machine.namespace
            versions = namespace.history(name)
            rule = namespace.retention.rule_for(name, versions[-1].owner) if len(versions) > 1 else None
            if rule is None or name.startswith(SYSTEM):
                return proposed
            gone = expired(versions, rule, self._now_ms(machine), VERSIONS_MAX)
            if gone:
                await self._propose(Expire(name, gone))
                log.info("versions expired", extra={"file": name, "versions": len(gone)})
            if len(gone) < VERSIONS_MAX:
                return proposed + bool(gone)
        return limit

    def _now_ms(self, machine: Machine) -> int:
        return max(machine.now_ms, self._coordinator.now_ms())

    async def _propose(self, command: Command) -> None:
        await self._coordinator.propose(command, actor=self._actor, timeout_s=PROPOSE_S)


def _due(machine: Machine, before_ms: int) -> tuple[int, ...]:
    """The oldest entries, thrown away up to then, with at most VERSIONS_MAX versions, but at least one."""
    found: list[int] = []
    versions = 0
    for entry in machine.namespace.trash.entries.values():
        versions += len(entry.versions)
        if entry.at_ms > before_ms or (found and versions > VERSIONS_MAX):
            break
        found.append(entry.entry)
    return tuple(found)

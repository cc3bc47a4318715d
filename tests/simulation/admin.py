# tests/simulation/admin.py: the person who looks after a simulated cluster: machines that say they cannot go on are replaced.
#
# Rule 1: an admin acts on what a node said when it ended, or says while it runs (its status has it), and on nothing that only
#         this world knows: then another machine joins at the same address with an empty disk, and the old node is removed.
#         Everything goes the way that users have.
# Rule 2: a machine that was replaced is no more in `world.machines`; it stays in `by_id`, so that it can be named.
from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from idunno.base.errors import IdunnoError, NotFound
from idunno.consensus.records import REJOIN
from idunno.coordinator.messages import NODE_REMOVE, RemoveDead
from tests.simulation.joining import grow
from tests.simulation.machine import Machine

if TYPE_CHECKING:
    from tests.simulation.clients import Client
    from tests.simulation.world import World

LOOKS_S: Final = 1.0
"""After this the admin has read what the node said."""
REPLACED_S: Final = 120.0
"""So long a replacement may take, while other things go wrong too."""
GIVEN_UP: Final = (REJOIN, "with an empty directory")
"""What a node says when its disk is not to be trusted any more (Corrupt of the log, Conflict of roster and consensus)."""


class Admin:
    def __init__(self, world: World, client: Client) -> None:
        self.world, self.client = world, client
        self.replaced = 0
        self._under_way: set[asyncio.Task[None]] = set()
        world.on_died.append(self._died)
        world.on_log.append(self._logged)

    def _died(self, machine: Machine, how: str) -> None:
        if machine in self.world.machines and any(words in how for words in GIVEN_UP):
            machine.given_up = how
            self.world.machines.remove(machine)
            self.begin(self._replace(machine))

    def _logged(self, machine: Machine, record: logging.LogRecord) -> None:
        """A node that reads a damaged entry while it runs takes no part any more, says so, and waits to be looked after."""
        why = str(vars(record).get("problem", ""))
        if record.msg == "node takes no part in consensus" and any(words in why for words in GIVEN_UP):
            self.world.loop.call_soon(self._end, machine, machine.starts, why)

    def _end(self, machine: Machine, starts: int, why: str) -> None:
        if machine.running and machine.starts == starts:
            self.world.trace.tell("is ended by its admin", machine=machine.name)
            self.world.end(machine.name, why)

    def begin(self, work: object) -> None:
        task = self.world.loop.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def finish(self) -> None:
        """Wait for what is under way."""
        while self._under_way:
            await asyncio.wait(set(self._under_way))

    async def _replace(self, machine: Machine) -> None:
        await asyncio.sleep(LOOKS_S)
        self.world.trace.tell("is replaced", machine=machine.name, why=machine.given_up[:200])
        await grow(self.world, machine.address, within_s=REPLACED_S)
        await self.remove(machine)
        self.replaced += 1

    async def remove(self, machine: Machine) -> None:
        """`idunno remove`, again until it is done: the node may not be known to be dead yet, or there is no leader."""
        world, end = self.world, self.world.scheduler.now + REPLACED_S
        request = RemoveDead(machine.id, f"{machine.number:032x}")
        while True:
            try:
                await self.client.inside(lambda: self.client.session.call(NODE_REMOVE, request, timeout_s=15.0))
                break
            except NotFound:
                break  # an earlier attempt whose answer was lost
            except IdunnoError as error:
                world.trace.tell("cannot be removed yet", machine=machine.name, error=str(error)[:200])
                if world.scheduler.now > end:
                    world.found(f"{machine.name} cannot be removed within {REPLACED_S:g} s: {error}")
                    world.check()
                await asyncio.sleep(1.0)
        world.trace.tell("removed", machine=machine.name)

# tests/simulation/joining.py: a machine that was in no world before becomes a member: `idunno join`, then its first start.
#
# Rule 1: a process of its own on the new machine runs the shipped lifecycle's `enroll`, over the simulated network, with no
#         certificate; what it is given is written to the machine's disk as make_directory does to a real one.
from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

from idunno.base.errors import IdunnoError
from idunno.consensus.log import Log
from idunno.coordinator.messages import EnrollAnswer
from idunno.node.identity import KnownPeers
from idunno.node.lifecycle import enroll
from tests.simulation.disk import DiskView
from tests.simulation.loop import new_loop
from tests.simulation.machine import PORT, SEGMENT_BYTES, Machine

if TYPE_CHECKING:
    from tests.simulation.world import World

AGAIN_S: Final = 1.0


async def join(world: World, machine: Machine, through: Machine) -> None:
    """One attempt. Raises what the cluster says, and Unavailable."""
    host = machine.host
    host.certificate, host.up = None, True
    loop = host.loop = new_loop(world.scheduler, f"{machine.name}.join", host)
    answer: asyncio.Future[EnrollAnswer] = world.loop.create_future()

    async def process() -> None:
        try:
            _, _, got = await enroll(
                f"{through.address}:{PORT}", world.node_token, Path(f"/{machine.name}"), machine.config
            )
            await _write(machine, got)
        except Exception as error:  # noqa: BLE001 - carried over to who waits
            world.loop.call_soon(answer.set_exception, error)
        else:
            world.loop.call_soon(answer.set_result, got)

    loop.call_soon(lambda: loop.create_task(process()))
    try:
        await answer
    finally:
        loop.kill()
        host.loop = None
        host.process_ends(power_lost=False)
        loop.bury()
    host.certificate = machine.certificate


async def _write(machine: Machine, answer: EnrollAnswer) -> None:
    machine.certificate = answer.certificate_pem
    machine.prepare(KnownPeers(answer.members), answer.cluster_key, None)
    await Log.create(DiskView(machine.disk, serial=False), None, segment_bytes=SEGMENT_BYTES)


async def grow(world: World, address: str = "", *, within_s: float = 60.0) -> Machine:
    """A new machine joins through any that serves, again and again as a person would, and starts. Raises AssertionError."""
    machine = world.new_machine(address)
    world.trace.tell("is to join", machine=machine.name, address=machine.address)
    end, tried = world.scheduler.now + within_s, 0
    while True:
        serving = [m for m in world.machines if m.serving]
        try:
            if serving:
                await join(world, machine, serving[tried % len(serving)])
                break
        except IdunnoError as error:
            world.trace.tell("cannot join yet", machine=machine.name, error=str(error)[:200])
        tried += 1
        if world.scheduler.now > end:
            world.found(f"{machine.name} could not join within {within_s:g} s")
            world.check()
        await asyncio.sleep(AGAIN_S)
    world.trace.tell("has joined", machine=machine.name)
    world.machines.append(machine)
    world.start(machine.name)
    return machine

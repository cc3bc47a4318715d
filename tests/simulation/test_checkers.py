# The checkers see: each mistake planted here is found by the check that is there for it.
from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest

from idunno.coordinator.machine import Machine as ReplicatedMachine
from tests.simulation.clients import Client
from tests.simulation.disk import DiskView, Inode, SimDisk
from tests.simulation.loop import Scheduler, Stuck, new_loop
from tests.simulation.models import SimRunner
from tests.simulation.scenario import make, mixed
from tests.simulation.trace import Trace
from tests.simulation.world import World


def test_a_disk_that_only_says_it_synced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost varies: contents, a node, or all nodes, so that who is to replace one cannot join."""
    monkeypatch.setattr(Inode, "sync", lambda self: None)
    found = r"did not start|was acknowledged|not one cluster|a leader|could not join"
    with pytest.raises(AssertionError, match=found):
        mixed("lying disk", seconds=6, kinds=["power_all"])


def test_machines_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = ReplicatedMachine.apply
    machines: list[ReplicatedMachine] = []

    def wrong(self: ReplicatedMachine, index: Any, payload: bytes) -> Any:
        result = apply(self, index, payload)
        if index == 20:
            machines.append(self)
            self.now_ms += 3_600_000 * len(machines)  # as if each had read a clock of its own
        return result

    monkeypatch.setattr(ReplicatedMachine, "apply", wrong)
    with pytest.raises(AssertionError, match=r"machines? .*differ"):
        mixed("different machines", seconds=6, kinds=[])


def test_two_leaders_in_a_term_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate elects itself."""
    monkeypatch.setattr("idunno.consensus.raft.majority", lambda voters: 1)
    with pytest.raises(AssertionError, match=r"two leaders in term|differs"):
        mixed("self-elected", seconds=10, kinds=["partition", "kill"])


def test_an_accusation_without_a_fault_is_found() -> None:
    cluster = make("unexplained", clients=0)

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(12)
        silent = world.machines[0]
        for other in world.machines[1:]:
            world.network.block(silent.address, other.address)
        await asyncio.sleep(10)

    with pytest.raises(AssertionError, match=r"calls n. failed, and nothing is wrong with it"):
        cluster.world.run(story)


def test_a_query_that_is_answered_with_another_ones_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimRunner.run

    async def shifted(self: SimRunner, path: str, kind: str, first: int, last: int, out_path: str, **kw: Any) -> Any:
        ran = await run(self, path, kind, first, last, out_path, **kw)
        file = await self._disk.open(self._path(out_path))
        lines = [msgspec.json.decode(line) for line in (await file.read(0, 1 << 20)).splitlines()]
        lines[0]["query"] += 1
        out = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        await file.truncate(0)
        await file.write(0, [out])
        return msgspec.structs.replace(ran, size=len(out))

    monkeypatch.setattr(SimRunner, "run", shifted)
    with pytest.raises(AssertionError, match=r"answers other queries"):
        mixed("shifted answers", seconds=12, kinds=[])


def test_content_that_is_not_as_it_was_put_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    got = Client._get

    async def flipped(self: Client, name: str, version: int | None, timeout_s: float) -> Any:
        found = await got(self, name, version, timeout_s)
        return (found[0], found[1][:-1]) if isinstance(found, tuple) and len(found[1]) > 100 else found

    monkeypatch.setattr(Client, "_get", flipped)
    with pytest.raises(AssertionError, match=r"is not as it was put|nobody put"):
        mixed("flipped", seconds=5, kinds=[])


def test_a_version_that_is_lost_is_found() -> None:
    cluster = make("lost", clients=1)

    async def story(world: World) -> None:
        await cluster.begin(jobs=False)
        await asyncio.sleep(5)
        cluster.promises.files["c1/file-0"].acknowledged[99] = b"it was never there"
        await cluster.end()

    with pytest.raises(AssertionError, match=r"c1/file-0.*was acknowledged"):
        cluster.world.run(story)


def test_a_task_that_spins_is_found() -> None:
    scheduler = Scheduler()
    loop = new_loop(scheduler, "spinning")

    async def spin() -> None:
        while True:  # noqa: ASYNC110 - that is the mistake
            await asyncio.sleep(0)

    loop.create_task(spin())
    with pytest.raises(Stuck):
        scheduler.run(1.0)
    loop.kill()
    loop.bury()


def test_an_unsynced_write_may_be_torn_and_a_synced_one_never_is() -> None:
    scheduler = Scheduler()
    loop = new_loop(scheduler, "disk")
    outcomes = set()

    async def write(view: DiskView) -> None:
        file = await view.open("kept", create=True)
        await file.write(0, [b"a" * 4096], sync=True)
        await view.sync_directory("")
        await file.write(0, [b"b" * 4096])
        await view.open("new", create=True)

    for seed in range(40):
        disk = SimDisk(random.Random(seed), Trace(scheduler), "d")
        loop.run_alone(write(DiskView(disk, serial=False)), scheduler.now + 10)
        disk.lose_power()
        content = disk.content("kept")
        assert len(content) == 4096
        sectors = {content[at : at + 512] for at in range(0, 4096, 512)}
        assert sectors <= {b"a" * 512, b"b" * 512}  # torn at sectors, never inside one
        outcomes.add((len(sectors), "new" in disk.paths()))
    assert {(2, True), (2, False)} <= outcomes

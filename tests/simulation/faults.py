# tests/simulation/faults.py: everything that goes wrong, drawn from the world's seed or scripted by a story.
#
# Rule 1: a fault begins, lasts, and ends by itself; `end_all` ends what is left. It never goes further than its own kind:
#         what follows from it is the cluster's doing.
# Rule 2: each fault says whom it disturbs, so that the checkers know what they may not hold against the detector.
# Rule 3: what destroys something that was written and synced strikes one machine of a world, always the same, so that the copies
#         that the product makes are enough; and again only when that machine's place was filled.
# Rule 4: every kind can strike at every stage; when it does, the dose is counted.
from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tests.simulation.admin import Admin
from tests.simulation.checkers import Checkers
from tests.simulation.clients import Promises
from tests.simulation.disk import Inode
from tests.simulation.dose import Dose, stages_now
from tests.simulation.joining import grow
from tests.simulation.loop import State
from tests.simulation.machine import Machine
from tests.simulation.network import SPREADS, Quality

if TYPE_CHECKING:
    from tests.simulation.world import World

GIB: Final = 1024**3
JOINS_MAX: Final = 2
"""New machines in one world, so that it stays small."""
JOINED_S: Final = 90.0
"""So long a join may take, while other things go wrong."""


class Faults:
    def __init__(self, world: World, checkers: Checkers, promises: Promises, dose: Dose, admin: Admin) -> None:
        self.world, self.checkers, self.promises, self.dose = world, checkers, promises, dose
        self.rng = random.Random(f"{world.seed} faults")
        self._ends: dict[int, tuple[asyncio.Task[None], Callable[[], None]]] = {}
        self._number = 0
        self.admin = admin
        self._worn_address = world.machines[0].address
        self._image: tuple[Machine, dict[str, Inode]] | None = None
        """Of the worn machine's disk, some time ago."""
        self._joins = 0

    # -- running --------------------------------------------------------------------------------------------------

    async def storm(self, seconds: float, kinds: list[str], every_s: float) -> None:
        """Faults of these kinds, one after another and over each other, for so long."""
        end = self.world.scheduler.now + seconds
        bag: list[str] = []
        missed: list[str] = []
        self._take_image()
        while self.world.scheduler.now < end:
            await asyncio.sleep(self.rng.expovariate(1.0 / every_s))
            if not bag:  # each kind once before any comes again, so that few worlds miss one
                bag, missed = kinds + missed, []
                self.rng.shuffle(bag)
            kind = bag.pop()
            if not self.strike(kind) and kind in WEAR:
                missed.append(kind)  # there was nothing to destroy yet, or nothing again: it comes twice next time

    def strike(self, kind: str, *machines: str) -> bool:
        """Let it happen now, to these machines or to some drawn by chance. Whether it did."""
        chosen = [self.world.machine(name) for name in machines]
        if len(self.world.machines) < NODES_LEAST.get(kind, 1):
            return False
        stages = stages_now(self.world, self.promises)
        struck = KINDS[kind](self, chosen)
        if struck:
            self.dose.strike(kind, stages)
        return struck

    def lasts(self, seconds: float, end: Callable[[], None], machines: list[Machine], slack_s: float = 8.0) -> None:
        """`end` is called after so many seconds, or by `end_all`."""
        self._number += 1
        number, now = self._number, self.world.scheduler.now
        self.checkers.disturb(now, now + seconds + slack_s, frozenset(machine.name for machine in machines))

        async def wait() -> None:
            await asyncio.sleep(seconds)
            del self._ends[number]
            end()

        self._ends[number] = (self.world.loop.create_task(wait(), name="fault"), end)

    def end_all(self) -> None:
        """Everything is mended, and who is down is started."""
        ends, self._ends = self._ends, {}
        for task, end in ends.values():
            task.cancel()
            end()
        for machine in self.world.machines:
            if machine.rate != 1.0:
                machine.drift(1.0)  # what clocks show stays wrong: nothing in the cluster may depend on it
            if not machine.running:
                self.world.start(machine.name)

    def some(self, chosen: list[Machine], *, count: int = 1, running: bool = True) -> list[Machine]:
        """The chosen machines, or so many drawn by chance, the leader more often than others."""
        if chosen:
            return chosen
        able = [m for m in self.world.machines if m.serving] if running else list(self.world.machines)
        leader = self.world.leader()
        if leader in able and leader is not None and self.rng.random() < 0.3:
            able.remove(leader)
            return [leader, *self.rng.sample(able, min(count - 1, len(able)))]
        return self.rng.sample(able, min(count, len(able)))

    def length_s(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    # -- processes and machines -----------------------------------------------------------------------------------

    def _back_after(self, machine: Machine, seconds: float) -> None:
        def start() -> None:
            if not machine.running and not machine.given_up:
                self.world.start(machine.name)

        self.lasts(seconds, start, [machine])

    def kill(self, chosen: list[Machine]) -> bool:
        machines = self.some(chosen, count=1 if self.rng.random() < 0.8 else 2)
        for machine in machines:
            self.world.kill(machine.name)
            self._back_after(machine, self.length_s(0.1, 6.0))
        return bool(machines)

    def power(self, chosen: list[Machine]) -> bool:
        machines = self.some(chosen, count=1 if self.rng.random() < 0.8 else 3)
        for machine in machines:
            self.world.lose_power(machine.name)
            self._back_after(machine, self.length_s(0.5, 6.0))
        return bool(machines)

    def power_all(self, chosen: list[Machine]) -> bool:
        """The room goes dark."""
        running = [machine for machine in self.world.machines if machine.running]
        for machine in running:
            self.world.lose_power(machine.name)
            self._back_after(machine, self.length_s(0.5, 2.0))
        self.checkers.disturb(self.world.scheduler.now, self.world.scheduler.now + 12.0)
        return bool(running)

    def stop(self, chosen: list[Machine]) -> bool:
        machines = self.some(chosen)
        for machine in machines:
            if not hasattr(machine.node, "agent"):
                return False
            self.lasts(6.0, lambda: None, [machine])
            self.world.begin_stop(machine.name)
            assert machine.ended is not None
            machine.ended.add_done_callback(lambda _, machine=machine: self._back_after(machine, 1.0))  # type: ignore[misc]
        return bool(machines)

    def freeze(self, chosen: list[Machine]) -> bool:
        machines = self.some(chosen)
        for machine in machines:
            seconds = self.length_s(0.2, 0.9) if self.rng.random() < 0.5 else self.length_s(1.0, 6.0)
            loop = machine.loop
            self.world.freeze(machine.name)

            def thaw(machine: Machine = machine, loop: object = loop) -> None:
                if machine.loop is loop and machine.loop is not None and machine.loop.state is State.FROZEN:
                    self.world.thaw(machine.name)

            self.lasts(seconds, thaw, [machine])
        return bool(machines)

    def clock(self, chosen: list[Machine]) -> bool:
        machine = self.some(chosen, running=False)[0]
        machine.skew_ms += self.rng.choice([-1, 1]) * self.rng.choice([300, 5_000, 3_600_000, 6 * 3_600_000])
        self.world.trace.tell("clock steps", machine=machine.name, skew_ms=machine.skew_ms)
        return True

    def drift(self, chosen: list[Machine]) -> bool:
        """A machine's clocks go too fast or too slowly, its timers included, until everything is mended."""
        machine = self.some(chosen, running=False)[0]
        machine.drift(self.rng.choice([0.9, 0.99, 1.01, 1.1]))
        self.world.trace.tell("clocks drift", machine=machine.name, rate=machine.rate)
        return True

    def join(self, chosen: list[Machine]) -> bool:
        """A machine that was in no cluster joins this one."""
        if self._joins == JOINS_MAX:
            return False
        self._joins += 1
        self.admin.begin(self._join())
        return True

    async def _join(self) -> None:
        await grow(self.world, within_s=JOINED_S)

    # -- the network ----------------------------------------------------------------------------------------------

    def partition(self, chosen: list[Machine]) -> bool:
        """Two halves; sometimes one machine still reaches both."""
        machines = list(self.world.machines)
        self.rng.shuffle(machines)
        bridge = [machines.pop()] if self.rng.random() < 0.25 else []
        at = 1 if self.rng.random() < 0.4 else len(machines) // 2
        here, there = ([m.name for m in side] for side in (machines[:at], machines[at:]))
        heal = self.world.partition(here, there)
        if bridge:
            self.world.trace.tell("bridged", machine=bridge[0].name)
        self.lasts(self.length_s(0.5, 8.0), heal, [])
        return True

    def one_way(self, chosen: list[Machine]) -> bool:
        """A machine is heard by nobody, or hears nobody."""
        machine = self.some(chosen)[0] if self.some(chosen) else self.world.machines[0]
        others = [m for m in self.world.machines if m is not machine]
        deaf = self.rng.random() < 0.5
        pairs = [(m.address, machine.address) if deaf else (machine.address, m.address) for m in others]
        heal = self.world.cut(pairs, f"{machine.name} {'hears' if deaf else 'is heard by'} nobody")
        self.lasts(self.length_s(0.5, 6.0), heal, [])
        return True

    def protocol(self, chosen: list[Machine]) -> bool:
        """UDP does not pass between some machines while TCP does, or the reverse."""
        kind = self.rng.choice(["udp", "tcp"])
        machine = self.rng.choice(self.world.machines)
        others = [m for m in self.world.machines if m is not machine]
        others = self.rng.sample(others, self.rng.randint(1, len(others)))
        pairs = [pair for m in others for pair in ((m.address, machine.address), (machine.address, m.address))]
        heal = self.world.cut(pairs, f"{kind} blocked {machine.name} - {','.join(m.name for m in others)}", kind)
        self.lasts(self.length_s(1.0, 8.0), heal, [])
        return True

    def loss(self, chosen: list[Machine]) -> bool:
        return self._worse("loss", lambda quality: setattr(quality, "loss", self.rng.choice([0.03, 0.1, 0.25])))

    def disorder(self, chosen: list[Machine]) -> bool:
        def worse(quality: Quality) -> None:
            quality.duplicate, quality.reorder, quality.reorder_s = 0.1, 0.2, 0.2

        return self._worse("disorder", worse)

    def delay(self, chosen: list[Machine]) -> bool:
        def worse(quality: Quality) -> None:
            quality.delay_s, quality.jitter_s = self.rng.choice([(0.02, 0.02), (0.1, 0.05), (0.0, 0.1)])
            quality.spread = self.rng.choice(list(SPREADS))

        return self._worse("delay", worse)

    def narrow(self, chosen: list[Machine]) -> bool:
        return self._worse("narrow", lambda quality: setattr(quality, "bytes_per_s", 200e3))

    def _worse(self, what: str, worse: Callable[[Quality], None]) -> bool:
        """All wires are worse for a while."""
        network = self.world.network
        before = network.quality
        network.quality = replace(before)
        worse(network.quality)
        self.world.trace.tell("wires get worse", how=what, quality=network.quality)

        def better() -> None:
            network.quality = Quality()
            self.world.trace.tell("wires are well", after=what)

        self.lasts(self.length_s(1.0, 6.0), better, [])
        return True

    def reset(self, chosen: list[Machine]) -> bool:
        """All connections of a machine are cut at once."""
        machines = self.some(chosen)
        for machine in machines:
            streams = [stream for stream in machine.host.streams if self.rng.random() < 0.7]
            self.world.trace.tell("connections reset", machine=machine.name, count=len(streams))
            for stream in streams:
                stream.cut()
            self.lasts(0.1, lambda: None, [machine])
        return bool(machines)

    def slow_reader(self, chosen: list[Machine]) -> bool:
        """A machine takes nothing from its connections for a while; what they carry piles up."""
        machines = self.some(chosen)
        for machine in machines:
            seconds = self.length_s(0.5, 5.0)
            self.world.trace.tell("reads nothing", machine=machine.name, seconds=round(seconds, 3))
            machine.host.read_nothing_until(self.world.scheduler.now + seconds)
            self.lasts(seconds, lambda: None, [machine])
        return bool(machines)

    # -- disks ----------------------------------------------------------------------------------------------------

    def disk_errors(self, chosen: list[Machine]) -> bool:
        machine = self.some(chosen, running=False)[0]
        doing = self.rng.choice([("sync",), ("write", "replace"), ("read",), ("open",)])
        for what in doing:
            machine.disk.refuse[what] = "Input/output error"
        self.world.trace.tell("disk refuses", machine=machine.name, doing=",".join(doing))

        def end() -> None:
            for what in doing:
                machine.disk.refuse.pop(what, None)
            self.world.trace.tell("disk works again", machine=machine.name)

        self.lasts(self.length_s(0.3, 4.0), end, [machine])
        return True

    def disk_full(self, chosen: list[Machine]) -> bool:
        machine = self.some(chosen, running=False)[0]
        before = machine.disk.capacity_bytes
        machine.disk.capacity_bytes = machine.disk.used + self.rng.choice([0, 20_000])
        self.world.trace.tell("disk is full", machine=machine.name)

        def end() -> None:
            machine.disk.capacity_bytes = max(before, 64 * GIB)
            self.world.trace.tell("disk has space", machine=machine.name)

        self.lasts(self.length_s(0.5, 5.0), end, [machine])
        return True

    def disk_slow(self, chosen: list[Machine]) -> bool:
        machine = self.some(chosen, running=False)[0]
        if self.rng.random() < 0.5:
            machine.disk.stalled_until = self.world.scheduler.now + self.length_s(0.5, 4.0)
            self.world.trace.tell("disk stalls", machine=machine.name, until=round(machine.disk.stalled_until, 3))
            self.lasts(4.0, lambda: None, [machine])
            return True
        machine.disk.speed.sync_s = self.length_s(0.05, 0.3)
        self.world.trace.tell("disk is slow", machine=machine.name, sync_s=round(machine.disk.speed.sync_s, 3))

        def end() -> None:
            machine.disk.speed.sync_s = 0.000_8

        self.lasts(self.length_s(1.0, 6.0), end, [machine])
        return True

    def rot(self, chosen: list[Machine]) -> bool:
        """A bit of a block flips on the worn machine: three good copies are left."""
        machine = self._worn()
        if machine is None:
            return False
        paths = [
            p
            for p in machine.disk.paths("blocks/") + machine.disk.paths("small/")
            if machine.disk.written_bytes(p) > 64
        ]
        if not paths:
            return False
        path = self.rng.choice(paths)
        machine.disk.rot(path, self.rng.randrange(machine.disk.written_bytes(path)))
        self.world.trace.tell("a bit flips", machine=machine.name, path=path)
        return True

    # -- what was written is lost: rule 3 ---------------------------------------------------------------------------

    def _worn(self) -> Machine | None:
        """The machine whose disk may lose what was synced; None while another is to take its place."""
        return next((m for m in self.world.machines if m.address == self._worn_address), None)

    def _take_image(self) -> None:
        machine = self._worn()
        if machine is not None:
            self._image = machine, machine.disk.image()

    def log_rot(self, chosen: list[Machine]) -> bool:
        """A bit of the worn machine's log, snapshot or state flips; sooner or later it starts and reads that."""
        machine = self._worn()
        if machine is None:
            return False
        paths = [path for path in machine.disk.paths("log/") if machine.disk.written_bytes(path) > 0]
        if not paths:
            return False
        path = self.rng.choice(paths)
        machine.disk.rot(path, self.rng.randrange(machine.disk.written_bytes(path)))
        self.checkers.forget_terms(machine)  # what its log promised may be gone
        self.world.trace.tell("a bit flips", machine=machine.name, path=path)
        if machine.running and self.rng.random() < 0.7:
            self.world.kill(machine.name)
            self._back_after(machine, self.length_s(0.5, 4.0))
        return True

    def old_image(self, chosen: list[Machine]) -> bool:
        """The worn machine's disk is replaced by what it held some time ago: a backup, or a virtual machine set back."""
        machine = self._worn()
        if machine is None:
            return False
        if self._image is None or self._image[0] is not machine:
            self._take_image()
            return False
        if machine.running:
            self.world.kill(machine.name)
        machine.disk.restore(self._image[1])
        self._image = None  # the next one is of what follows
        self.checkers.forget_terms(machine)
        self.world.trace.tell("disk replaced by an older image", machine=machine.name)
        self._back_after(machine, self.length_s(0.5, 4.0))
        return True


KINDS: Final[dict[str, Callable[[Faults, list[Machine]], bool]]] = {
    "kill": Faults.kill,
    "power": Faults.power,
    "power_all": Faults.power_all,
    "stop": Faults.stop,
    "freeze": Faults.freeze,
    "clock": Faults.clock,
    "drift": Faults.drift,
    "join": Faults.join,
    "partition": Faults.partition,
    "one_way": Faults.one_way,
    "protocol": Faults.protocol,
    "loss": Faults.loss,
    "disorder": Faults.disorder,
    "delay": Faults.delay,
    "narrow": Faults.narrow,
    "reset": Faults.reset,
    "slow_reader": Faults.slow_reader,
    "disk_errors": Faults.disk_errors,
    "disk_full": Faults.disk_full,
    "disk_slow": Faults.disk_slow,
    "rot": Faults.rot,
    "log_rot": Faults.log_rot,
    "old_image": Faults.old_image,
}
WEAR: Final = ("rot", "log_rot", "old_image")
"""What destroys something that was written and synced: rule 3."""
NODES_LEAST: Final = {"partition": 2, "one_way": 2, "protocol": 2, "rot": 2, "log_rot": 4, "old_image": 4}
"""What needs others: to be cut off from, or to hold the other copies of what is lost, and to go on without the machine."""

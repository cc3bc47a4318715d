# tests/simulation/world.py: a cluster of real nodes in one process, on one clock, from one seed.
#
# Rule 1: the same seed, arguments and commit give the same run, byte for byte: all chance is drawn from generators named
#         after the seed, all time is the scheduler's.
# Rule 2: a story is a coroutine on the world's own loop. It starts, kills, freezes and cuts machines, and asks through
#         clients. It never calls into a node: what must run inside a process goes through `inside`.
# Rule 3: a finding (a check that failed, an error that nobody caught) ends the world with AssertionError, which carries the
#         last lines of the story.
from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from idunno.base.errors import IdunnoError
from idunno.base.ids import Index, NodeId
from idunno.base.version import VERSION
from idunno.consensus.log import Log
from idunno.coordinator.commands import FORMAT, AddUser, Entry, Genesis, encode_entry
from idunno.coordinator.electorate import voters_of
from idunno.coordinator.messages import MemberAddress
from idunno.coordinator.records import MACHINE_VERSION, NodeRecord, TokenRecord, UserRecord
from idunno.node.identity import KnownPeers
from idunno.node.node import Node
from idunno.wire.calls import Actor, Role
from idunno.wire.security import fingerprint
from idunno.wire.tokens import make_token
from tests.simulation.disk import DiskView
from tests.simulation.logs import LogWatch
from tests.simulation.loop import Scheduler, SimLoop, State, new_loop
from tests.simulation.machine import (
    CLUSTER,
    CLUSTER_KEY,
    EPOCH_MS,
    PORT,
    SEGMENT_BYTES,
    TLS,
    Machine,
    certificate_of,
    refusal,
)
from tests.simulation.network import Host, Network
from tests.simulation.signatures import CA, CA_KEY, Signatures
from tests.simulation.trace import Trace

T = TypeVar("T")

ADMIN: Final = "alice"
_TOKEN: Final = "token-of-the-world"
STORY_LINES: Final = 40
"""Of the story, told with a failure."""


class _Secret:
    """The secret of the token that lets nodes into every world."""

    def token_bytes(self, nbytes: int, /) -> bytes:
        return bytes(range(nbytes))


class ProcessDied(Exception):
    """The machine's process ended while the story waited for something inside it."""


class World:
    def __init__(
        self, seed: int | str, nodes: int = 5, *, watch: bool = False, machine_version: int = MACHINE_VERSION
    ) -> None:
        self.machine_version = machine_version
        self.seed = f"{seed}"
        self.scheduler = Scheduler()
        self.trace = Trace(self.scheduler)
        self.trace.watch = watch
        self.rng = random.Random(f"{self.seed} world")
        self.network = Network(self.scheduler, random.Random(f"{self.seed} network"), self.trace)
        self.loop = new_loop(self.scheduler, "world")
        voters = voters_of(nodes)
        self.machines = [
            Machine(n, self.network, self.seed, self.trace, voter=n <= voters) for n in range(1, nodes + 1)
        ]
        self.by_id = {machine.id: machine for machine in self.machines}
        self.clients: list[Host] = []
        self.findings: list[str] = []
        self.node_token = ""
        """Lets a newcomer in."""
        self.on_made: list[Callable[[Machine, Node], None]] = []
        self.on_applied: list[Callable[[Machine, Node, Index, bytes], None]] = []
        self.on_died: list[Callable[[Machine, str], None]] = []
        self.on_log: list[Callable[[Machine, logging.LogRecord], None]] = []
        self._keep: set[asyncio.Task[Any]] = set()
        self._waiting: dict[Machine, dict[asyncio.Future[Any], None]] = {machine: {} for machine in self.machines}

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, story: Callable[[World], Coroutine[Any, Any, T]], *, limit_s: float = 600.0) -> T:
        """The whole life of this world: `story`, then the end. Raises what the story raises, and AssertionError."""
        logs = LogWatch(self)
        try:
            with logs, Signatures(self, TLS):
                result: T = self.loop.run_alone(self._live(story), limit_s)
        except (AssertionError, IdunnoError, TimeoutError, ProcessDied) as error:
            found = self.findings + self.scheduler.escaped
            what = "\n".join(found[:10]) if found else f"the story ended with {refusal(error)}"
            raise AssertionError(f"{what}\n{self.last_lines()}") from error
        finally:
            with logs:
                self._bury()
        return result

    async def _live(self, story: Callable[[World], Coroutine[Any, Any, T]]) -> T:
        await self._make_cluster()
        result = await story(self)
        self.check()
        return result

    def check(self) -> None:
        """Raises AssertionError for everything that was found so far."""
        found = self.findings + self.scheduler.escaped
        assert not found, "\n".join(found[:10])

    def found(self, what: str) -> None:
        """A check failed. The world ends at its next step."""
        self.trace.tell(f"FINDING  {what}")
        self.findings.append(f"{self.scheduler.now:.3f} s: {what}")
        self.scheduler.stop()

    def last_lines(self) -> str:
        lines = list(self.trace.story)[-STORY_LINES:]
        return "\n".join(["the end of the story:", *lines])

    def _bury(self) -> None:
        for machine in self.machines:
            if machine.running:
                machine.end(power_lost=False)
        for host in self.clients:
            if host.loop is not None:
                host.loop.kill()
                host.loop.bury()
        self.loop.kill()
        self.loop.bury()

    # -- making ---------------------------------------------------------------------------------------------------

    async def _make_cluster(self) -> None:
        """As idunno/node/lifecycle.py's make_cluster does, with disks and certificates of this world."""
        self.node_token, token_id, secret_hash = make_token(fingerprint(CA), _Secret())
        records = tuple(
            NodeRecord(
                node=machine.id,
                name=machine.name,
                address=machine.config.address,
                fingerprint=fingerprint(machine.certificate),
                voter=machine.voter,
                slots=machine.config.slots,
                software=VERSION,
                since_ms=EPOCH_MS,
            )
            for machine in self.machines
        )
        admins = TokenRecord(_TOKEN, "admin", bytes(32), EPOCH_MS * 2, "init")
        nodes = TokenRecord(token_id, "node", secret_hash, EPOCH_MS * 2, "init")
        genesis = Genesis(CLUSTER, records, CLUSTER_KEY, (admins, nodes), self.machine_version)
        payload = encode_entry(Entry(FORMAT, EPOCH_MS, "init", "node", "", genesis))
        peers = KnownPeers([MemberAddress(r.node, r.name, r.address, r.fingerprint, r.voter) for r in records])
        for machine in self.machines:
            machine.prepare(peers, CLUSTER_KEY, CA_KEY if machine.voter else None)
            disk = DiskView(machine.disk, serial=False)
            await Log.create(disk, payload if machine.voter else None, segment_bytes=SEGMENT_BYTES)

    def new_machine(self, address: str = "") -> Machine:
        """A machine that is no member yet; at `address`, or at one of its own."""
        number = max(machine.number for machine in self.by_id.values()) + 1
        machine = Machine(number, self.network, self.seed, self.trace, voter=False, address=address)
        self.by_id[machine.id] = machine
        self._waiting[machine] = {}
        return machine

    def machine(self, name: str) -> Machine:
        return next(machine for machine in self.machines if machine.name == name)

    # -- what happens to machines ---------------------------------------------------------------------------------

    def start(self, *names: str) -> None:
        """Power on; the node starts in the background. Without names: all that do not run."""
        for machine in self._named(names, running=False):
            loop = machine.begin()
            machine.ended = self.loop.create_future()
            self.trace.tell("starts", machine=machine.name, boot=machine.boot)
            loop.call_soon(self._begin_node, machine, loop)

    def _begin_node(self, machine: Machine, loop: SimLoop) -> None:
        loop.create_task(self._run_node(machine, loop))

    async def _run_node(self, machine: Machine, loop: SimLoop) -> None:
        """In the process: as node.run_node does, without signals."""
        try:
            node = machine.make_node(self._made)
            await node.start()
        except IdunnoError as error:
            self.loop.call_soon(self._exits, machine, loop, f"did not start: {refusal(error)}")
            return
        await node.failed.wait()
        await node.stop(hurry=True)
        if node.again:
            self.loop.call_soon(self._begins_again, machine, loop)
            return
        self.loop.call_soon(self._exits, machine, loop, f"cannot go on: {node.problem}")

    def _begins_again(self, machine: Machine, loop: SimLoop) -> None:
        """The node of a process gives way to another."""
        if machine.loop is loop:
            self.trace.tell("begins again", machine=machine.name)
            self._gone(machine, "begins again", power_lost=False)
            self.start(machine.name)

    def _exits(self, machine: Machine, loop: SimLoop, why: str) -> None:
        if machine.loop is loop:
            self.trace.tell("exits", machine=machine.name, why=why)
            self._gone(machine, why, power_lost=False)

    def kill(self, *names: str) -> None:
        """kill -9: what was written stays, connections are reset."""
        for machine in self._named(names, running=True):
            self.trace.tell("killed", machine=machine.name)
            self._gone(machine, "killed", power_lost=False)

    def end(self, name: str, why: str) -> None:
        """As kill; `why` is told to who hears of deaths."""
        (machine,) = self._named((name,), running=True)
        self._gone(machine, why, power_lost=False)

    def lose_power(self, *names: str) -> None:
        """What was not synced may be gone, and nobody is told."""
        for machine in self._named(names, running=True):
            self.trace.tell("loses power", machine=machine.name)
            self._gone(machine, "lost power", power_lost=True)

    def _gone(self, machine: Machine, how: str, *, power_lost: bool) -> None:
        machine.end(power_lost=power_lost)
        for callback in self.on_died:
            callback(machine, how)
        waiting, self._waiting[machine] = self._waiting[machine], {}
        for future in waiting:
            if not future.done():
                future.set_exception(ProcessDied(f"{machine.name}: {how}"))
        if machine.ended is not None and not machine.ended.done():
            machine.ended.set_result(None)

    def begin_stop(self, name: str) -> None:
        """An orderly stop, as with SIGTERM; `ended` of the machine tells when the process is gone."""
        machine = self.machine(name)
        node, loop = machine.node, machine.loop
        assert node is not None
        assert loop is not None
        self.trace.tell("is stopped", machine=name)

        async def stop() -> None:
            await node.stop()
            self.loop.call_soon(self._exits, machine, loop, "stopped")

        loop.call_soon(lambda: loop.create_task(stop()))

    async def stop(self, name: str) -> None:
        """begin_stop, and wait for the end, however it comes."""
        self.begin_stop(name)
        ended = self.machine(name).ended
        assert ended is not None
        await ended

    def freeze(self, *names: str) -> None:
        """kill -STOP: nothing runs, the kernel goes on receiving."""
        for machine in self._named(names, running=True):
            assert machine.loop is not None
            self.trace.tell("freezes", machine=machine.name)
            machine.loop.freeze()

    def thaw(self, *names: str) -> None:
        for machine in self._named(names, running=True):
            assert machine.loop is not None
            if machine.loop.state is State.FROZEN:
                self.trace.tell("thaws", machine=machine.name)
                machine.loop.thaw()

    def partition(self, *groups: list[str]) -> Callable[[], None]:
        """Machines of different groups hear nothing of each other; returns what heals it. Clients reach everybody."""
        pairs = [
            (self.machine(a).address, self.machine(b).address)
            for here in groups
            for there in groups
            if here is not there
            for a in here
            for b in there
        ]
        return self.cut(pairs, f"partition {' | '.join(','.join(group) for group in groups)}")

    def cut(self, pairs: list[tuple[str, str]], what: str, *kinds: str) -> Callable[[], None]:
        """Packets from the first address of a pair to the second do not arrive; returns what heals it."""
        self.trace.tell(what)
        for source, target in pairs:
            self.network.block(source, target, *kinds)

        def heal() -> None:
            self.trace.tell(f"healed: {what}")
            for source, target in pairs:
                self.network.unblock(source, target, *kinds)

        return heal

    def _named(self, names: tuple[str, ...], *, running: bool) -> list[Machine]:
        if names:
            found = [self.machine(name) for name in names]
            assert all(machine.running is running for machine in found), f"{names}: running is not {running}"
            return found
        return [machine for machine in self.machines if machine.running is running]

    # -- asking ---------------------------------------------------------------------------------------------------

    async def inside(self, name: str, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work()` in the machine's process. Raises what it raises, and ProcessDied."""
        machine = self.machine(name)
        loop = machine.loop
        if loop is None:
            raise ProcessDied(f"{name} does not run")
        answer: asyncio.Future[T] = self.loop.create_future()
        self._waiting[machine][answer] = None

        async def do() -> None:
            try:
                result = await work()
            except Exception as error:  # noqa: BLE001 - carried over to who waits
                self._tell(answer, error=error)
            else:
                self._tell(answer, result=result)

        loop.call_soon(lambda: loop.create_task(do()))
        try:
            return await answer
        finally:
            self._waiting[machine].pop(answer, None)

    def _tell(self, answer: asyncio.Future[Any], *, result: Any = None, error: Exception | None = None) -> None:
        def tell() -> None:
            if not answer.done():
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(result)

        self.loop.call_soon(tell)

    async def until(self, condition: Callable[[], object], what: str, within_s: float = 30.0) -> None:
        """Wait for something that can be looked at from outside. Raises AssertionError."""
        end = self.scheduler.now + within_s
        while not condition():
            assert self.scheduler.now < end, f"not within {within_s:g} s: {what}"
            await asyncio.sleep(0.05)

    def leader(self) -> Machine | None:
        """The serving machine whose node leads the highest term."""
        leaders = [m for m in self.machines if m.serving and m.node is not None and is_leader(m.node)]
        return max(leaders, key=lambda m: m.node.driver.term if m.node is not None else 0, default=None)

    async def has_leader(self, within_s: float = 30.0) -> Machine:
        await self.until(self.leader, "a leader", within_s)
        found = self.leader()
        assert found is not None
        return found

    def know_client(self, host: Host) -> None:
        self.clients.append(host)

    async def add_admin(self) -> None:
        """Make the user whose certificate the world's clients show."""
        user = UserRecord(ADMIN, "admin", fingerprint(certificate_of(ADMIN)))
        leader = await self.has_leader()
        node = leader.node
        assert node is not None

        async def propose() -> None:
            await node.coordinator.propose(AddUser(user, _TOKEN), actor=Actor(node.me, Role.NODE), timeout_s=10.0)

        await self.inside(leader.name, propose)
        nodes = [m.node for m in self.machines if m.serving and m.node is not None]
        await self.until(lambda: all(n.machine.roster.user(ADMIN) is not None for n in nodes), "the user is known")

    # -- what machines tell ---------------------------------------------------------------------------------------

    def _made(self, machine: Machine, node: Node) -> None:
        if self.on_applied:
            apply = node.driver._applying.apply

            def watched(index: Index, payload: bytes) -> Any:
                result = apply(index, payload)
                for heard in self.on_applied:
                    heard(machine, node, index, payload)
                return result

            node.driver._applying.apply = watched
        for callback in self.on_made:
            callback(machine, node)

    def name(self, node: NodeId | None) -> str:
        return self.by_id[node].name if node in self.by_id else str(node)


def is_leader(node: Node) -> bool:
    return hasattr(node, "driver") and node.driver.is_leader


__all__ = ["PORT", "ProcessDied", "World", "is_leader"]

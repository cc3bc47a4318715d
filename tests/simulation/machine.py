# tests/simulation/machine.py: one machine of the world: its disk, its clock, its network card, and the node that runs on it.
#
# Rule 1: what runs is the product's Node, unchanged, on a Platform made here. Each start has a loop, a boot number and chance
#         of its own; the disk and the address stay.
# Rule 2: what a checker wants to hear it is told through the node's own callbacks, in the node's own order.
from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec

from idunno.base.errors import Corrupt, IdunnoError
from idunno.base.ids import Index, NodeId
from idunno.grep.messages import NodeResult
from idunno.node.config import NodeConfig
from idunno.node.identity import PEERS_FILE, Identity, KnownPeers, Secrets
from idunno.node.node import Node
from idunno.node.platform import Platform
from idunno.worker.runner import Runner
from tests.simulation.disk import DiskView, SimDisk
from tests.simulation.loop import SimLoop, State, new_loop
from tests.simulation.models import Cost, SimRunner
from tests.simulation.network import Host, Network

if TYPE_CHECKING:
    from tests.simulation.trace import Trace

T = TypeVar("T")

PORT: Final = 7400
EPOCH_MS: Final = 1_700_000_000_000
"""When every world begins."""
DISK_BYTES: Final = 64 * 1024**3
TLS: Final = cast(Any, object())
"""Stands for a TLS context: connections get certificates (network.py), and no cipher."""
CLUSTER: Final = "5".ljust(32, "0")
CLUSTER_KEY: Final = bytes(range(32))
BOOT_FILE: Final = "boot"
SEGMENT_BYTES: Final = 64 * 1024
SNAPSHOT_ENTRIES: Final = 25
"""So few that every world takes snapshots, and who was away for a second needs one."""


def node_id(number: int) -> NodeId:
    return NodeId(hashlib.blake2b(b"node %d" % number, digest_size=8).hexdigest())


def certificate_of(name: str) -> bytes:
    """Not X.509: TLS is what is left out, and nobody else looks into a certificate."""
    return b"certificate of " + name.encode()


class WatchedNode(Node):
    """The product's node, whose parts a machine's watchers may look at once they are made."""

    made: Callable[[Node], None]

    def _make(self) -> None:
        super()._make()
        # The log's files are small here, so that a world of seconds begins many of them, and reads little when it starts.
        self.driver.config = replace(self.driver.config, segment_bytes=SEGMENT_BYTES)
        self.made(self)


class Machine:
    def __init__(self, number: int, network: Network, seed: str, trace: Trace, voter: bool) -> None:
        self.number, self.name, self.id, self.voter = number, f"n{number}", node_id(number), voter
        self.address = f"10.0.0.{number}"
        self.certificate = certificate_of(self.name)
        self.host = Host(network, self.address, self.certificate)
        self.disk = SimDisk(random.Random(f"{seed} disk {number}"), trace, self.name)
        self.disk.capacity_bytes = DISK_BYTES
        self.config = NodeConfig(name=self.name, listen=f"{self.address}:{PORT}", snapshot_entries=SNAPSHOT_ENTRIES)
        self.cost, self.counts = Cost(), Counter[str]()
        self.skew_ms = 0
        self.boot = 0
        self.up_since = 0.0
        self.node: Node | None = None
        self.loop: SimLoop | None = None
        self.ended: asyncio.Future[None] | None = None
        """Of the world's loop: set when the process is gone."""
        self._seed, self._trace = seed, trace

    @property
    def running(self) -> bool:
        """Whether there is a process; it may be frozen."""
        return self.loop is not None

    @property
    def serving(self) -> bool:
        return self.loop is not None and self.loop.state is State.RUNNING and self.node is not None

    # -- the world as the node has it -----------------------------------------------------------------------------

    def begin(self) -> SimLoop:
        """A process starts: its loop, and the node in it, not yet started."""
        assert self.loop is None, f"{self.name} runs already"
        self.boot = int(self.disk.content(BOOT_FILE) or b"0") + 1
        self.disk.put(BOOT_FILE, b"%d" % self.boot)
        self.loop = new_loop(self.host.network.scheduler, f"{self.name}.{self.boot}", self.host)
        self.host.loop, self.host.up = self.loop, True
        self.up_since = self.host.network.scheduler.now
        return self.loop

    def make_node(self, made: Callable[[Machine, Node], None]) -> Node:
        """Called in the process's own loop."""
        node = WatchedNode(self.config, self._platform())
        node.made = lambda node: made(self, node)
        self.node = node
        return node

    def end(self, *, power_lost: bool) -> None:
        """The process is gone, from one instant to the next."""
        assert self.loop is not None, f"{self.name} does not run"
        loop, self.loop, self.node = self.loop, None, None
        loop.kill()
        self.host.loop = None
        self.host.process_ends(power_lost=power_lost)
        if power_lost:
            self.disk.lose_power()
        loop.bury()

    def _platform(self) -> Platform:
        loop = self.loop
        assert loop is not None
        rng = random.Random(f"{self._seed} node {self.number} boot {self.boot}")
        disk = DiskView(self.disk, serial=False)
        secrets = Secrets(b"certificate of the CA", self.certificate, b"", CLUSTER_KEY, None)
        try:
            peers = msgspec.json.decode(self.disk.content(PEERS_FILE), type=KnownPeers)
        except msgspec.MsgspecError as error:
            raise Corrupt(f"{PEERS_FILE} is damaged ({error})") from None
        return Platform(
            identity=Identity(1, CLUSTER, self.id),
            boot=self.boot,
            boot_salt=rng.randbytes(16),
            secrets=secrets,
            remembered=peers,
            log_disk=DiskView(self.disk, serial=True),
            disk=disk,
            offload=_offload,
            now_ms=lambda: EPOCH_MS + int(loop.scheduler.now * 1000) + self.skew_ms,
            rng=rng,
            spawn_runner=self._spawn_runner,
            spawn_search=_spawn_search,
            server_tls=TLS,
            client_tls=TLS,
            socket_path=None,
            cores=2,
            close=lambda: None,
        )

    async def _spawn_runner(self) -> Runner:
        await asyncio.sleep(self.cost.start_s)
        rng = random.Random(f"{self._seed} runner {self.number} {self.host.network.scheduler.next_serial()}")
        return SimRunner(f"/{self.name}/", DiskView(self.disk, serial=False), self.cost, rng, self.counts)


async def _offload(work: Callable[[], T], /) -> T:
    await asyncio.sleep(0.000_02)  # a thread takes it up
    return work()


class _Search:
    """grep.process.Child: a machine's logs hold nothing, for nobody writes them here."""

    def __init__(self) -> None:
        self._said = False

    async def give(self, order: bytes) -> None:
        return

    async def read(self) -> bytes:
        if self._said:
            return b""
        self._said = True
        await asyncio.sleep(0.05)
        return msgspec.msgpack.encode(["done", NodeResult(count=0, seconds=0.05, truncated=False)])

    async def end(self) -> int:
        return 0


async def _spawn_search() -> _Search:
    return _Search()


class Watch:
    """What of one node's life the checkers follow; a base of theirs."""

    def made(self, machine: Machine, node: Node) -> None:
        """Its parts are made, not started."""

    def applied(self, machine: Machine, node: Node, index: Index, payload: bytes) -> None:
        """The entry has just been applied."""

    def died(self, machine: Machine, how: str) -> None: ...


def refusal(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, IdunnoError) else repr(error)

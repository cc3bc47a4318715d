# tests/simulation/machine.py: one machine of the world: its disk, its clock, its network card, and the node that runs on it.
#
# Rule 1: what runs is the product's Node, unchanged, on a Platform made here. Each start has a loop, a boot number and chance
#         of its own; the disk and the address stay.
# Rule 2: what a checker wants to hear it is told through the node's own callbacks, in the node's own order.
from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec

from idunno.base.errors import Corrupt, IdunnoError
from idunno.base.ids import Index, NodeId
from idunno.coordinator.records import MACHINE_VERSION
from idunno.grep.engine import Search
from idunno.grep.messages import LineBatch, NodeResult, Order
from idunno.node.config import NodeConfig
from idunno.node.identity import PEERS_FILE, Identity, KnownPeers, Secrets, encode_peers
from idunno.node.node import Node
from idunno.node.platform import Platform
from idunno.worker.runner import Runner
from tests.simulation.disk import DiskView, SimDisk
from tests.simulation.loop import SimLoop, State, new_loop
from tests.simulation.models import Cost, SimRunner
from tests.simulation.network import Host, Network
from tests.simulation.signatures import CA

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
SEARCH_S: Final = 0.05
"""How long a child process needs to start and to read a small log."""
SNAPSHOT_ENTRIES: Final = 25
SMALL_SEGMENT_BYTES: Final = 8_000
"""So few that every world takes snapshots, and who was away for a second needs one."""


def node_id(number: int) -> NodeId:
    return NodeId(hashlib.blake2b(b"node %d" % number, digest_size=8).hexdigest())


def certificate_of(name: str) -> bytes:
    """Not X.509: TLS is what is left out, and nobody else looks into a certificate."""
    return b"certificate of " + name.encode()


class WatchedNode(Node):
    """The product's node, whose parts a machine's watchers may look at once they are made."""

    made: Callable[[Node], None]
    supports: int

    def _make(self) -> None:
        super()._make()
        # The log's files are small here, so that a world of seconds begins many of them, and reads little when it starts.
        self.driver.config = replace(self.driver.config, segment_bytes=SEGMENT_BYTES)
        # And so are the small store's, all of which are written anew with each snapshot, whatever is still referred to.
        self.small.segment_bytes, self.small.live_share_max = SMALL_SEGMENT_BYTES, 1.0
        self.machine.supports = self.supports
        self.made(self)


class Machine:
    def __init__(self, number: int, network: Network, seed: str, trace: Trace, voter: bool, address: str = "") -> None:
        self.number, self.name, self.id, self.voter = number, f"n{number}", node_id(number), voter
        self.address = address or f"10.0.0.{number}"
        self.certificate = certificate_of(self.name)
        self.host = Host(network, self.address, self.certificate)
        self.disk = SimDisk(random.Random(f"{seed} disk {number}"), trace, self.name)
        self.disk.capacity_bytes = DISK_BYTES
        self.config = NodeConfig(name=self.name, listen=f"{self.address}:{PORT}", snapshot_entries=SNAPSHOT_ENTRIES)
        self.cost, self.counts = Cost(), Counter[str]()
        self.supports = MACHINE_VERSION
        """The newest machine version that the release installed here knows; it counts from the next start."""
        self.skew_ms, self.rate = 0, 1.0
        self.given_up = ""
        """Why this machine will not run again: what its user was told. Another takes its place (admin.py)."""
        self.seed: str | None = None
        """What `idunno node run --seed` is given."""
        self.log = bytearray()
        """What its node logged, newest at the end, as in logs/node.jsonl."""
        self.boot = self.starts = 0
        """Its boot number, as its disk has it; how often it was really started."""
        self.up_since = 0.0
        self.node: Node | None = None
        self.loop: SimLoop | None = None
        self.ended: asyncio.Future[None] | None = None
        """Of the world's loop: set when the process is gone."""
        self._seed, self._trace = seed, trace
        self._wall_since = 0.0

    @property
    def running(self) -> bool:
        """Whether there is a process; it may be frozen."""
        return self.loop is not None

    @property
    def serving(self) -> bool:
        return self.loop is not None and self.loop.state is State.RUNNING and self.node is not None

    def moves(self, address: str) -> None:
        """Its next start is at another address."""
        assert self.loop is None, f"{self.name} runs"
        self.address = address
        self.host = Host(self.host.network, address, self.certificate)
        self.config = replace(self.config, listen=f"{address}:{PORT}")

    def drift(self, rate: float) -> None:
        """Its clocks, the wall clock and the one of timers, make `rate` seconds of one from now on."""
        self.skew_ms, self._wall_since = self._wall_ms() - self._true_ms(), self.host.network.scheduler.now
        self.rate = rate
        if self.loop is not None:
            self.loop.drift(rate)

    def _true_ms(self) -> int:
        return EPOCH_MS + int(self.host.network.scheduler.now * 1000)

    def _wall_ms(self) -> int:
        gained_s = (self.host.network.scheduler.now - self._wall_since) * (self.rate - 1.0)
        return self._true_ms() + int(gained_s * 1000) + self.skew_ms

    def prepare(self, peers: KnownPeers, cluster_key: bytes, ca_key: bytes | None) -> None:
        """As make_directory does."""
        for name in ("logs", "log", "blocks", "small", "cache", "models", "tmp"):
            self.disk.directories[name] = None
        self.disk.put(PEERS_FILE, encode_peers(peers))
        self.disk.put(BOOT_FILE, b"0")
        self.disk.put("cluster.key", cluster_key.hex().encode())
        if ca_key is not None:
            self.disk.put("ca.key", ca_key)

    # -- the world as the node has it -----------------------------------------------------------------------------

    def begin(self) -> SimLoop:
        """A process starts: its loop, and the node in it, not yet started."""
        assert self.loop is None, f"{self.name} runs already"
        self.starts += 1
        self.boot = int(self.disk.content(BOOT_FILE) or b"0") + 1
        self.disk.put(BOOT_FILE, b"%d" % self.boot)
        self.loop = new_loop(self.host.network.scheduler, f"{self.name}.{self.boot}", self.host)
        if self.rate != 1.0:
            self.loop.drift(self.rate)
        self.host.loop, self.host.up = self.loop, True
        self.up_since = self.host.network.scheduler.now
        return self.loop

    def make_node(self, made: Callable[[Machine, Node], None]) -> Node:
        """Called in the process's own loop."""
        node = WatchedNode(self.config, self._platform(), self.seed)
        node.made, node.supports = lambda node: made(self, node), self.supports
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
        rng = random.Random(f"{self._seed} node {self.number} boot {self.starts}")  # a set-back disk repeats its boot
        disk = DiskView(self.disk, serial=False)
        cluster_key = bytes.fromhex(self.disk.content("cluster.key").decode())
        ca_key = self.disk.content("ca.key") if "ca.key" in self.disk.names else None
        secrets = Secrets(CA, self.certificate, b"", cluster_key, ca_key)
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
            now_ms=self._wall_ms,
            rng=rng,
            random_bytes=rng.randbytes,
            spawn_runner=self._spawn_runner,
            spawn_search=self._spawn_search,
            server_tls=TLS,
            client_tls=TLS,
            socket_path=None,
            cores=2,
            close=lambda: None,
        )

    async def _spawn_search(self) -> _Search:
        return _Search(self.log)

    async def _spawn_runner(self) -> Runner:
        await asyncio.sleep(self.cost.start_s)
        rng = random.Random(f"{self._seed} runner {self.number} {self.host.network.scheduler.next_serial()}")
        return SimRunner(f"/{self.name}/", DiskView(self.disk, serial=False), self.cost, rng, self.counts)


async def _offload(work: Callable[[], T], /) -> T:
    await asyncio.sleep(0.000_02)  # a thread takes it up
    return work()


class _Search:
    """grep.process.Child: the shipped engine, over what the machine's node logged, in the time that a child would need."""

    def __init__(self, log: bytearray) -> None:
        self._log, self._answers = log, deque[bytes]()

    async def give(self, order: bytes) -> None:
        encode, asked = msgspec.msgpack.encode, msgspec.msgpack.decode(order, type=Order)
        search = Search(asked.query, asked.node)
        try:
            for batch in search.file("node.jsonl", [bytes(self._log)]):
                self._answers.append(encode(("lines", encode(LineBatch(batch)))))
        except IdunnoError as error:
            self._answers.append(encode(("error", error.code, str(error))))
            return
        found = search.found
        self._answers.append(encode(("done", NodeResult(found.count, SEARCH_S, found.truncated, found.lines_skipped))))

    async def read(self) -> bytes:
        await asyncio.sleep(SEARCH_S)
        return self._answers.popleft() if self._answers else b""

    async def end(self) -> int:
        return 0


class Watch:
    """What of one node's life the checkers follow; a base of theirs."""

    def made(self, machine: Machine, node: Node) -> None:
        """Its parts are made, not started."""

    def applied(self, machine: Machine, node: Node, index: Index, payload: bytes) -> None:
        """The entry has just been applied."""

    def died(self, machine: Machine, how: str) -> None: ...


def refusal(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, IdunnoError) else repr(error)

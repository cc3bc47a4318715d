# idunno/node/node.py: the composition root: makes every part of a node, hands each what it needs, starts and stops them.
#
# Rule 1: parts do not know each other; who hears what of whom is decided here and nowhere else.
# Rule 2: start from the bottom up, stop from the top down; what was started is stopped, however far the start came.
# Rule 3: an applied command's effects are handed on in one fixed order (docs/node.md).
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from idunno.base.disk import Buffer
from idunno.base.errors import (
    Conflict,
    IdunnoError,
    Incompatible,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from idunno.base.ids import Index, NodeId, Term
from idunno.base.version import VERSION
from idunno.consensus.config import RaftConfig
from idunno.consensus.driver import RaftDriver
from idunno.consensus.standing import Run
from idunno.consensus.vouching import Vouching
from idunno.coordinator.applier import Applier
from idunno.coordinator.client import Coordinator
from idunno.coordinator.commands import UpdateNode
from idunno.coordinator.departure import Departures
from idunno.coordinator.digests import Digests
from idunno.coordinator.effects import (
    BlocksFreed,
    DigestDue,
    DigestTold,
    Effect,
    JobChanged,
    JobsReplaced,
    KeepSmall,
    ModelChanged,
    RetentionChanged,
    RosterChanged,
    TaskCompleted,
    VersionMade,
)
from idunno.coordinator.elector import Elector
from idunno.coordinator.keeper import Keeper
from idunno.coordinator.machine import Machine
from idunno.coordinator.messages import LEFT
from idunno.coordinator.service import CoordinatorService
from idunno.coordinator.upgrade import Upgrades
from idunno.grep.service import GrepService
from idunno.membership import service as membership_service
from idunno.membership.config import SwimConfig
from idunno.membership.events import Changed, Self
from idunno.membership.messages import State
from idunno.membership.transport import Membership
from idunno.node.backups import Backups
from idunno.node.config import NodeConfig, parse_address
from idunno.node.dumping import Dumping
from idunno.node.keys import Keys
from idunno.node.known import Known
from idunno.node.lateness import Lateness
from idunno.node.lineage import Lineage
from idunno.node.outcast import Outcast
from idunno.node.platform import Platform
from idunno.node.reach import Reach
from idunno.node.seat import Seat
from idunno.node.seed import ask_seed, ask_until_answered, meet_newcomers
from idunno.node.vacant import Vacant
from idunno.scheduler.config import SchedulerConfig
from idunno.scheduler.service import SchedulerService
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.client import FileClient
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.datanode import DataNode
from idunno.sdfs.service import FileService
from idunno.sdfs.small import SmallStore
from idunno.sdfs.small_copies import SmallCopies
from idunno.wire.calls import A, Actor, Call, Caller, Empty, Lane, Method, Peer, Q, Role
from idunno.wire.local import LocalCaller
from idunno.wire.peers import PeerPool
from idunno.wire.sealed import Opener, Sealer
from idunno.wire.server import Server
from idunno.worker.agent import Agent, WorkerConfig

log = logging.getLogger("idunno.node")

TASKS_GRACE_S: Final = 3.0
"""What runs may end for so long when the node stops; the rest is given back. Part of the 10 s that a stop may take."""
STEP_S: Final = 2.5
"""How long any one step of a stop may take: what takes long (a hand-over, an announcement) is bounded by about 1 s by itself."""
STOP_S: Final = 9.0
"""How long a stop may take altogether: 10 s are promised (commands.md)."""
INTRODUCE_S: Final = 10.0
LAST_WORD_S: Final = 3.0
"""Connections to a node that left are cut after this: it is told that it is out."""
KEEP_CONNECTED_S: Final = 0.5
"""Between looks at the connections to the voters; each waits longer for those that cannot be reached (peers.py)."""
REFUSALS: Final = (Conflict, Incompatible, InvalidArgument, NotFound, PermissionDenied)
"""What the roster may answer to a node that it will never take as it is; anything else passes."""


class Node:
    """One node in the world that `platform` is. `start`, then `stop`."""

    def __init__(self, config: NodeConfig, platform: Platform, seed: str | None = None) -> None:
        self.config, self.platform, self._seed = config, platform, seed
        self.me, self.boot = platform.identity.node, platform.boot
        self.disk = platform.disk
        self._tasks: dict[asyncio.Task[None], None] = {}  # no set: they end in the order in which they began
        self._members: set[NodeId] = set()
        self._led: NodeId | None = None  # who led last, as far as this node heard
        self._stops: list[tuple[str, Callable[[], Awaitable[None]]]] = []
        self.problem = ""
        """Why this node cannot go on, "" while it can."""
        self.failed = asyncio.Event()
        self.again = False
        """Once `failed`: another process of this node is to begin in this one's place."""
        self._stop_by_s = 0.0
        self._late = False
        self.lateness = Lateness()

    # -- making ---------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        config, me, platform, rng = self.config, self.me, self.platform, self.platform.rng
        held, remembered = platform.secrets, platform.remembered
        self.machine = Machine()
        self.known = Known(lambda: self.machine.roster, remembered, self.disk)
        self.server = Server(self.known.identify, name=config.name)
        self.local: Caller = LocalCaller(self.server, Peer(Actor(me, Role.NODE), node=me, local=True))
        self.peers = PeerPool(self.known.endpoint, lambda: platform.client_tls, me=me, local=self.local)

        self.outcast = Outcast(self)
        self.applier = applier = Applier(self.machine)
        self.small = SmallStore(self.disk, self.platform.offload)
        self.small_copies = SmallCopies(me, self.small, self.peers, self.server)
        self.driver = RaftDriver(
            me,
            platform.log_disk,
            send=lambda to, message: self.vouching.send(to, message),
            apply=applier,
            config=RaftConfig(snapshot_entries=config.snapshot_entries, keep_entries=config.snapshot_entries // 5),
            rng=rng,
            voters=[member.node for member in remembered.members if member.voter],
            members=[member.node for member in remembered.members],
            copies_needed=min(4, max(1, len(remembered.members))),
            machine=Keeper(applier, self.small, self.small_copies.fetch, platform.offload, lasting=platform.lasting),
            proved=False,
        )
        self.vouching = Vouching(
            me,
            self.driver,
            self.peers,
            self.server,
            self.disk,
            run=Run(self.boot, int.from_bytes(platform.boot_salt[:4], "big")),
            cluster=platform.identity.cluster,
            members=lambda: [member.node for member in self.known.members()],
            boot_seen=self.outcast.boot_seen,
            name=self.known.name,
            begin_again=self.outcast.begin_again,
            is_copy=self.outcast.is_copy,
        )
        over_tcp = membership_service.OverTcp(self.peers)
        sealer = Sealer([held.cluster_key], me, self.boot, platform.boot_salt)
        opener = Opener([held.cluster_key])
        self.keys = Keys(held, sealer, opener, self.disk, self.server)
        self.membership = Membership(
            Self(me, config.name, config.address, self.boot),
            SwimConfig(),
            rng,
            sealer.seal,
            opener.open,
            self.known.is_member,
            platform.now_ms,
            tcp_probe=over_tcp.probe,
            exchange=over_tcp.exchange,
        )
        membership_service.register(self.server, self.membership)
        self.coordinator = Coordinator(self.driver, self.machine, self.peers, me, platform.now_ms)
        coordination = CoordinatorService(
            self.coordinator,
            self.server,
            ca_pem=held.ca_pem,
            ca_key_pem=lambda: self.keys.ca_key_pem,
            succeeds=platform.succeeds,
        )
        self.elector = Elector(
            self.coordinator,
            self.driver,
            self.peers,
            ca_key_pem=lambda: self.keys.ca_key_pem,
            new_key=lambda: platform.random_bytes(32),
            silent_s=float(config.voter_silent_s),
        )
        self.digests = Digests(self.coordinator, self.driver, self.peers, self.server, differs=self.outcast.differs)
        self.upgrades = Upgrades(self.coordinator, self.peers, self.server, problem=lambda: self.driver.problem or "")
        self.departures = Departures(self.coordinator, self.elector, self.peers, self.server)
        Reach(self.server, coordination.check_token)
        self._make_files()
        self.vacant = Vacant(self.membership.view, lambda: asyncio.get_running_loop().time())
        self.scheduler = SchedulerService(
            self.coordinator,
            self.server,
            me,
            self.vacant.view,
            SchedulerConfig(scheduler_works=config.scheduler_works),
        )
        self.agent = Agent(
            me,
            self.boot,
            self._call_scheduler,
            FileClient(lambda: self.local, offload=platform.offload, rng=rng),
            self.disk,
            platform.spawn_runner,
            rng=rng,
            config=WorkerConfig(
                slots=config.slots,
                threads=config.threads or max(1, platform.cores // config.slots),
                cache_bytes=config.cache_bytes,
                task_limit_s=float(config.task_limit_s),
                warm_runner=config.warm_runner,
            ),
        )
        GrepService(self.server, self.peers, self.membership.view, me, self.disk, spawn=platform.spawn_search)
        self.seat = Seat(self)
        self.lineage = Lineage(self)
        self.backups = Backups(self)
        self.dumping = Dumping(self)
        self.server.register(LEFT, self._told_of_leaving)
        self._connect(applier)

    def _make_files(self) -> None:
        sdfs = SdfsConfig(
            floor_bytes=self.config.disk_reserve_bytes,
            repair_link_percent=self.config.repair_link_percent,
            scrub_bytes_per_s=self.config.scrub_bytes_per_s,
            stopped_wait_ms=self.config.stopped_wait_s * 1_000,
        )
        self.blocks = BlockStore(self.disk, sdfs)
        self.files = FileService(
            self.me, self.coordinator, self.blocks, self.small, self.peers, config=sdfs, rng=self.platform.rng
        )
        self.datanode = DataNode(
            self.me,
            self.blocks,
            self.small,
            self.peers,
            config=sdfs,
            may_write=self.files.may_write,
            may_read=self.files.may_read,
            locate=self.files.locate,
            report=self.files.report,
            heard=self.files.witness.heard,
            must_show=self.files.must_show,
        )
        self.files.register(self.server)
        self.datanode.register(self.server)

    def _connect(self, applier: Applier) -> None:
        """Who hears what of whom."""
        self.departures.drained = self.files.leading.drain
        applier.subscribe(self._applied, KeepSmall, RosterChanged)
        applier.subscribe(self.files.follow, VersionMade, BlocksFreed, RosterChanged, RetentionChanged)
        applier.subscribe(self.scheduler.follow, TaskCompleted, JobChanged, JobsReplaced, ModelChanged, RosterChanged)
        applier.subscribe(self.digests.follow, DigestDue, DigestTold)
        self.driver.on_role.append(self._role_changed)
        self.driver.on_leader.append(self._leader_changed)
        self.peers.lost(self._peer_lost)
        self.peers.refused.append(self.lineage.refused)
        self.peers.vacant.append(self._vacated)
        self.peers.connected.append(self.vacant.connected)
        self.membership.subscribe(self._member_changed)

    # -- starting and stopping ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises IdunnoError; what was started by then is stopped again."""
        self._make()
        self._on_stop("threads", self._close_threads)
        try:
            await self._start_parts()
        except BaseException:
            await self.stop(hurry=True)
            raise

    async def _start_parts(self) -> None:
        host, port = parse_address(self.config.listen)
        await self.small.open()
        self._on_stop("small blocks", self.small.close)
        await self.blocks.open()
        if self._seed is not None:
            answered = await ask_seed(self._seed, self.platform.client_tls, self.known)
            if not answered:
                asking = ask_until_answered(self._seed, self.platform.client_tls, self.known, self._seed_members)
                self.spawn(asking, "seed")
        await self.server.listen_tcp(host, port, self.platform.server_tls)
        self._on_stop("server", lambda: self.server.close(grace_s=0.5))
        self._on_stop("peers", self.peers.close)
        self._seed_members()
        await self.membership.start(host, port)
        self._on_stop("membership", self.membership.stop)
        self.scheduler.start()
        self._on_stop("scheduler", self.scheduler.stop)
        await self.outcast.check()
        self._on_stop("quarantine", self.outcast.stop)
        await self.driver.start()
        self._on_stop("log", lambda: self.driver.stop(transfer=False))
        await self.vouching.start()
        self._on_stop("vouching", self.vouching.stop)
        self._on_stop("coordinator", self.coordinator.close)
        self._on_stop("keys", self.keys.close)
        self._on_stop("elector", self.elector.stop)
        self._on_stop("digests", self.digests.stop)
        self._on_stop("remembered roster", self.known.close)
        self.datanode.start()
        self._on_stop("blocks", self.datanode.stop)
        self.files.start()
        self._on_stop("files", self.files.stop)
        await self.agent.start()
        self.spawn(self._introduce(), "introduce")
        meeting = meet_newcomers(
            self.me,
            self.peers,
            self.known,
            has_leader=lambda: self.driver.leader is not None,
            follows=self._follows,
            learned=self._seed_members,
            caught_up=self._caught_up,
        )
        self.spawn(meeting, "meet")
        self.spawn(self._keep_connected(), "keep connected")
        self._on_stop("tasks", self._cancel_tasks)
        # The socket comes last: who can connect to it finds a node that works.
        if self.platform.socket_path is not None:
            await self.server.listen_unix(self.platform.socket_path)
        log.info(
            "node started",
            extra={"node_id": self.me, "boot": self.boot, "address": self.config.address, "version": VERSION},
        )

    def _on_stop(self, what: str, stop: Callable[[], Awaitable[None]]) -> None:
        self._stops.append((what, stop))

    async def stop(self, *, hurry: bool = False) -> bool:
        """Finish or give back tasks, hand over leadership, announce `stopped`, close everything. At most STOP_S.

        Returns whether every step ended; if not, a thread may still wait for a disk that does not answer.
        """
        self._stop_by_s = asyncio.get_running_loop().time() + STOP_S
        if not hurry:
            await self._bounded("agent", self.agent.stop(TASKS_GRACE_S), TASKS_GRACE_S + STEP_S)
            await self._bounded("hand-over", self.driver.stop(transfer=True), STEP_S)
            await self._bounded("announcement", self.membership.announce_stopped(), STEP_S)
            log.info("node stopped", extra={"node_id": self.me, "boot": self.boot})
        elif hasattr(self, "agent"):
            await self._bounded("agent", self.agent.stop(0.0), STEP_S)
        while self._stops:
            what, stop = self._stops.pop()
            await self._bounded(what, stop(), STEP_S)
        return not self._late

    @property
    def is_late(self) -> bool:
        """A step of its stop took too long: a thread may still wait for a disk that does not answer."""
        return self._late

    async def _bounded(self, what: str, work: Awaitable[None], seconds: float) -> None:
        """One step of a stop: neither its failure nor its slowness keeps the others from theirs."""
        left_s = self._stop_by_s - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(seconds, max(0.05, left_s))):
                await work
        except TimeoutError:
            self._late = True
            log.warning("step of stop took too long", extra={"step": what, "seconds": seconds})
        except Exception:
            log.exception("step of stop failed", extra={"step": what})

    async def _close_threads(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.platform.close)

    async def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Any, name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", exc_info=error, extra={"task": task.get_name()})

    # -- what is heard --------------------------------------------------------------------------------------------

    def _applied(self, index: Index, effect: Effect) -> None:
        if isinstance(effect, KeepSmall):
            self.small.keep(effect.block, effect.content)
        elif isinstance(effect, RosterChanged):
            self._roster_changed()

    def _roster_changed(self) -> None:
        roster = self.machine.roster
        mine = self.platform.identity.cluster
        if roster.cluster != mine:
            text = f"this directory is of cluster {mine[:8]}, but its log is of {roster.cluster[:8]}"
            self.fail(Incompatible(f"{text}: restore files that belong together"))
            return
        members = {record.node for record in roster.nodes()}
        self.driver.set_members(members, roster.acknowledge_copies())
        self._forget(self._members - members)
        self._members = members
        self.keys.follow(roster)
        self._seed_members()
        self.server.recheck()
        self.known.remember()

    def _forget(self, gone: set[NodeId]) -> None:
        for node in gone:
            self.membership.forget(node)
            self.known.forget(node)
            asyncio.get_running_loop().call_later(LAST_WORD_S, self.peers.drop, node)

    def _caught_up(self) -> None:
        """The roster alone counts from now on: who was removed while this node was away was never in a roster of its own."""
        self.known.caught_up()
        self._forget({view.node for view in self.membership.view() if not self.known.is_member(view.node)} - {self.me})
        self.known.remember()

    def _follows(self) -> bool:
        leader = self.driver.leader
        in_roster = leader is not None and self.machine.roster.find(leader) is not None
        return in_roster and self.driver.applied_index >= self.driver.commit

    def _role_changed(self, is_leader: bool, term: Term) -> None:
        log.info(
            "leader elected" if is_leader else "leadership ended", extra={"leader": self.config.name, "term": term}
        )
        self.elector.role_changed(is_leader, term)
        self.digests.role_changed(is_leader, term)
        self.files.role_changed(is_leader, term)
        self.scheduler.role_changed(is_leader, term)

    def _leader_changed(self, leader: NodeId | None, term: Term) -> None:
        log.info("leader changed", extra={"leader": self.known.name(leader) if leader else None, "term": term})
        if leader == self.me and self._led not in (None, self.me):
            self.vacant.deposed(self._led)
        self._led = leader or self._led
        self.datanode.leader_changed(leader, term)
        self.agent.leader_changed()

    def _peer_lost(self, node: NodeId, lane: Lane) -> None:
        self.membership.doubt(node)
        if lane is Lane.CONSENSUS:
            self.driver.peer_lost(node)

    def _seed_members(self) -> None:
        self.membership.seeds(self.known.members())

    def _vacated(self, node: NodeId) -> None:
        if self.vacant.refused(node):
            log.info("process has ended", extra={"member": self.known.name(node), "node_id": node})
            self.scheduler.look_at_members()

    async def _keep_connected(self) -> None:
        """A vote or an answer for which a connection has to be made first is one that is lost: an election would wait for the
        next."""
        while True:
            for node in sorted(self.driver.voters - {self.me}):  # a set of texts has another order in each process
                self.peers.keep_ready(node, Lane.CONSENSUS)
            await asyncio.sleep(KEEP_CONNECTED_S)

    def _member_changed(self, changed: Changed) -> None:
        member = changed.member
        if changed.new is State.ACTIVE:
            self.known.heard(member.node, member.boot, member.address)
        self.scheduler.member_changed(changed)

    def fail(self, error: IdunnoError) -> None:
        """This node cannot go on: said in the log and at the end of the process."""
        log.error("node cannot go on", extra={"error": str(error)})
        self.problem = self.problem or str(error)
        self.failed.set()

    # -- between nodes --------------------------------------------------------------------------------------------

    async def _told_of_leaving(self, call: Call[Empty]) -> Empty:
        """The leader's last word to a node that has left: its connections are about to be cut."""
        if call.peer.node is None:
            raise Conflict("only a node says so")
        log.info("node has left the cluster", extra={"node_id": self.me})
        self.departures.has_left()
        self.failed.set()
        return Empty()

    async def _call_scheduler(self, method: Method[Q, A], request: Q, body: Buffer = b"", *, timeout_s: float) -> A:
        leader = self.driver.leader
        if leader is None:
            raise Unavailable("no scheduler is elected: wait, or see `idunno status`")
        return await self.peers.to(leader).call(method, request, timeout_s=timeout_s, body=body)

    async def _introduce(self) -> None:
        """Tell the roster what this process is, as soon as there is a leader; again until it is written."""
        command = UpdateNode(
            node=self.me,
            address=self.config.address,
            boot=self.boot,
            slots=self.config.slots,
            zone=self.config.zone,
            software=VERSION,
        )
        if (
            self.vouching.readmission.why
        ):  # until the log is whole the others may know better, and another process be the node
            await self.vouching.proved.wait()
        while True:
            try:
                await self.coordinator.propose(command, actor=Actor(self.me, Role.NODE), timeout_s=INTRODUCE_S)
                await self.coordinator.read(INTRODUCE_S)
                break
            except IdunnoError as error:
                if isinstance(error, REFUSALS):
                    self.fail(error)
                    return
                log.warning("not yet introduced", extra={"error": str(error)})
                await asyncio.sleep(0.5)  # errors may come at once; elections take a second
        self._caught_up()

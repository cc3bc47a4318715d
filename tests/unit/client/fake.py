# tests/unit/client/fake.py: a cluster of fake nodes: real calls and streams in one process, handlers with a dict behind them.
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from idunno.base.errors import Conflict, ConnectionLost, IdunnoError, NotFound, Unavailable
from idunno.base.ids import BlockId, NodeId
from idunno.client.api import Cluster, open_cluster
from idunno.client.locate import Door, Place, SocketDoor
from idunno.client.session import Dial, Link
from idunno.coordinator import messages as coordinator
from idunno.grep import messages as grep
from idunno.scheduler import messages as scheduler
from idunno.sdfs import messages as sdfs
from idunno.wire.calls import Actor, Call, Empty, Method, Peer, Role, pack
from idunno.wire.rpc import LocalCaller, Server

CREATED = "2026-11-20T12:00:00.000Z"
N1, N2 = NodeId("0" * 15 + "1"), NodeId("0" * 15 + "2")
ME = Peer(Actor("alice", Role.ADMIN), local=True)


@dataclass
class Stored:
    version: int
    content: bytes


@dataclass
class World:
    """What all fake nodes share: a cluster without replication."""

    files: dict[str, list[Stored]] = field(default_factory=dict)
    blocks: dict[BlockId, bytes] = field(default_factory=dict)
    models: dict[str, scheduler.ModelInfo] = field(default_factory=dict)
    jobs: dict[str, scheduler.JobInfo] = field(default_factory=dict)
    outputs: dict[str, list[scheduler.OutputInfo]] = field(default_factory=dict)
    submitted: list[scheduler.Submit] = field(default_factory=list)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)  # (node, method, request)
    trouble: Callable[[str, str], IdunnoError | None] = lambda node, method: None
    after: Callable[[str], None] = lambda method: None  # runs when a request was served, before its answer
    down: set[str] = field(default_factory=set)
    closed: dict[str, IdunnoError] = field(default_factory=dict)  # what nodes tell who knocks
    lost: set[str] = field(default_factory=set)  # nodes whose answers get lost, once
    model_story: list[scheduler.ModelInfo] = field(default_factory=list)  # what polls see, one after another
    job_story: list[scheduler.JobInfo] = field(default_factory=list)
    log_lines: list[grep.Line] = field(default_factory=list)

    def put(self, name: str, content: bytes) -> int:
        versions = self.files.setdefault(name, [])
        versions.append(Stored(len(versions) + 1, content))
        return len(versions)

    def expect(self, name: str, if_version: int | None) -> None:
        current = self.files[name][-1].version if name in self.files else 0
        if if_version is not None and if_version != current:
            raise Conflict(f"{name} is at version {current}, the put wanted version {if_version}")

    def asked(self, method: str) -> list[Any]:
        return [request for _, name, request in self.requests if name == method]

    def newest(self, name: str) -> Stored:
        if name not in self.files:
            raise NotFound(f"no file {name}: see `idunno ls`")
        return self.files[name][-1]


class FakeNode:
    """One node's handlers over the shared world."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.server = Server(lambda _: ME, name=name)
        for method, handler in HANDLERS:
            self._register(method, handler)

    def _register(self, method: Method[Any, Any], handler: Callable[[World, Any], Any]) -> None:
        async def serve(call: Call[Any]) -> Any:
            self.world.requests.append((self.name, method.name, call.request))
            trouble = self.world.trouble(self.name, method.name)
            if trouble is not None:
                raise trouble
            answer = handler(self.world, call)
            if hasattr(answer, "__await__"):
                answer = await answer
            self.world.after(method.name)
            if self.name in self.world.lost:
                self.world.lost.discard(self.name)
                raise ConnectionLost(f"{self.name}: the connection broke before the answer")
            return answer

        self.server.register(method, serve)


class FakeCluster:
    def __init__(self, nodes: int = 2) -> None:
        self.world = World()
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.place = Place("/fake", tuple(SocketDoor(Path(n), n) for n in self.names), "run `idunno up --dir /fake`")
        self.dialled: list[str] = []

    def dial(self) -> Dial:
        nodes = {name: FakeNode(self.world, name) for name in self.names}

        async def dial(door: Door, timeout_s: float) -> Link:
            self.dialled.append(door.label)
            if door.label in self.world.closed:
                raise self.world.closed[door.label]
            if door.label in self.world.down:
                raise Unavailable(f"cannot reach {door.label}: Connection refused; is the node running?")
            return LocalCaller(nodes[door.label].server, ME)

        return dial

    async def connect(self, timeout_s: float | None = None) -> Cluster:
        return await open_cluster(self.place, self.dial(), timeout_s=timeout_s, rng=random.Random(1))


# -- handlers ---------------------------------------------------------------------------------------------------------


def _info(name: str, stored: Stored, *, blocks: list[sdfs.BlockCopies]) -> sdfs.FileInfo:
    small = len(stored.content) <= 4096
    return sdfs.FileInfo(
        name, stored.version, len(stored.content), CREATED, "alice", blocks, stored.content if small else None
    )


def _blocks_of(world: World, content: bytes) -> list[sdfs.BlockCopies]:
    from blake3 import blake3

    pieces = [content[i : i + 8 * 1024 * 1024] for i in range(0, len(content), 8 * 1024 * 1024)] or [b""]
    found = []
    for piece in pieces:
        block = BlockId(blake3(piece).hexdigest())
        world.blocks[block] = piece
        found.append(sdfs.BlockCopies(block, len(piece), [N1, N2]))
    return found


def _put_answer(name: str, version: int, size: int, blocks: int) -> sdfs.PutAnswer:
    return sdfs.PutAnswer(name, version, size, blocks, ["n1", "n2"], False, 2)


def _put_small(world: World, call: Call[sdfs.PutSmallFile]) -> sdfs.PutAnswer:
    world.expect(call.request.name, call.request.if_version)
    version = world.put(call.request.name, bytes(call.body))
    return _put_answer(call.request.name, version, len(call.body), 1)


def _begin(world: World, call: Call[sdfs.Begin]) -> sdfs.BeginAnswer:
    world.expect(call.request.name, call.request.if_version)
    return sdfs.BeginAnswer(2, [sdfs.Replica(N1, "n1"), sdfs.Replica(N2, "n2")], [], 1)


async def _write(world: World, call: Call[sdfs.WriteBlock]) -> sdfs.WriteBlockAnswer:
    content = b""
    while (item := await call.receive()) is not None:
        content += bytes(item.body)
    world.blocks[call.request.block] = content
    return sdfs.WriteBlockAnswer(list(call.request.chain), [])


def _commit(world: World, call: Call[sdfs.Commit]) -> sdfs.PutAnswer:
    request = call.request
    world.expect(request.name, request.if_version)
    content = b"".join(world.blocks[block.block] for block in request.blocks)
    return _put_answer(request.name, world.put(request.name, content), len(content), len(request.blocks))


def _stat(world: World, call: Call[sdfs.Stat]) -> sdfs.StatAnswer:
    request = call.request
    newest = world.newest(request.name)
    chosen = [newest]
    if request.version is not None:
        chosen = [stored for stored in world.files[request.name] if stored.version == request.version]
        if not chosen:
            raise NotFound(f"{request.name} has no version {request.version}: see `idunno versions {request.name}`")
    if request.last is not None:
        chosen = world.files[request.name][::-1][: request.last]
    return sdfs.StatAnswer([_info(request.name, s, blocks=_blocks_of(world, s.content)) for s in chosen])


async def _read(world: World, call: Call[sdfs.ReadBlock]) -> Empty:
    content = world.blocks[call.request.block]
    for at in range(call.request.offset, call.request.offset + call.request.length, 256 * 1024):
        await call.send(content[at : at + 256 * 1024], note=N1.encode())
    return Empty()


def _list(world: World, call: Call[sdfs.List]) -> sdfs.ListAnswer:
    request = call.request
    names = sorted(
        name
        for name in world.files
        if name.startswith(request.prefix)
        and name > request.after
        and (request.system or not name.startswith(".idunno/"))
    )
    page = names[: min(request.limit, 3)]  # small pages, so that paging is really used
    rows = [sdfs.ListRow(name, world.newest(name).version, len(world.newest(name).content), CREATED) for name in page]
    return sdfs.ListAnswer(rows, len(names) > len(page))


def _versions(world: World, call: Call[sdfs.ByName]) -> sdfs.VersionsAnswer:
    world.newest(call.request.name)
    rows = world.files[call.request.name][::-1]
    return sdfs.VersionsAnswer([sdfs.VersionRow(s.version, len(s.content), CREATED, ["n1", "n2"]) for s in rows])


def _where(world: World, call: Call[sdfs.ByName]) -> sdfs.WhereAnswer:
    stored = world.newest(call.request.name)
    blocks = _blocks_of(world, stored.content)
    rows = [sdfs.WhereBlock(block.block, block.size, ["n1", "n2"]) for block in blocks]
    return sdfs.WhereAnswer(call.request.name, stored.version, 4, 2, rows)


def _store(world: World, call: Call[sdfs.Store]) -> sdfs.StoreAnswer:
    rows = [sdfs.StoreRow(name, world.newest(name).version, 1) for name in sorted(world.files)]
    return sdfs.StoreAnswer(call.request.node or "n1", rows)


def _delete(world: World, call: Call[sdfs.Delete]) -> sdfs.DeleteAnswer:
    world.newest(call.request.name)
    return sdfs.DeleteAnswer(call.request.name, len(world.files.pop(call.request.name)))


def model(name: str, state: str = "deployed", version: int = 1, **more: Any) -> scheduler.ModelInfo:
    workers = more.pop("workers", [scheduler.ModelWorker("n1", "ready"), scheduler.ModelWorker("n2", "ready")])
    return scheduler.ModelInfo(name, version, state, workers, 0, 1.0, "onnx", **more)


def _models(world: World, call: Call[scheduler.ListModels]) -> scheduler.Models:
    """In pages of two."""
    rows = [row for name, row in sorted(world.models.items()) if name > call.request.after]
    return scheduler.Models(rows[:2], more=len(rows) > 2)


def _assignments(world: World, call: Call[scheduler.ListAssignments]) -> scheduler.Assignments:
    """In pages of two."""
    rows = [scheduler.WorkerRow(node, "worker", ["digits"], "j/0", CREATED) for node in ("n1", "n2", "n3")]
    rows = [row for row in rows if row.node > call.request.after]
    return scheduler.Assignments(rows[:2], more=len(rows) > 2)


def job_info(job: str, state: str, queries: int = 0, done: int = 0, errors: int = 0, **more: Any) -> scheduler.JobInfo:
    tasks = more.pop("tasks", scheduler.TaskCounts(success=done))
    finished = None if state in ("planning", "running") else CREATED
    return scheduler.JobInfo(
        job, "alice", "digits", state, queries, done, errors, tasks, CREATED, finished, 1.0, **more
    )


def _deploy(world: World, call: Call[scheduler.DeployModel]) -> scheduler.ModelInfo:
    request = call.request
    info = model(request.model, "undeployed", workers=[scheduler.ModelWorker("n1", "assigned")])
    world.models[request.model] = info
    return info


def _get_model(world: World, call: Call[scheduler.GetModel]) -> scheduler.ModelInfo:
    if call.request.seen is not None and world.model_story:
        world.models[call.request.model] = world.model_story.pop(0)
    if call.request.model not in world.models:
        raise NotFound(f"no model {call.request.model}")
    return world.models[call.request.model]


def _submit(world: World, call: Call[scheduler.Submit]) -> scheduler.JobInfo:
    world.submitted.append(call.request)
    job = call.request.job
    if job not in world.jobs:
        world.jobs[job] = msgspec.structs.replace(job_info(job, "planning"), model=call.request.model)
    return world.jobs[job]


def _get_job(world: World, call: Call[scheduler.GetJob]) -> scheduler.JobInfo:
    job = call.request.job
    if job not in world.jobs:
        raise NotFound(f"no job {job}: see `idunno jobs`")
    if world.job_story:
        world.jobs[job] = msgspec.structs.replace(world.job_story.pop(0), job=job)
    return world.jobs[job]


OUTPUTS_A_PAGE = 2  # so that every test with three parts turns a page


def _outputs(world: World, call: Call[scheduler.JobRequest]) -> scheduler.Outputs:
    job = call.request.job
    if job not in world.jobs:
        raise NotFound(f"no job {job}: see `idunno jobs`")
    # Any job may have the one story of outputs under "": a test does not know the id that the client makes.
    ended = sorted(world.outputs.get(job, world.outputs.get("", [])), key=lambda part: part.first)
    rest = [part for part in ended if part.last > call.request.first]
    return scheduler.Outputs(world.jobs[job], rest[:OUTPUTS_A_PAGE], len(rest) > OUTPUTS_A_PAGE)


def _cancel(world: World, call: Call[scheduler.JobRequest]) -> scheduler.JobInfo:
    return msgspec.structs.replace(world.jobs[call.request.job], state="cancelled")


MEMBERS = [
    coordinator.Member("n1", N1, "127.0.0.1:7400", "active", "scheduler", 1, "0.1.0", 1, ""),
    coordinator.Member("n2", N2, "127.0.0.1:7401", "failed", "worker", 2, "0.1.0", 1, ""),
]
STATUS = coordinator.StatusAnswer(
    False, "n2 has failed", "c" * 32, "n1", "n1", 3, ["n1"], [], {"active": 1, "failed": 1}, 9, 9, 1, 2, {}, {}, {}
)


UPGRADE = coordinator.UpgradeAnswer(
    1,
    2,
    False,
    False,
    "1 of 2 nodes are not ready for machine version 2: n2: upgrade it",
    [coordinator.UpgradeNode("n1", N1, "0.2", 2, ""), coordinator.UpgradeNode("n2", N2, "0.1", 1, "upgrade it")],
)


def _upgrade() -> coordinator.UpgradeAnswer:
    raise Conflict(UPGRADE.why)


async def _grep(world: World, call: Call[grep.Query]) -> grep.QueryAnswer:
    for line in world.log_lines:
        await call.send(note=pack(grep.LineBatch([line])))
    return grep.QueryAnswer({"n1": len(world.log_lines)}, {"n1": 0.01}, {"n2": "no answer within 5 s"}, 0.02, False)


HANDLERS: list[tuple[Method[Any, Any], Callable[[World, Any], Any]]] = [
    (sdfs.PUT_SMALL, _put_small),
    (sdfs.BEGIN, _begin),
    (sdfs.WRITE_BLOCK, _write),
    (sdfs.COMMIT, _commit),
    (sdfs.ABORT, lambda world, call: Empty()),
    (sdfs.RETAIN, lambda world, call: sdfs.RetainAnswer([])),
    (sdfs.STAT, _stat),
    (sdfs.READ_BLOCK, _read),
    (sdfs.LIST, _list),
    (sdfs.VERSIONS, _versions),
    (sdfs.WHERE, _where),
    (sdfs.STORE, _store),
    (sdfs.DELETE, _delete),
    (scheduler.DEPLOY, _deploy),
    (scheduler.GET_MODEL, _get_model),
    (scheduler.MODELS, _models),
    (scheduler.UNDEPLOY, lambda world, call: Empty()),
    (scheduler.BATCH_SIZE, lambda world, call: model(call.request.model)),
    (scheduler.SUBMIT, _submit),
    (scheduler.GET_JOB, _get_job),
    (scheduler.JOBS, lambda world, call: scheduler.Jobs(list(world.jobs.values()))),
    (scheduler.CANCEL, _cancel),
    (scheduler.FORGET, lambda world, call: Empty()),
    (scheduler.OUTPUTS, _outputs),
    (scheduler.RATES, lambda world, call: scheduler.Rates([scheduler.ModelRate("digits", 12.5, 100, 2, 7)], 0.1)),
    (scheduler.TIMES, lambda world, call: scheduler.Times("digits", 10, 0.1, 0.01, 0.1, 0.12, 0.13, 0.14)),
    (scheduler.ASSIGNMENTS, _assignments),
    (
        scheduler.EXPLAIN,
        lambda world, call: scheduler.Explanation(
            call.request.what, "a free worker", [scheduler.Decision(CREATED, "digits", "2 workers are ready")]
        ),
    ),
    (coordinator.MEMBERS, lambda world, call: coordinator.MembersAnswer(MEMBERS)),
    (coordinator.STATUS, lambda world, call: STATUS),
    (coordinator.UPGRADE_CHECK, lambda world, call: UPGRADE),
    (coordinator.UPGRADE, lambda world, call: _upgrade()),
    (
        coordinator.TOKEN_NEW,
        lambda world, call: coordinator.NewTokenAnswer("5f3a", "idunno-secret", call.request.role, CREATED),
    ),
    (
        coordinator.TOKEN_LIST,
        lambda world, call: coordinator.TokenRows([coordinator.TokenRow("5f3a", "user", CREATED, "alice", "valid")]),
    ),
    (coordinator.TOKEN_REVOKE, lambda world, call: Empty()),
    (coordinator.USERS, lambda world, call: coordinator.UserRows([coordinator.UserRow("alice", "admin", CREATED)])),
    (coordinator.USER_REVOKE, lambda world, call: Empty()),
    (grep.QUERY, _grep),
]

__all__ = ["FakeCluster", "World", "job_info", "model"]

"""A machine with a roster, and short words to give it commands; used by all tests of the coordinator."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

from idunno.base.ids import BlockId, Index, NodeId
from idunno.coordinator import commands as c
from idunno.coordinator.machine import Applied, Machine
from idunno.coordinator.records import (
    MACHINE_VERSION,
    Block,
    ModelFile,
    NodeRecord,
    Timing,
    TokenRecord,
    UserRecord,
)
from idunno.coordinator.timing import timing_of
from idunno.wire.calls import Actor, Role

N1, N2, N3 = (NodeId(f"{i:016x}") for i in (1, 2, 3))
SYSTEM = Actor(N1, Role.NODE)
ADMIN = Actor("root", Role.ADMIN)
ALICE = Actor("alice", Role.USER)
BOB = Actor("bob", Role.USER)
READER = Actor("rita", Role.READER)
HOUR_MS = 3_600_000


def block(text: str, size: int = 10) -> Block:
    return Block(BlockId(blake3(text.encode()).hexdigest()), size)


def node(i: int, name: str | None = None, **more: Any) -> NodeRecord:
    given = {"fingerprint": bytes([i]) * 32, "key": bytes([100 + i]) * 32, **more}
    return NodeRecord(NodeId(f"{i:016x}"), name or f"n{i}", f"127.0.0.1:{7400 + i}", **given)


def user(name: str, role: str = "user", i: int = 50) -> UserRecord:
    return UserRecord(name, role, bytes([i]) * 32, key=bytes([100 + i]) * 32)


def token(name: str, role: str, expires_ms: int = HOUR_MS) -> TokenRecord:
    return TokenRecord(name, role, bytes(32), expires_ms)


def genesis(nodes: int = 3) -> c.Genesis:
    return c.Genesis(
        cluster="c" * 32,
        nodes=tuple(node(i, voter=True) for i in range(1, nodes + 1)),
        cluster_key=b"k" * 32,
        tokens=(token("t-node", "node"), token("t-user", "user")),
    )


class World:
    """Gives commands to a machine and keeps its log."""

    def __init__(self, *, begun: bool = True) -> None:
        self.machine = Machine()
        self.log: list[bytes] = []
        self.now_ms = 1_000
        if begun:
            self.do(genesis(), SYSTEM)

    @classmethod
    def newest(cls) -> World:
        """Of the newest machine version, as every cluster is in the end."""
        world = cls()
        world.do(c.RaiseVersion(MACHINE_VERSION), ADMIN)
        return world

    def apply(self, command: c.Command, actor: Actor = ALICE, request: str = "") -> Applied:
        entry = c.Entry(c.FORMAT, self.now_ms, actor.name, actor.role.value, request, command)
        self.log.append(c.encode_entry(entry))
        return self.machine.apply(Index(len(self.log)), self.log[-1])

    def do(self, command: c.Command, actor: Actor = ALICE, request: str = "") -> Any:
        """The command's result; what it was refused with is raised."""
        applied = self.apply(command, actor, request)
        if applied.error is not None:
            raise applied.error
        return applied.result

    # -- stories that many tests begin with ---------------------------------------------------------------------------

    def put(self, name: str, text: str = "x", actor: Actor = ALICE, put: str = "") -> int:
        put = put or f"put-{len(self.log)}"
        self.do(c.BeginPut(put, name), actor)
        version = self.do(c.CommitPut(put, name, 10, (block(text),)), actor).version
        assert isinstance(version, int)
        return version

    def deploy(
        self, model: str = "digits", actor: Actor = ALICE, assign: tuple[NodeId, ...] = (N1,), request: str = ""
    ) -> int:
        name = f"models/{model}"
        version = self.put(name, model, actor)
        files = (ModelFile("model.onnx", name, version, 10, (block(model),)),)
        command = c.Deploy(model, "onnx", files, 0, 0, 1_000, 0, 0, assign)
        given = self.do(command, actor, request or f"deploy-{len(self.log)}").version
        assert isinstance(given, int)
        return given

    def deployed(self, model: str = "digits", actor: Actor = ALICE) -> int:
        version = self.deploy(model, actor)
        self.do(c.ReportWorker(model, version, N1), SYSTEM)
        return version

    def submit(self, job: str = "job1", actor: Actor = ALICE, model: str = "digits") -> None:
        version = self.put(f".idunno/jobs/{job}/input", job, actor)
        self.do(c.SubmitJob(job, model, f".idunno/jobs/{job}/input", version, "lines"), actor)

    def planned(self, queries: int, task_queries: int, job: str = "job1", actor: Actor = ALICE) -> None:
        if self.machine.registry.find("digits") is None:
            self.deployed()
        self.submit(job, actor)
        self.do(c.PlanJob(job, queries, task_queries), SYSTEM)


def done(job: str, task: int, queries: int, errors: int = 0, content: bytes = b"{}\n", **more: Any) -> c.CompleteTask:
    """A completion whose output rides in the command."""
    given = {"put": "", "size": len(content), "blocks": (), "content": content, "timing": timing(queries), **more}
    return c.CompleteTask(job=job, task=task, node=N2, done=queries - errors, errors=errors, **given)


def timing(queries: int) -> Timing:
    return timing_of([(1_500, queries)]) if queries else Timing()

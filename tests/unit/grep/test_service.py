# tests/unit/grep/test_service.py: one query over a ring of nodes with logs of their own, with real children and fake ones.
from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec
import pytest

from idunno.base.disk import Buffer, Disk
from idunno.base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Exhausted,
    IdunnoError,
    InternalError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from idunno.base.ids import NodeId
from idunno.grep.messages import QUERY, SEARCH, Line, LineBatch, NodeResult, Order, Query, QueryAnswer
from idunno.grep.process import Child, Spawn, spawn_child
from idunno.grep.service import QUERIES_MAX, SEARCH_S_MAX, SEARCHES_MAX, GrepService
from idunno.membership.messages import MemberView
from idunno.wire.calls import Actor, Call, Caller, Item, Lane, Method, Peer, Peers, Registrar, Role


def node_id(number: int) -> NodeId:
    return NodeId(f"{number:016x}")


class FakeCall:
    """A query as a handler sees it; keeps what it is sent."""

    def __init__(self, query: Query, timeout_s: float = 20.0) -> None:
        self.request, self.body = query, b""
        self.peer = Peer(Actor("somebody", Role.READER))
        self.actor = self.peer.actor
        self.items: asyncio.Queue[Item | None] = asyncio.Queue()
        self._timeout_s = timeout_s

    def remaining_s(self) -> float:
        return self._timeout_s

    async def receive(self) -> Item | None:
        return None

    async def send(self, body: Buffer = b"", note: bytes = b"") -> None:
        await self.items.put(Item(note))

    def lines(self) -> list[Line]:
        found: list[Line] = []
        while not self.items.empty():
            item = self.items.get_nowait()
            if item is not None:
                found += msgspec.msgpack.decode(item.note, type=LineBatch).lines
        return found


class FakeStream:
    """The other end of a handler that runs in this process; leaving it early cancels the handler."""

    def __init__(self, handler: Callable[[Any], Awaitable[Any]], query: Query, timeout_s: float) -> None:
        self._call, self._handler = FakeCall(query, timeout_s), handler

    async def __aenter__(self) -> FakeStream:
        self._task = asyncio.ensure_future(self._run())
        return self

    async def _run(self) -> Any:
        try:
            return await self._handler(self._call)
        finally:
            self._call.items.put_nowait(None)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def end(self) -> None: ...

    async def receive(self) -> Item | None:
        return await self._call.items.get()

    async def answer(self) -> Any:
        return await self._task


class Ring:
    """Nodes n1..nN, each with a directory, connected by fake calls. It is registrar, peers and disk for all of them."""

    def __init__(self, base: Path, size: int, spawn: Spawn = spawn_child) -> None:
        self.base, self.dead = base, dict[int, str]()
        self.states = dict.fromkeys(range(1, size + 1), "active")
        self.handlers: dict[tuple[int, str], Any] = {}
        self.services = {}
        for number in range(1, size + 1):
            (base / f"n{number}" / "logs").mkdir(parents=True)
            self.services[number] = GrepService(
                cast(Registrar, _Registrar(self, number)),
                cast(Peers, _Peers(self)),
                self.members,
                node_id(number),
                cast(Disk, _Disk(base / f"n{number}")),
                spawn=spawn,
            )

    def members(self) -> list[MemberView]:
        return [
            MemberView(node_id(n), f"n{n}", "127.0.0.1:1", state, 0, 1, 0, "no refutation")
            for n, state in self.states.items()
        ]

    def write(self, number: int, name: str, *texts: str) -> None:
        data = "".join(json.dumps({"level": "info", "text": text}) + "\n" for text in texts).encode()
        path = self.base / f"n{number}" / "logs" / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    async def ask(self, query: Query, at: int = 1, timeout_s: float = 20.0) -> tuple[list[Line], QueryAnswer]:
        call = FakeCall(query, timeout_s)
        answer = await self.handlers[at, QUERY.name](cast(Call[Query], call))
        return call.lines(), answer


class _Registrar:
    def __init__(self, ring: Ring, number: int) -> None:
        self._ring, self._number = ring, number

    def register(self, method: Method[Any, Any], handler: Any) -> None:
        self._ring.handlers[self._number, method.name] = handler


class _Peers:
    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def to(self, node: NodeId, lane: Lane = Lane.CALLS) -> Caller:
        return cast(Caller, _Caller(self._ring, int(node, 16)))


class _Caller:
    def __init__(self, ring: Ring, number: int) -> None:
        self._ring, self._number = ring, number

    def open(
        self, method: Method[Any, Any], request: Query, *, timeout_s: float, actor: Actor | None = None
    ) -> FakeStream:
        assert method is SEARCH
        assert actor is None, "a search is the node's own call: whoever may query may not search"
        if self._number in self._ring.dead:
            raise Unavailable(self._ring.dead[self._number])
        return FakeStream(self._ring.handlers[self._number, method.name], request, timeout_s)


class _Disk:
    def __init__(self, base: Path) -> None:
        self._base = base

    def local_path(self, path: str) -> str:
        return str(self._base / path)


class FakeChild:
    """Answers with what it is given; then hangs if told so."""

    def __init__(self, *answers: Any, hang: bool = False, status: int = 0) -> None:
        self._data = [msgspec.msgpack.encode(answer) for answer in answers]
        self._hang, self._status, self.ended = hang, status, 0
        self.started = asyncio.Event()

    async def give(self, order: bytes) -> None:
        self.started.set()

    async def read(self) -> bytes:
        if self._data:
            return self._data.pop(0)
        if self._hang:
            await asyncio.Event().wait()
        return b""

    async def end(self) -> int:
        self.ended += 1
        return self._status

    async def spawn(self) -> Child:
        return self


def batch(text: str) -> tuple[str, bytes]:
    return "lines", msgspec.msgpack.encode(LineBatch([Line("n1", "node.jsonl", 1, text)]))


DONE = ("done", NodeResult(1, 0.1, False))


def test_all_living_nodes_are_searched_rotated_and_compressed_files_included(tmp_path: Path) -> None:
    async def story() -> None:
        ring = Ring(tmp_path, 3)
        ring.write(1, "node.jsonl", "now needle", "hay")
        ring.write(1, "node.jsonl.1", "before needle")
        ring.write(1, "node.jsonl.2.gz", "long ago needle")
        ring.write(1, "other.txt", "needle that is no log")
        ring.write(2, "node.jsonl", "hay", "needle in two")
        lines, answer = await ring.ask(Query("needle"), at=2)
        assert answer.counts == {"n1": 3, "n2": 1, "n3": 0}
        assert (answer.unreachable, answer.truncated) == ({}, False)
        assert answer.node_seconds.keys() == {"n1", "n2", "n3"}
        first = [(line.file, line.line, json.loads(line.text)["text"]) for line in lines if line.node == "n1"]
        assert first == [
            ("node.jsonl.2.gz", 1, "long ago needle"),
            ("node.jsonl.1", 1, "before needle"),
            ("node.jsonl", 1, "now needle"),
        ]
        only, answer = await ring.ask(Query("needle", nodes=["n1"], limit=2))
        assert ([line.node for line in only], answer.truncated) == (["n1", "n1"], True)
        counted, answer = await ring.ask(Query("needle", count_only=True, nodes=[node_id(1), "n2"]))
        assert (counted, answer.counts) == ([], {"n1": 3, "n2": 1})

    asyncio.run(story())


def test_more_lines_than_a_pipe_holds_arrive_whole_and_in_order(tmp_path: Path) -> None:
    async def story() -> None:
        ring = Ring(tmp_path, 1)
        ring.write(1, "node.jsonl", *(f"line {n} " + "x" * 200 for n in range(20_000)))
        lines, answer = await ring.ask(Query("line", limit=100_000))
        assert answer.counts == {"n1": 20_000}
        assert [line.line for line in lines] == list(range(1, 20_001))

    asyncio.run(story())


def test_a_pattern_that_never_ends_is_killed_at_the_deadline_and_the_rest_is_complete(tmp_path: Path) -> None:
    async def story() -> None:
        ring = Ring(tmp_path, 2)
        ring.write(1, "node.jsonl", "a" * 64)
        ring.write(2, "node.jsonl", "hay")
        _, answer = await ring.ask(Query("(a+)+b"), timeout_s=1.5)
        assert answer.counts == {"n2": 0}
        assert answer.unreachable["n1"].startswith("deadline-exceeded: ")

    asyncio.run(story())


def test_dead_failing_and_half_read_nodes_are_named_and_the_rest_is_complete(tmp_path: Path) -> None:
    async def story() -> None:
        ring = Ring(tmp_path, 6)
        for number in range(1, 7):
            ring.write(number, "node.jsonl", "needle")
        (tmp_path / "n2/logs/node.jsonl.1.gz").write_bytes(gzip.compress(b"needle\n" * 1_000)[:-20])
        ring.states[3], ring.states[6] = "failed", "stopped"
        ring.dead[4] = "n4 refused the connection"

        async def dies(call: FakeCall) -> NodeResult:
            await call.send(note=batch("needle")[1])
            raise ConnectionLost("n5 is gone")

        ring.handlers[5, SEARCH.name] = dies
        lines, answer = await ring.ask(Query("needle"))
        assert answer.counts["n1"] == 1
        assert set(answer.counts) == {"n1", "n2"}
        assert answer.unreachable["n2"].startswith("incomplete: node.jsonl.1.gz: ")
        assert answer.unreachable["n3"] == "failed: no refutation"
        assert answer.unreachable["n4"] == "unavailable: n4 refused the connection"
        assert answer.unreachable["n5"] == "connection-lost: n5 is gone"
        assert answer.unreachable["n6"].startswith("stopped: ")
        assert len([line for line in lines if line.node == "n1"]) == 2  # its own, and what n5 sent before it died

    asyncio.run(story())


def test_an_asker_that_goes_away_ends_the_children_everywhere(tmp_path: Path) -> None:
    async def story() -> None:
        children: list[FakeChild] = []

        async def spawn() -> Child:
            children.append(FakeChild(batch("needle"), hang=True))
            return children[-1]

        ring = Ring(tmp_path, 3, spawn)
        asking = asyncio.ensure_future(ring.ask(Query("needle")))
        async with asyncio.timeout(5):
            while len(children) < 3:  # noqa: ASYNC110  a turn of the loop each
                await asyncio.sleep(0)
            for child in children:
                await child.started.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert [child.ended for child in children] == [1, 1, 1]
        assert all(service._searches == service._queries == 0 for service in ring.services.values())

    asyncio.run(story())


def test_a_real_child_is_reaped_when_its_asker_goes_away(tmp_path: Path) -> None:
    async def story() -> None:
        started: list[Child] = []

        async def spawn() -> Child:
            started.append(await spawn_child())
            return started[-1]

        ring = Ring(tmp_path, 1, spawn)
        ring.write(1, "node.jsonl", *("needle" + "x" * 1_000 for _ in range(20_000)))
        call = FakeCall(Query("needle", limit=100_000))
        call.items = asyncio.Queue(maxsize=1)  # an asker that takes one batch and no more: child and pipe are full
        asking = asyncio.ensure_future(ring.handlers[1, QUERY.name](call))
        async with asyncio.timeout(10):
            await call.items.get()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert await started[0].end() == -9

    asyncio.run(story())


@pytest.mark.parametrize(
    ("child", "error", "says"),
    [
        (FakeChild(("error", "disk-failed", "cannot read node.jsonl: denied")), IdunnoError, "denied"),
        (FakeChild(status=-9), InternalError, "status -9"),
        (FakeChild(("what", 1)), InternalError, "unknown"),
        (FakeChild(hang=True), DeadlineExceeded, "not done within 0.1 s"),
    ],
)
def test_how_a_search_fails(tmp_path: Path, child: FakeChild, error: type[IdunnoError], says: str) -> None:
    async def story() -> None:
        ring = Ring(tmp_path, 1, child.spawn)
        with pytest.raises(error, match=says):
            await ring.handlers[1, SEARCH.name](FakeCall(Query("x"), 0.1))
        assert child.ended >= 1

    asyncio.run(story())


def test_a_bad_query_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    async def story() -> None:
        ring = Ring(tmp_path, 1)
        with pytest.raises(InvalidArgument, match="at character 1"):
            await ring.ask(Query("["))
        with pytest.raises(NotFound, match="n9; see `idunno members`"):
            await ring.ask(Query("x", nodes=["n1", "n9"]))

    asyncio.run(story())


def test_searches_and_queries_are_bounded(tmp_path: Path) -> None:
    async def story() -> None:
        ring = Ring(tmp_path, 2, FakeChild(hang=True).spawn)

        async def hangs(_: FakeCall) -> NodeResult:
            await asyncio.Event().wait()
            raise AssertionError("never set")

        ring.handlers[2, SEARCH.name] = hangs
        elsewhere = [asyncio.ensure_future(ring.ask(Query("x", nodes=["n2"]))) for _ in range(QUERIES_MAX)]
        searches = [ring.handlers[1, SEARCH.name](FakeCall(Query("x"))) for _ in range(SEARCHES_MAX)]
        here = [asyncio.ensure_future(search) for search in searches]
        for _ in range(10):
            await asyncio.sleep(0)
        with pytest.raises(Exhausted, match=f"{QUERIES_MAX} greps"):
            await ring.ask(Query("x"))
        with pytest.raises(Exhausted, match=f"{SEARCHES_MAX} searches"):
            await ring.handlers[1, SEARCH.name](FakeCall(Query("x")))
        for task in elsewhere + here:
            task.cancel()
        await asyncio.gather(*elsewhere, *here, return_exceptions=True)

    asyncio.run(story())


def test_no_asker_can_give_a_search_more_than_its_longest_time(tmp_path: Path) -> None:
    class Heard(FakeChild):
        async def give(self, order: bytes) -> None:
            seconds.append(msgspec.msgpack.decode(order, type=Order).seconds_max)

    seconds: list[int] = []

    async def story() -> None:
        ring = Ring(tmp_path, 1, Heard(DONE, hang=True).spawn)
        week_s = 7 * 24 * 3600.0
        await ring.handlers[1, SEARCH.name](FakeCall(Query("x"), week_s))

    asyncio.run(story())
    assert seconds == [SEARCH_S_MAX + 1]

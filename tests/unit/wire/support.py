# tests/unit/wire/support.py: both loops, a server with a few methods, and certificates made once.
from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from ssl import SSLContext
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar

import msgspec
import uvloop

from idunno.base.errors import NotFound
from idunno.base.ids import NodeId
from idunno.wire import security
from idunno.wire.calls import Actor, Call, Empty, Method, Peer, Reply, Role
from idunno.wire.rpc import Limits, Server

T = TypeVar("T")
LOOPS: Final = ("asyncio", "uvloop")


class Text(msgspec.Struct):
    text: str = ""


ECHO: Final = Method("test.echo", Text, Text, Role.READER)
HELLO: Final = Method("test.hello", Text, Text, Role.ANYONE)
WHO: Final = Method("test.who", Empty, Text, Role.READER)
NODES_ONLY: Final = Method("test.nodes-only", Empty, Text, Role.NODE)
MISSING: Final = Method("test.missing", Text, Empty, Role.READER)
BUG: Final = Method("test.bug", Empty, Empty, Role.READER)
HANG: Final = Method("test.hang", Empty, Empty, Role.READER)
TOLD: Final = Method("test.told", Text, Empty, Role.READER)
REPEAT: Final = Method("test.repeat", Text, Text, Role.READER)
FLOOD: Final = Method("test.flood", Text, Text, Role.READER)
UNREAD: Final = Method("test.unread", Empty, Text, Role.READER)


def run(loop: str, main: Callable[[], Coroutine[Any, Any, T]], timeout_s: float = 30.0) -> T:
    """Run `main` on one of LOOPS. Fails when anything went wrong behind its back."""
    behind: list[dict[str, Any]] = []

    async def guarded() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: behind.append(context))
        return await asyncio.wait_for(main(), timeout_s)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop) as runner:
        result = runner.run(guarded())
    assert not behind, behind
    return result


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the test's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for knows nothing of tests
        await asyncio.sleep(0.001)


@dataclass
class Story:
    """What the handlers saw."""

    started: int = 0
    cancelled: int = 0
    sent: int = 0  # bytes that FLOOD's handler got rid of
    told: list[str] = field(default_factory=list)


def register(server: Server) -> Story:
    story = Story()

    async def echo(call: Call[Text]) -> Reply[Text]:
        return Reply(call.request, call.body)

    async def who(call: Call[Empty]) -> Text:
        return Text(f"{call.actor.name} {call.actor.role.value}")

    async def missing(call: Call[Text]) -> Empty:
        raise NotFound(f"no {call.request.text}")

    async def bug(call: Call[Empty]) -> Empty:
        raise ZeroDivisionError("a bug of the test")

    async def hang(call: Call[Empty]) -> Empty:
        story.started += 1
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            story.cancelled += 1
        return Empty()

    async def told(call: Call[Text]) -> Empty:
        story.told.append(call.request.text)
        return Empty()

    async def repeat(call: Call[Text]) -> Text:
        total = 0
        while (item := await call.receive()) is not None:
            total += len(item.body)
            await call.send(item.body, item.note)
        return Text(str(total))

    async def flood(call: Call[Text]) -> Text:
        story.started += 1
        try:
            for _ in range(int(call.request.text)):
                await call.send(bytes(64 * 1024))
                story.sent += 64 * 1024
        except asyncio.CancelledError:
            story.cancelled += 1
            raise
        return Text("done")

    async def unread(call: Call[Empty]) -> Text:
        return Text("not a word of it")

    server.register(ECHO, echo)
    server.register(HELLO, echo)
    server.register(WHO, who)
    server.register(NODES_ONLY, who)
    server.register(MISSING, missing)
    server.register(BUG, bug)
    server.register(HANG, hang)
    server.register(TOLD, told)
    server.register(REPEAT, repeat)
    server.register(FLOOD, flood)
    server.register(UNREAD, unread)
    return story


@contextlib.asynccontextmanager
async def serving_unix() -> AsyncIterator[tuple[str, Server, Story]]:
    """A server on a Unix socket: its path, itself, and what its handlers saw."""
    server = Server(lambda _: None, name="n1")
    story = register(server)
    with TemporaryDirectory() as folder:
        path = f"{folder}/node.sock"
        await server.listen_unix(path)
        try:
            yield path, server, story
        finally:
            await server.close(0)


@dataclass(frozen=True)
class Identity:
    """A certificate with its key, as files and by fingerprint."""

    certificate: str
    key: str
    fingerprint: bytes


@dataclass(frozen=True)
class Cluster:
    """A CA and three certificates of it."""

    ca: bytes
    node: Identity
    other_node: Identity
    user: Identity
    folder: TemporaryDirectory[str]  # kept alive with it

    def server_context(self) -> SSLContext:
        return security.server_context(self.node.certificate, self.node.key, self.ca)

    def client_context(self, who: Identity | None) -> SSLContext:
        if who is None:
            return security.client_context(None, None, self.ca)
        return security.client_context(who.certificate, who.key, self.ca)

    def peers(self) -> dict[bytes | None, Peer]:
        """The roster: who a fingerprint is."""
        return {
            self.node.fingerprint: Peer(Actor("a" * 16, Role.NODE), NodeId("a" * 16)),
            self.other_node.fingerprint: Peer(Actor("b" * 16, Role.NODE), NodeId("b" * 16)),
            self.user.fingerprint: Peer(Actor("ann", Role.USER)),
        }


@cache
def cluster(name: str) -> Cluster:
    """One CA a name, made once: two names are two clusters."""
    ca, ca_key = security.make_ca()
    folder = TemporaryDirectory()

    def issue(common_name: str, role: Role) -> Identity:
        key, csr = security.make_key_and_csr(common_name)
        certificate = security.sign(ca, ca_key, csr, common_name=common_name, role=role)
        base = Path(folder.name) / common_name
        base.with_suffix(".pem").write_bytes(certificate)
        base.with_suffix(".key").write_bytes(key)
        return Identity(f"{base}.pem", f"{base}.key", security.fingerprint(certificate))

    identities = (issue("a" * 16, Role.NODE), issue("b" * 16, Role.NODE), issue("ann", Role.USER))
    return Cluster(ca, *identities, folder)


@contextlib.asynccontextmanager
async def serving_tls(
    home: Cluster, roster: dict[bytes | None, Peer] | None = None, limits: Limits | None = None
) -> AsyncIterator[tuple[int, Server, Story]]:
    """A TLS server on a free loopback port, as the cluster's first node."""
    peers = home.peers() if roster is None else roster
    server = Server(peers.get, name="n1", limits=limits)
    story = register(server)
    port = await server.listen_tcp("127.0.0.1", 0, home.server_context())
    try:
        yield port, server, story
    finally:
        await server.close(0)

# bench/wire.py: what a call and a byte cost on the wire, plain and with TLS, beside the limit of the loopback itself.
#
# Two processes on one machine, uvloop: one serves, one asks. Small calls: 64 in flight on one connection. Bulk: one stream of
# 256 KiB items. The limit of bulk is a bare socket that sends the same bytes, measured in the same run.
from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import uvloop

from idunno.wire import security
from idunno.wire.calls import BODY_BYTES_MAX, Actor, Call, Empty, Method, Peer, Role
from idunno.wire.rpc import Connection, Server, connect_tcp, connect_unix

IN_FLIGHT = 64
SMALL_S, BULK_BYTES = 2.0, 1 << 30


class Text(msgspec.Struct):
    text: str


ECHO = Method("bench.echo", Text, Text, Role.ANYONE)
TAKE = Method("bench.take", Empty, Empty, Role.ANYONE)
GIVE = Method("bench.give", Empty, Empty, Role.ANYONE)


def serve(folder: str, pipe: multiprocessing.connection.Connection) -> None:
    async def main() -> None:
        home = Path(folder)
        server = Server(lambda _: Peer(Actor("bench", Role.USER)), name="bench")

        async def echo(call: Call[Text]) -> Text:
            return call.request

        async def take(call: Call[Empty]) -> Empty:
            while await call.receive() is not None:
                pass
            return Empty()

        async def give(call: Call[Empty]) -> Empty:
            block = bytes(BODY_BYTES_MAX)
            for _ in range(BULK_BYTES // BODY_BYTES_MAX):
                await call.send(block)
            return Empty()

        server.register(ECHO, echo)
        server.register(TAKE, take)
        server.register(GIVE, give)
        context = security.server_context(
            str(home / "node.pem"), str(home / "node.key"), (home / "ca.pem").read_bytes()
        )
        await server.listen_unix(str(home / "node.sock"))
        pipe.send(await server.listen_tcp("127.0.0.1", 0, context))
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await server.close(0)

    uvloop.run(main())


async def small_calls(connection: Connection) -> float:
    """Round trips per second."""
    done, end = 0, time.perf_counter() + SMALL_S

    async def ask() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await connection.call(ECHO, Text("hello"), timeout_s=10)
            done += 1

    begun = time.perf_counter()
    await asyncio.gather(*[ask() for _ in range(IN_FLIGHT)])
    return done / (time.perf_counter() - begun)


async def bulk(connection: Connection) -> tuple[float, float]:
    """MB/s to the server, and from it."""
    block = bytes(BODY_BYTES_MAX)
    begun = time.perf_counter()
    async with connection.open(TAKE, Empty(), timeout_s=60) as stream:
        for _ in range(BULK_BYTES // BODY_BYTES_MAX):
            await stream.send(block)
        await stream.end()
        await stream.answer()
    middle = time.perf_counter()
    async with connection.open(GIVE, Empty(), timeout_s=60) as stream:
        while await stream.receive() is not None:
            pass
        await stream.answer()
    return BULK_BYTES / (middle - begun) / 1e6, BULK_BYTES / (time.perf_counter() - middle) / 1e6


def bare_socket() -> float:
    """MB/s of a bare TCP socket on loopback: the limit."""
    listening = socket.create_server(("127.0.0.1", 0))

    def drain() -> None:
        taken, room = listening.accept()[0], bytearray(BODY_BYTES_MAX)
        while taken.recv_into(room):
            pass
        taken.close()

    reader = threading.Thread(target=drain)
    reader.start()
    block = bytes(BODY_BYTES_MAX)
    begun = time.perf_counter()
    with socket.create_connection(listening.getsockname()) as sock:
        for _ in range(BULK_BYTES // BODY_BYTES_MAX):
            sock.sendall(block)
    reader.join()
    listening.close()
    return BULK_BYTES / (time.perf_counter() - begun) / 1e6


async def measure(folder: str, tls_port: int, limit: float) -> None:
    home = Path(folder)
    context = security.client_context(str(home / "node.pem"), str(home / "node.key"), (home / "ca.pem").read_bytes())
    print(f"bare socket: {limit:.0f} MB/s")
    for name, connection in (
        ("plain (Unix socket)", await connect_unix(str(home / "node.sock"), 5)),
        ("TLS 1.3", await connect_tcp("127.0.0.1", tls_port, context, timeout_s=5)),
    ):
        rate = await small_calls(connection)
        to, back = await bulk(connection)
        print(
            f"{name}: {rate:,.0f} round trips/s; bulk {to:.0f} MB/s to the node ({to / limit:.2f} of the limit), "
            f"{back:.0f} from it ({back / limit:.2f})"
        )
        await connection.close()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        ca, ca_key = security.make_ca()
        key, csr = security.make_key_and_csr("bench")
        home = Path(folder)
        (home / "ca.pem").write_bytes(ca)
        (home / "node.key").write_bytes(key)
        (home / "node.pem").write_bytes(security.sign(ca, ca_key, csr, common_name="bench", role=Role.NODE))
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, theirs), daemon=True)
        server.start()
        tls_port = ours.recv()
        uvloop.run(measure(folder, tls_port, bare_socket()))
        ours.send("done")
        server.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())

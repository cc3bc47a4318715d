# idunno/wire/rpc.py: the face of remote calls: a Server to register handlers with, and ways to connect to one.
#
# Rule 1: connecting ends in an admitted Connection or in an error that says who refused what; nothing is left behind.
# Rule 2: whom we talk to is checked (TLS under the CA, then `expect`) before a word is said.
from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from idunno.base.errors import Unauthenticated, Unavailable
from idunno.wire.caller import Connection
from idunno.wire.connection import CLOSE_S, Wire
from idunno.wire.frames import FrameDecoder
from idunno.wire.local import LocalCaller
from idunno.wire.server import Limits, Server, peer_fingerprint, short_path

__all__ = ["Connection", "Limits", "LocalCaller", "Server", "connect_tcp", "connect_unix"]


async def connect_tcp(
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None,
    *,
    expect: Callable[[bytes], None] | None = None,
    timeout_s: float,
) -> Connection:
    """A connection to a node. `expect` gets the SHA-256 of its certificate and raises Unauthenticated if that is wrong.

    Raises Unavailable (nobody answers in time), Unauthenticated (either side refused the other), or what the node says.
    """
    where = f"{host}:{port}"

    def admit(transport: asyncio.BaseTransport) -> None:
        connection.fingerprint = peer_fingerprint(transport)
        if expect is not None:
            expect(connection.fingerprint or b"")

    connection = Connection(where, admit=admit)
    loop = asyncio.get_running_loop()
    times: dict[str, Any] = {}
    if ssl_context is not None:
        times = {"ssl_handshake_timeout": timeout_s, "ssl_shutdown_timeout": CLOSE_S}
    wire = Wire(connection, FrameDecoder(), hold_reading=False)
    made = loop.create_connection(lambda: wire, host, port, ssl=ssl_context, **times)
    return await _connected(connection, wire, made, where, timeout_s)


async def connect_unix(path: str, timeout_s: float) -> Connection:
    """A connection to the node whose Unix socket is at `path`, of any length. Raises as connect_tcp does."""
    connection = Connection(path)
    wire = Wire(connection, FrameDecoder(), hold_reading=False)

    async def made() -> None:
        with short_path(path) as short:
            await asyncio.get_running_loop().create_unix_connection(lambda: wire, short)

    return await _connected(connection, wire, made(), path, timeout_s)


async def _connected(
    connection: Connection, wire: Wire, made: Awaitable[Any], where: str, timeout_s: float
) -> Connection:
    try:
        async with asyncio.timeout(timeout_s):
            await made
            await connection.ready()
    except TimeoutError:
        wire.abort()
        raise Unavailable(
            f"{where} did not answer within {timeout_s:g} s: is the node running and reachable?"
        ) from None
    except ssl.SSLError as error:
        wire.abort()
        raise Unauthenticated(f"{where} is not a node of this cluster, or does not know us: {error.reason}") from None
    except OSError as error:
        wire.abort()
        # Who asks tells these from silence: nobody listens there, or the socket went with its node.
        cause = error if isinstance(error, (ConnectionRefusedError, FileNotFoundError)) else None
        raise Unavailable(f"cannot reach {where}: {error.strerror or error}; is the node running?") from cause
    except UnicodeError:  # a host with an empty or too long part
        wire.abort()
        raise Unavailable(f"cannot reach {where}: no host can have that name") from None
    except BaseException:
        wire.abort()
        raise
    return connection

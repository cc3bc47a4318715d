# idunno/node/reach.py: whether the cluster can reach a newcomer at the address it is going to advertise.
#
# Rule 1: the newcomer listens on that port during the check, over TCP and UDP, and sends back one nonce and nothing else.
# Rule 2: only who holds a valid token for a node can have a node call anywhere, and all that is sent is the nonce.
# Rule 3: the answer names the direction and protocol that fails: that is what a person can mend.
from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, cast

from idunno.base.errors import InvalidArgument, Unauthenticated, Unavailable
from idunno.coordinator.messages import CHECK_ADDRESS, CheckAddress, CheckAddressAnswer
from idunno.coordinator.records import TokenRecord
from idunno.node.config import parse_address
from idunno.wire.calls import Call, Caller, Registrar, Role

NONCE_BYTES: Final = 16
TRY_S: Final = 3.0
"""For each protocol: three round trips to the far side of the world, with a lost packet."""
UDP_AGAIN_S: Final = 0.5


class _Echo(asyncio.Protocol):
    """The newcomer's end over TCP."""

    def __init__(self, nonce: bytes, connections: set[asyncio.Transport]) -> None:
        self._nonce, self._got = nonce, b""
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of asyncio's classes
        self._connections.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._got = (self._got + data)[: NONCE_BYTES + 1]
        if len(self._got) >= NONCE_BYTES:
            if hmac.compare_digest(self._got, self._nonce):
                self._transport.write(self._nonce)
            self._transport.close()


class _EchoDatagram(asyncio.DatagramProtocol):
    """The newcomer's end over UDP."""

    def __init__(self, nonce: bytes) -> None:
        self._nonce = nonce

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if hmac.compare_digest(data, self._nonce):
            self._transport.sendto(data, addr)


class _Asking(asyncio.Protocol, asyncio.DatagramProtocol):
    """The node's end, over either."""

    def __init__(self, nonce: bytes) -> None:
        self._nonce, self._got = nonce, b""
        self.answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._got = (self._got + data)[: NONCE_BYTES + 1]
        if len(self._got) >= NONCE_BYTES:
            self._done(hmac.compare_digest(self._got, self._nonce))

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if hmac.compare_digest(data, self._nonce):
            self._done(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._done(False)

    def _done(self, right: bool) -> None:
        if not self.answered.done():
            self.answered.set_result(right)


@asynccontextmanager
async def answering(host: str, port: int, nonce: bytes) -> AsyncIterator[None]:
    """Answer `nonce` on TCP and UDP of host:port while inside. Raises Unavailable when the port cannot be had."""
    loop = asyncio.get_running_loop()
    connections: set[asyncio.Transport] = set()
    try:
        server = await loop.create_server(lambda: _Echo(nonce, connections), host, port)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror or error}; give another --listen") from None
    try:
        try:
            endpoint, _ = await loop.create_datagram_endpoint(lambda: _EchoDatagram(nonce), local_addr=(host, port))
        except OSError as error:
            text = f"cannot listen on UDP {host}:{port}: {error.strerror or error}; give another --listen"
            raise Unavailable(text) from None
        try:
            yield
        finally:
            endpoint.close()
    finally:
        server.close()
        for connection in list(connections):
            connection.abort()  # from Python 3.12 on, `wait_closed` waits for them too
        await server.wait_closed()


async def check_reachable(cluster: Caller, *, token: str, listen: str, address: str, nonce: bytes) -> None:
    """Have the cluster call back `address`. Raises Unavailable, which says what fails; listens on `listen` meanwhile."""
    host, port = parse_address(listen)
    async with answering(host, port, nonce):
        found = await cluster.call(CHECK_ADDRESS, CheckAddress(token, address, nonce), timeout_s=4 * TRY_S)
    if found.tcp and found.udp:
        raise Unavailable(
            f"the cluster cannot reach this machine at {address}, neither over TCP ({found.tcp}) nor over UDP ({found.udp}): "
            "open the port in the firewall, or give the address that others see with --advertise"
        )
    for failed, why, works in (("TCP", found.tcp, "UDP"), ("UDP", found.udp, "TCP")):
        if why:
            raise Unavailable(
                f"the cluster reaches this machine at {address} over {works}, but not over {failed} ({why}): "
                f"open the port for {failed} in the firewall, or map it for both"
            )


class Reach:
    """The handler on every node. `check_token` gives the token's record, and raises when it is no good."""

    def __init__(self, registrar: Registrar, check_token: Callable[[str, float], Awaitable[TokenRecord]]) -> None:
        self._check_token = check_token
        registrar.register(CHECK_ADDRESS, self._check)

    async def _check(self, call: Call[CheckAddress]) -> CheckAddressAnswer:
        request = call.request
        token = await self._check_token(request.token, call.remaining_s())
        if token.role != Role.NODE.value:
            raise Unauthenticated(f"this token is for a {token.role}: use it with `idunno login`, not `idunno join`")
        host, port = parse_address(request.address)
        if len(request.nonce) != NONCE_BYTES:
            raise InvalidArgument(f"a nonce has {NONCE_BYTES} bytes, not {len(request.nonce)}")
        tcp, udp = await asyncio.gather(
            _why_not(_try_tcp(host, port, request.nonce)), _why_not(_try_udp(host, port, request.nonce))
        )
        return CheckAddressAnswer(tcp, udp)


async def _why_not(attempt: Awaitable[bool]) -> str:
    try:
        async with asyncio.timeout(TRY_S):
            return "" if await attempt else "something else answers there"
    except TimeoutError:
        return f"no answer within {TRY_S:.0f} s"
    except UnicodeError:  # an empty or too long part
        return "no host can have that name"
    except OSError as error:
        return error.strerror or str(error)


async def _try_tcp(host: str, port: int, nonce: bytes) -> bool:
    transport, asking = await asyncio.get_running_loop().create_connection(lambda: _Asking(nonce), host, port)
    try:
        transport.write(nonce)
        return await asking.answered
    finally:
        transport.abort()


async def _try_udp(host: str, port: int, nonce: bytes) -> bool:
    transport, asking = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Asking(nonce), remote_addr=(host, port)
    )
    try:
        while True:
            transport.sendto(nonce)
            done, _ = await asyncio.wait([asking.answered], timeout=UDP_AGAIN_S)
            if done:
                return asking.answered.result()
    finally:
        transport.close()

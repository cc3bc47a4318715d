# idunno/client/dial.py: opening a door, and getting the key to one: `idunno login`.
#
# Rule 1: the first word to an unknown server is not trusted: it brings a CA, which must have the fingerprint that the
#         token carries. The token itself is sent only over a second connection, verified under that CA.
# Rule 2: who comes through a Unix socket does not load the cryptography: 10 MiB and 50 ms for nothing.
# Rule 3: a login is complete or not there: its files are written aside and renamed together, for this user alone (0700, 0600).
# Rule 4: the key is on disk before the cluster hears of it. Where that ends half-way, by a full disk or a kill, the name is taken
#         there by a key that nobody else has: the next login with that name goes on with it, and gets the same certificate.
from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from idunno.base.errors import IdunnoError, Unauthenticated, Unavailable, Unconfirmed
from idunno.base.ids import check_label
from idunno.base.naming import naming
from idunno.client.locate import LOGIN_FILE, Door, Login, Place, SocketDoor, login_directory, parse_address
from idunno.client.session import Dial, Link
from idunno.coordinator.messages import ENROLL, HELLO, Enroll, EnrollAnswer, Hello
from idunno.wire.rpc import connect_tcp, connect_unix

AGAIN_S: Final = 0.5
"""Between attempts to enrol: an election takes about a second."""


def dialer(place: Place) -> Dial:
    """How the doors of `place` are opened."""
    context: ssl.SSLContext | None = None

    async def dial(door: Door, timeout_s: float) -> Link:
        nonlocal context
        if isinstance(door, SocketDoor):
            return await connect_unix(str(door.path), timeout_s=timeout_s)
        if context is None:
            from idunno.wire.security import client_context

            assert place.login is not None, "a TCP door without a login"
            login = place.login
            context = client_context(
                str(login / "client.pem"), str(login / "client.key"), (login / "ca.pem").read_bytes()
            )
        try:
            return await connect_tcp(door.host, door.port, context, expect=None, timeout_s=timeout_s)
        except Unauthenticated as error:
            raise Unauthenticated(
                f"{error}; if that cluster was recovered or made anew: `idunno login {door.host}:{door.port} --token TOKEN`"
            ) from None

    return dial


async def login(address: str, token: str, name: str, at_home: Path, timeout_s: float) -> Login:
    """Get a certificate for this user from the cluster behind `address` and keep it below `at_home`.

    Raises InvalidArgument (a damaged token), Unauthenticated (another cluster's, expired, revoked), Unavailable.
    """
    from idunno.wire.security import client_context, fingerprint, make_key_and_csr
    from idunno.wire.tokens import parse_token

    host, port = parse_address(address)
    parsed = parse_token(token)
    check_label("user", name)
    first = await connect_tcp(host, port, client_context(None, None, None), expect=None, timeout_s=timeout_s)
    try:
        hello = await first.call(HELLO, Hello(), timeout_s=timeout_s)
    except Unconfirmed as error:  # a question: nothing has happened
        raise Unavailable(str(error)) from None
    finally:
        await first.close()
    if fingerprint(hello.ca_pem) != parsed.ca_fingerprint:
        raise Unauthenticated(f"{address} does not belong to the cluster that this token is for: check the address")
    directory = login_directory(at_home, host, port)
    begun = _Begun(directory, parsed.ca_fingerprint, name)
    key_pem, csr_pem = begun.key(lambda: make_key_and_csr(name))
    request = Enroll(token=token, csr_pem=csr_pem, name=name)
    try:
        answer = await _enrolled(host, port, client_context(None, None, hello.ca_pem), request, timeout_s)
    except IdunnoError as error:
        if begun.is_new and not error.may_have_happened:
            begun.end()
        raise
    about = Login(answer.cluster, answer.name, answer.role, address, answer.members)
    files = {
        "ca.pem": hello.ca_pem,
        "client.pem": answer.certificate_pem,
        "client.key": key_pem,
        LOGIN_FILE: msgspec.json.format(msgspec.json.encode(about)),
    }
    _keep(directory, files)
    begun.end()
    return about


class _Key(msgspec.Struct, frozen=True):
    """Of a login that is under way."""

    ca_fingerprint: bytes
    name: str
    key_pem: bytes
    csr_pem: bytes


class _Begun:
    """What a login keeps while it is under way (rule 4)."""

    def __init__(self, directory: Path, ca_fingerprint: bytes, name: str) -> None:
        self.is_new = False  # nobody can know of the key yet
        self._path = directory.with_name(f".{directory.name}.key")
        self._ca_fingerprint, self._name = ca_fingerprint, name

    def key(self, make: Callable[[], tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        """The key and its request of a login that did not come to its end, else what `make` gives. Raises OSError."""
        try:
            before = msgspec.msgpack.decode(self._path.read_bytes(), type=_Key)
            if (before.ca_fingerprint, before.name) == (self._ca_fingerprint, self._name):
                return before.key_pem, before.csr_pem
        except (FileNotFoundError, msgspec.MsgspecError):
            pass  # nothing that anybody could know of
        made = _Key(self._ca_fingerprint, self._name, *make())
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        with naming(self._path):
            _write(self._path, msgspec.msgpack.encode(made))
        self.is_new = True
        return made.key_pem, made.csr_pem

    def end(self) -> None:
        self._path.unlink(missing_ok=True)


async def _enrolled(host: str, port: int, context: ssl.SSLContext, request: Enroll, timeout_s: float) -> EnrollAnswer:
    """Ask until there is an answer: with the same key it is the same one; a later login, with another key, would find the
    name taken."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    unsure: IdunnoError | None = None
    while True:
        left_s = max(AGAIN_S, end_s - loop.time())
        try:
            connection = await connect_tcp(host, port, context, expect=None, timeout_s=left_s)
            try:
                return await connection.call(ENROLL, request, timeout_s=left_s)
            finally:
                await connection.close()
        except IdunnoError as error:
            unsure = error if error.may_have_happened else unsure
            if not error.retryable or loop.time() + AGAIN_S >= end_s:
                raise unsure or error from None
        await asyncio.sleep(AGAIN_S)


def _keep(directory: Path, files: dict[str, bytes]) -> None:
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    tag = secrets.token_hex(6)
    new, old = directory.with_name(f".{tag}.new"), directory.with_name(f".{tag}.old")
    new.mkdir(mode=0o700)
    try:
        for name, content in files.items():
            with naming(directory):
                _write(new / name, content)
        if directory.exists():
            os.rename(directory, old)
        os.rename(new, directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    """A new file, for this user alone, durably."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

# The file of a backup: whole or refused in one line, without a secret unless a passphrase seals it.
from __future__ import annotations

import io
import random

import msgspec
import pytest

from idunno.base.errors import Corrupt, IdunnoError, Incompatible, InvalidArgument, Unauthenticated
from idunno.coordinator import backup as b
from idunno.coordinator import commands as c
from idunno.coordinator.machine import Machine
from idunno.sdfs.hashing import block_id
from tests.unit.coordinator.world import ADMIN, SYSTEM, World, token, user

PASSPHRASE = "correct horse battery"


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b, "SCRYPT_N", 2**8)  # what is expensive on purpose is not what is tested here


def a_world() -> World:
    world = World()
    world.do(c.AddUser(user("alice", i=60), "t-user"), SYSTEM)
    world.do(c.AddToken(token("t-secret", "admin")), ADMIN)
    for n in range(30):
        world.put(f"files/{n}")
    world.do(c.PutSmall("p-tiny", "tiny", block_id(b"tiny content"), b"tiny content"), ADMIN)
    return world


def written(machine: Machine, *, passphrase: str | None = None) -> bytes:
    """A backup as the client writes it."""
    writer = b.Writer()
    head = b.Head(b.FORMAT, machine.roster.cluster, machine.index, machine.now_ms, 1, "test", passphrase is not None)
    parts = [writer.begin(head)]
    for page in b.without_secrets(machine).capture():
        parts += [writer.record(b.MACHINE, page[at : at + 4_000]) for at in range(0, len(page), 4_000)]
    small = b.Small(block_id(b"tiny content"), b"tiny content")
    parts.append(writer.record(b.SMALL, msgspec.msgpack.encode([small])))
    if passphrase is not None:
        keys = b.Keys(b"the CA", b"the key of the CA", machine.roster.users(), machine.roster.tokens())
        sealed = b.seal_keys(msgspec.msgpack.encode(keys), passphrase, head, random.Random(1).randbytes)
        parts.append(writer.record(b.KEYS, sealed))
    return b"".join([*parts, writer.end()])


def read(data: bytes) -> list[tuple[bytes, bytes]]:
    found = list(b.records(io.BytesIO(data).read, "FILE"))
    assert found[0][0] == b.HEAD
    b.decode_head(found[0][1], "FILE")
    return found


def test_what_was_written_is_read() -> None:
    machine = a_world().machine
    found = read(written(machine))
    back = Machine.restore(b"".join(payload for kind, payload in found if kind == b.MACHINE))
    assert back.digest() == b.without_secrets(machine).digest()
    assert [name for name, _ in back.namespace.each()] == [name for name, _ in machine.namespace.each()]
    (smalls,) = (payload for kind, payload in found if kind == b.SMALL)
    assert b.decode_smalls(smalls, "FILE") == [b.Small(block_id(b"tiny content"), b"tiny content")]


def test_the_machine_itself_keeps_its_secrets() -> None:
    machine = a_world().machine
    before = machine.digest()
    b.without_secrets(machine)
    assert machine.digest() == before


def test_no_secret_is_in_it() -> None:
    machine = a_world().machine
    roster = machine.roster
    secrets = [roster.cluster_key]
    secrets += [found.secret_hash for found in roster.tokens()]
    secrets += [found.fingerprint for found in roster.users()]
    assert len(secrets) > 3
    for passphrase in (None, PASSPHRASE):
        data = written(machine, passphrase=passphrase)
        assert not [secret for secret in secrets if secret in data]
        assert b"the key of the CA" not in data
        assert PASSPHRASE.encode() not in data


def test_keys_are_for_who_has_the_passphrase() -> None:
    machine = a_world().machine
    found = read(written(machine, passphrase=PASSPHRASE))
    head = b.decode_head(found[0][1], "FILE")
    assert found[-1][0] == b.KEYS
    keys = b.open_keys(found[-1][1], PASSPHRASE, head, "FILE")
    assert (keys.ca_key_pem, keys.users, keys.tokens) == (
        b"the key of the CA",
        machine.roster.users(),
        machine.roster.tokens(),
    )
    with pytest.raises(Unauthenticated, match="not the passphrase"):
        b.open_keys(found[-1][1], "another passphrase", head, "FILE")
    with pytest.raises(Unauthenticated):  # the keys of another backup
        b.open_keys(found[-1][1], PASSPHRASE, msgspec.structs.replace(head, index=1), "FILE")
    with pytest.raises(InvalidArgument, match="at least 8"):
        b.seal_keys(b"", "short", head, random.Random(1).randbytes)
    huge = msgspec.msgpack.encode({"n": 2**30, "r": 8, "p": 1, "salt": b"", "nonce": b"", "sealed": b""})
    with pytest.raises(Corrupt, match="too much memory"):
        b.open_keys(huge, PASSPHRASE, head, "FILE")


def test_one_flipped_bit_a_byte_less_or_more_and_all_is_refused() -> None:
    data = written(a_world().machine)
    rng = random.Random(5)
    places = {*range(40), *range(len(data) - 60, len(data)), *(rng.randrange(len(data)) for _ in range(400))}
    for at in places:
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        with pytest.raises((Corrupt, Incompatible)) as caught:
            read(bytes(flipped))
        assert "\n" not in str(caught.value)
        with pytest.raises(Corrupt):
            read(data[:at])
    with pytest.raises(Corrupt, match="does not end"):
        read(data + b"x")


def test_records_out_of_order_and_of_other_formats_are_refused() -> None:
    head = b.Head(b.FORMAT, "c" * 32, 1, 1, 1, "test", False)

    def file(*parts: tuple[bytes, bytes], format_: int = b.FORMAT) -> bytes:
        writer = b.Writer()
        begun = writer.begin(msgspec.structs.replace(head, format=format_))
        return begun + b"".join(writer.record(kind, payload) for kind, payload in parts) + writer.end()

    cases: list[tuple[bytes, type[IdunnoError], str]] = [
        (file(format_=7), Incompatible, "format 7"),
        (file((b.KEYS, b"k"), (b.MACHINE, b"m")), Corrupt, "behind its keys"),
        (file((b.HEAD, msgspec.msgpack.encode(head))), Corrupt, "damaged"),
        (b"", Corrupt, "begins otherwise"),
        (b"idunno-machine\n" + bytes(100), Corrupt, "begins otherwise"),
    ]
    for data, kind, text in cases:
        with pytest.raises(kind, match=text):
            read(data)


def test_a_content_that_is_not_what_its_name_says_is_refused() -> None:
    wrong = msgspec.msgpack.encode([b.Small(block_id(b"one"), b"two")])
    for payload in (wrong, b"\xc1", msgspec.msgpack.encode([["x", "y", "z"]])):
        with pytest.raises(Corrupt):
            b.decode_smalls(payload, "FILE")

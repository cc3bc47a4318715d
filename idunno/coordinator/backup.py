# idunno/coordinator/backup.py: the file of `idunno snapshot`: the metadata of a cluster, and small contents, for another cluster.
#
# Rule 1: without a passphrase there is no secret in it: no key, no token, no user.
# Rule 2: each record's checksum covers all before it, and the end holds a digest over everything: a file that was cut, flipped or
#         grew is refused as a whole, before anything is made of it. What a reader allocates is bounded before it is read.
# Rule 3: small contents come behind the rows that mention them, so that neither side holds more than a page.
#
# Layout: magic; records: kind (1 byte), length (u32, big-endian), CRC-32 over kind, length and payload, begun with the one before
# (u32), payload. Kinds: H head, M a piece of the machine's stream (snapshot.py), S small contents, K keys, E end: BLAKE3 of all
# before.
from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from idunno.base.errors import Corrupt, Incompatible, InvalidArgument, Unauthenticated
from idunno.base.ids import BlockId
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import SMALL_BYTES_MAX, TokenRecord, UserRecord
from idunno.coordinator.roster import Roster, RosterState

MAGIC: Final = b"idunno-backup\n"
FORMAT: Final = 1
HEAD, MACHINE, SMALL, KEYS, END = b"H", b"M", b"S", b"K", b"E"
BYTES_MAX: Final = {
    HEAD: 16 * 1024,
    MACHINE: 256 * 1024,
    SMALL: 256 * 1024,
    KEYS: 64 * 1024 * 1024,  # 10,000 users with their certificates are 15 MB
    END: 32,
}
_RECORD: Final = struct.Struct(">cII")
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**16, 8, 1
"""64 MiB and about a fifth of a second for each guess of a passphrase."""
PASSPHRASE_MIN: Final = 8


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    cluster: str
    index: int
    at_ms: int  # machine time
    machine_version: int
    software: str
    keys: bool


class Small(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    block: BlockId
    content: bytes


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who could speak to the cluster, and who said so."""

    ca_pem: bytes
    ca_key_pem: bytes
    users: list[UserRecord]
    tokens: list[TokenRecord]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    n: int
    r: int
    p: int
    salt: bytes
    nonce: bytes
    sealed: bytes


_SMALLS: Final = msgspec.msgpack.Decoder(list[Small])


def without_secrets(machine: Machine) -> Machine:
    """The same machine, but for the cluster's key, its users and tokens. It shares the rest: only to be captured."""
    state = machine.roster.state()
    return _with_roster(machine, RosterState(state.cluster, b"", state.machine_version, state.nodes))


def for_a_report(machine: Machine) -> Machine:
    """The same machine, but for what somebody could use: zeros stand for the cluster's key and the tokens' hashes."""
    state = machine.roster.state()
    tokens = tuple(msgspec.structs.replace(token, secret_hash=bytes(32)) for token in state.tokens)
    return _with_roster(machine, msgspec.structs.replace(state, cluster_key=bytes(32), tokens=tokens))


def _with_roster(machine: Machine, state: RosterState) -> Machine:
    other = Machine()
    vars(other).update(vars(machine))
    other.roster = Roster(state)
    return other


# -- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Bytes of the file, record by record; `end` is the last."""

    def __init__(self) -> None:
        self._hasher, self._crc = blake3(), 0

    def begin(self, head: Head) -> bytes:
        self._hasher.update(MAGIC)
        return MAGIC + self.record(HEAD, msgspec.msgpack.encode(head))

    def record(self, kind: bytes, payload: bytes) -> bytes:
        assert 0 < len(payload) <= BYTES_MAX[kind], f"{len(payload)} bytes of kind {kind!r}"
        self._crc = zlib.crc32(payload, zlib.crc32(kind + len(payload).to_bytes(4, "big"), self._crc))
        data = _RECORD.pack(kind, len(payload), self._crc) + payload
        self._hasher.update(data)
        return data

    def end(self) -> bytes:
        return self.record(END, self._hasher.digest())


def seal_keys(keys: bytes, passphrase: str, head: Head, random: Callable[[int], bytes]) -> bytes:
    """The payload of the keys' record: `keys` (Keys in MessagePack), which only who has the passphrase reads."""
    check_passphrase(passphrase)
    salt, nonce = random(16), random(12)
    sealed = AESGCM(_derive(passphrase, salt, SCRYPT_N, SCRYPT_R, SCRYPT_P)).encrypt(
        nonce, keys, msgspec.msgpack.encode(head)
    )
    return msgspec.msgpack.encode(_Sealed(SCRYPT_N, SCRYPT_R, SCRYPT_P, salt, nonce, sealed))


def check_passphrase(passphrase: str) -> None:
    if len(passphrase) < PASSPHRASE_MIN:
        raise InvalidArgument(f"a passphrase has at least {PASSPHRASE_MIN} characters")


def _derive(passphrase: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(passphrase.encode(), salt=salt, n=n, r=r, p=p, maxmem=256 * 1024 * 1024, dklen=32)


# -- reading ----------------------------------------------------------------------------------------------------------


def records(read: Callable[[int], bytes], what: str) -> Iterator[tuple[bytes, bytes]]:
    """(kind, payload) of each record but the end, which is checked. `read(n)`: up to n bytes, fewer at the end of the file only.

    Raises Corrupt, Incompatible. Only the end of the iteration says that all of it is as it was written.
    """
    magic = read(len(MAGIC))
    if magic != MAGIC:
        raise Corrupt(f"{what} is no backup of `idunno snapshot`: it begins otherwise")
    hasher, crc, at, seen = blake3(MAGIC), 0, len(MAGIC), HEAD
    while True:
        head = read(_RECORD.size)
        if len(head) < _RECORD.size:
            raise Corrupt(f"{what} is cut off at byte {at + len(head)}: take the backup from its original")
        kind, length, wanted = _RECORD.unpack(head)
        if kind not in BYTES_MAX or not 0 < length <= BYTES_MAX[kind] or (kind == HEAD) != (at == len(MAGIC)):
            raise Corrupt(f"{what} is damaged at byte {at}: take the backup from its original")
        payload = read(length)
        if len(payload) < length:
            raise Corrupt(
                f"{what} is cut off at byte {at + _RECORD.size + len(payload)}: take the backup from its original"
            )
        crc = zlib.crc32(payload, zlib.crc32(head[:5], crc))
        if crc != wanted:
            raise Corrupt(f"{what} is damaged at byte {at}: take the backup from its original")
        if kind == END:
            if payload != hasher.digest() or read(1):
                raise Corrupt(f"{what} does not end as it was written: take the backup from its original")
            return
        if seen == KEYS:
            raise Corrupt(f"{what} goes on behind its keys, at byte {at}")
        hasher.update(head + payload)
        at, seen = at + _RECORD.size + length, kind
        yield kind, payload


def decode_head(payload: bytes, what: str) -> Head:
    """Raises Incompatible for another format, Corrupt."""
    try:
        plain = msgspec.msgpack.decode(payload)
        if isinstance(plain, dict) and plain.get("format") != FORMAT:
            raise Incompatible(
                f"{what} has backup format {str(plain.get('format'))[:20]}, this idunno reads {FORMAT}: use the one that wrote it"
            )
        return msgspec.convert(plain, Head)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{what} has a head that this idunno does not know ({error})") from None


def decode_smalls(payload: bytes, what: str) -> list[Small]:
    """Contents, each as its name says. Raises Corrupt."""
    try:
        smalls = _SMALLS.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{what} holds small contents that this idunno does not know ({error})") from None
    for small in smalls:
        if len(small.content) > SMALL_BYTES_MAX or blake3(small.content).hexdigest() != small.block:
            raise Corrupt(f"{what} holds a content that is not {small.block[:16]}")
    return smalls


def open_keys(payload: bytes, passphrase: str, head: Head, what: str) -> Keys:
    """Raises Unauthenticated for a wrong passphrase, Corrupt."""
    try:
        sealed = msgspec.msgpack.decode(payload, type=_Sealed)
        if not (1 < sealed.n <= 2**20 and 0 < sealed.r <= 16 and 0 < sealed.p <= 4):
            raise Corrupt(f"{what} seals its keys in a way that would take too much memory")
        key = _derive(passphrase, sealed.salt, sealed.n, sealed.r, sealed.p)
        plain = AESGCM(key).decrypt(sealed.nonce, sealed.sealed, msgspec.msgpack.encode(head))
        return msgspec.msgpack.decode(plain, type=Keys)
    except InvalidTag:
        raise Unauthenticated(f"this is not the passphrase that the keys in {what} were sealed with") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Corrupt(f"{what} holds keys that this idunno does not know ({error})") from None

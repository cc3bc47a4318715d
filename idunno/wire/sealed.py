# idunno/wire/sealed.py: datagrams that only members can make, read, or replay once.
#
# Rule 1: no nonce is used twice under one key: each (cluster key, node, boot, boot salt) has a subkey of its own (HKDF,
#         RFC 5869), under which a Sealer counts up from 0. The salt is random at each start of the process.
# Rule 2: the head, version byte included, is associated data: nothing in it can be changed.
# Rule 3: a datagram is opened once, and none of an older boot is once a newer boot of its sender was seen (anti-replay window
#         as in RFC 4303, 3.4.3). Only what was authenticated changes any state.
# Rule 4: whatever does not open raises DecodeError, and nothing else.
from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from idunno.base.errors import DecodeError, InvalidArgument
from idunno.base.ids import NodeId

VERSION: Final = 1
DATAGRAM_BYTES_MAX: Final = 1400
"""Fits into one Ethernet packet with room for tunnels, so it is never fragmented."""
SALT_BYTES_MIN: Final = 16
WINDOW: Final = 1024
"""How far behind the newest a datagram may arrive and still be taken: a second of gossip in a cluster of a thousand."""
SENDERS_MAX: Final = 4096
"""Senders remembered, about 500 bytes each; only holders of the cluster key get an entry."""

_HEAD: Final = struct.Struct(">BB8sI16sQ")  # version, mark of the cluster key, sender, boot, salt, counter; big-endian
_TAG_BYTES: Final = 16
_KEY_BYTES: Final = 32
PAYLOAD_BYTES_MAX: Final = DATAGRAM_BYTES_MAX - _HEAD.size - _TAG_BYTES  # 1,346


def _mark(cluster_key: bytes) -> int:
    """One byte of the key's hash: most foreign datagrams are dropped by it, before any cryptography."""
    return hashlib.sha256(b"idunno key mark" + cluster_key).digest()[0]


def _subkey(cluster_key: bytes, sender: bytes, boot: int, salt: bytes) -> AESGCM:
    info = b"idunno datagram" + bytes([VERSION]) + sender + struct.pack(">I", boot)
    return AESGCM(HKDF(hashes.SHA256(), _KEY_BYTES, salt, info).derive(cluster_key))


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")


def _checked(cluster_keys: Sequence[bytes]) -> tuple[bytes, ...]:
    keys = tuple(cluster_keys)
    if not keys or any(len(key) != _KEY_BYTES for key in keys):
        raise InvalidArgument(f"cluster keys have {_KEY_BYTES} bytes, and there is at least one")
    return keys


class Sealer:
    """Seals what one process sends. The first cluster key seals; others may be given, as to an Opener, and are not used."""

    def __init__(self, cluster_keys: Sequence[bytes], me: NodeId, boot: int, boot_salt: bytes) -> None:
        """`me` is 16 hex digits, `boot` below 2**32, `boot_salt` at least SALT_BYTES_MIN random bytes of this start.

        Raises InvalidArgument.
        """
        try:
            self._sender = bytes.fromhex(me)
        except ValueError:
            self._sender = b""
        if len(self._sender) != 8 or not 0 <= boot < 2**32 or len(boot_salt) < SALT_BYTES_MIN:
            raise InvalidArgument(
                f"a sealer needs a node id of 16 hex digits, a boot below 2**32 and {SALT_BYTES_MIN} bytes of salt; "
                f"got {me!r}, {boot}, {len(boot_salt)} bytes"
            )
        self._boot = boot
        self._salt = hashlib.sha256(boot_salt).digest()[:16]
        self._counter = 0
        self._key = b""
        self.rekey(cluster_keys)

    def rekey(self, cluster_keys: Sequence[bytes]) -> None:
        """Seal under the first of these from now on. The counter goes on, so an old key may come back."""
        key = _checked(cluster_keys)[0]
        if key != self._key:
            self._key, self._key_mark = key, _mark(key)
            self._cipher = _subkey(key, self._sender, self._boot, self._salt)

    def seal(self, payload: bytes) -> bytes:
        """The datagram, at most DATAGRAM_BYTES_MAX. Raises InvalidArgument for more than PAYLOAD_BYTES_MAX of payload."""
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise InvalidArgument(f"a datagram carries at most {PAYLOAD_BYTES_MAX} bytes, not {len(payload)}")
        head = _HEAD.pack(VERSION, self._key_mark, self._sender, self._boot, self._salt, self._counter)
        sealed = self._cipher.encrypt(_nonce(self._counter), payload, head)
        self._counter += 1
        return head + sealed


class _Window:
    """Which counters of one sender were seen: the newest, and a bit for each of the WINDOW up to it."""

    __slots__ = ("_bits", "_newest")

    def __init__(self) -> None:
        self._newest, self._bits = -1, 0  # bit i: counter _newest - i

    def seen(self, counter: int) -> bool:
        """Seen, or too old to tell."""
        age = self._newest - counter
        return age >= 0 and (age >= WINDOW or bool(self._bits >> age & 1))

    def add(self, counter: int) -> None:
        ahead = counter - self._newest
        if ahead > 0:
            self._bits = (self._bits << ahead | 1) & (1 << WINDOW) - 1 if ahead < WINDOW else 1
            self._newest = counter
        else:
            self._bits |= 1 << -ahead


@dataclass(slots=True)
class _Sender:
    boot: int
    salt: bytes
    window: _Window = field(default_factory=_Window)
    ciphers: dict[bytes, AESGCM] = field(default_factory=dict)  # by cluster key


class Opener:
    """Opens what members have sealed under any of the cluster keys."""

    def __init__(self, cluster_keys: Sequence[bytes]) -> None:
        self._senders: OrderedDict[bytes, _Sender] = OrderedDict()  # the one heard least recently first
        self.rekey(cluster_keys)

    def rekey(self, cluster_keys: Sequence[bytes]) -> None:
        """Open under these keys from now on: the new and, for a while, the old. What was seen stays seen."""
        self._keys = [(_mark(key), key) for key in _checked(cluster_keys)]
        known = {key for _, key in self._keys}
        for sender in self._senders.values():
            sender.ciphers = {key: cipher for key, cipher in sender.ciphers.items() if key in known}

    def open(self, datagram: bytes) -> tuple[NodeId, int, bytes]:
        """(sender, its boot, payload) of a datagram that a member sealed and that was not opened before.

        Raises DecodeError for everything else.
        """
        if not _HEAD.size + _TAG_BYTES <= len(datagram) <= DATAGRAM_BYTES_MAX:
            raise DecodeError(f"datagram of {len(datagram)} bytes")
        version, mark, sender, boot, salt, counter = _HEAD.unpack_from(datagram)
        if version != VERSION:
            raise DecodeError(f"datagram of version {version}, this node reads {VERSION}")
        known = self._senders.get(sender)
        if known is not None and (boot, salt) != (known.boot, known.salt):
            if boot <= known.boot:
                raise DecodeError(f"datagram of boot {boot}, boot {known.boot} of that sender was seen")
            known = None
        if known is not None and known.window.seen(counter):
            raise DecodeError("datagram seen before, or too late to tell")
        state = known or _Sender(boot, salt)
        payload = self._decrypt(datagram, mark, sender, state, counter)
        state.window.add(counter)
        self._senders[sender] = state
        self._senders.move_to_end(sender)
        if len(self._senders) > SENDERS_MAX:
            self._senders.popitem(last=False)
        return NodeId(sender.hex()), boot, payload

    def _decrypt(self, datagram: bytes, mark: int, sender: bytes, state: _Sender, counter: int) -> bytes:
        head, sealed = datagram[: _HEAD.size], datagram[_HEAD.size :]
        for key_mark, key in self._keys:
            if key_mark != mark:
                continue
            cipher = state.ciphers.get(key) or _subkey(key, sender, state.boot, state.salt)
            try:
                payload = cipher.decrypt(_nonce(counter), sealed, head)
            except InvalidTag:
                continue
            state.ciphers[key] = cipher
            return payload
        raise DecodeError("datagram not sealed under this cluster's key")

# idunno/wire/tokens.py: the text that lets somebody in once: "idunno-" and 120 characters.
#
# Rule 1: a token carries the CA's fingerprint, so the joiner knows whom it talks to before it sends the secret.
# Rule 2: the cluster stores the hash of the secret only. The secret has 256 random bits, so a plain SHA-256 is enough.
# Rule 3: a mistyped token is told from an unknown one by its checksum, without asking anybody.
from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Final, Protocol

from idunno.base.errors import InvalidArgument, Unauthenticated

PREFIX: Final = "idunno-"
_FORMAT: Final = 1
_ID_BYTES, _SECRET_BYTES, _CA_BYTES, _CHECK_BYTES = 6, 32, 32, 4
_BYTES: Final = 1 + _ID_BYTES + _SECRET_BYTES + _CA_BYTES + _CHECK_BYTES  # 75: 120 characters of base32, no padding
_TEXT_MAX: Final = 512  # characters looked at, spaces and all


class Entropy(Protocol):
    """Where secrets come from: the `secrets` module, or a test's own."""

    def token_bytes(self, nbytes: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class ParsedToken:
    token_id: str  # 12 hex digits, public
    secret: bytes  # 32
    ca_fingerprint: bytes  # 32, SHA-256 of the CA certificate's DER


def make_token(ca_fingerprint: bytes, rng: Entropy = secrets) -> tuple[str, str, bytes]:
    """A new token: its text (shown once), its public id, and the hash of its secret (stored)."""
    assert len(ca_fingerprint) == _CA_BYTES
    token_id, secret = rng.token_bytes(_ID_BYTES), rng.token_bytes(_SECRET_BYTES)
    content = bytes([_FORMAT]) + token_id + secret + ca_fingerprint
    text = PREFIX + base64.b32encode(content + _checksum(content)).decode("ascii").lower()
    return text, token_id.hex(), hash_secret(secret)


def parse_token(text: str) -> ParsedToken:
    """What a token's text says; upper or lower case, spaces and line breaks do not matter. Raises InvalidArgument."""
    plain = "".join(text[:_TEXT_MAX].split()).lower()
    if not plain.startswith(PREFIX):
        raise InvalidArgument(f"a token begins with {PREFIX!r}: copy it whole, or make one with `idunno token new`")
    try:
        content = base64.b32decode(plain.removeprefix(PREFIX).encode("ascii"), casefold=True)
    except (binascii.Error, UnicodeEncodeError):
        content = b""
    if len(content) != _BYTES or _checksum(content[:-_CHECK_BYTES]) != content[-_CHECK_BYTES:]:
        raise InvalidArgument("the token is mistyped or incomplete: copy it again, all 127 characters")
    if content[0] != _FORMAT:
        raise InvalidArgument(f"a token of format {content[0]}, this release reads {_FORMAT}: use the same release")
    token_id, rest = content[1 : 1 + _ID_BYTES], content[1 + _ID_BYTES :]
    return ParsedToken(token_id.hex(), rest[:_SECRET_BYTES], rest[_SECRET_BYTES : _SECRET_BYTES + _CA_BYTES])


def hash_secret(secret: bytes) -> bytes:
    """SHA-256, as stored; compare with hmac.compare_digest."""
    return hashlib.sha256(secret).digest()


def check_ca(token: ParsedToken, ca_fingerprint: bytes) -> None:
    """Whether the CA a node showed is the token's. Raises Unauthenticated: then nothing secret may be sent to it."""
    if not hmac.compare_digest(token.ca_fingerprint, ca_fingerprint):
        raise Unauthenticated(
            f"that node belongs to another cluster (CA {ca_fingerprint.hex()[:16]}, the token names "
            f"{token.ca_fingerprint.hex()[:16]}): check the address, or get a token of its cluster"
        )


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(b"idunno token" + content).digest()[:_CHECK_BYTES]

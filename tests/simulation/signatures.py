# tests/simulation/signatures.py: what stands for signatures and private keys while a world runs, as the trust in `ssl_object`
# stands for TLS.
#
# Rule 1: a request is signed by naming its holder; who shows a certificate is believed. Everything that is asked and answered
#         around it is the shipped code: HELLO, the token, the call back to the newcomer's address, ENROLL, the roster.
# Rule 2: nothing here is drawn by chance, so that a world is still its seed.
from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, Final

from idunno.coordinator import enroll
from idunno.node import keys, lifecycle
from idunno.node.lifecycle import Newcomer
from idunno.wire import security
from idunno.wire.calls import Role

if TYPE_CHECKING:
    from tests.simulation.world import World

CA: Final = b"certificate of the CA"
CA_KEY: Final = b"key of the CA"


def _sign(ca_pem: bytes, ca_key_pem: bytes, csr_pem: bytes, *, common_name: str, role: Role) -> bytes:
    assert (ca_pem, ca_key_pem) == (CA, CA_KEY), "signed with another key than the CA's"
    return b"certificate of %s %s" % (role.value.encode(), common_name.encode())


class Signatures:
    """While entered, the product signs and checks with the stand-ins."""

    def __init__(self, world: World, tls: Any) -> None:
        self._stands = (
            (
                enroll,
                "security",
                SimpleNamespace(
                    fingerprint=security.fingerprint,
                    key_fingerprint=lambda csr_pem: hashlib.sha256(csr_pem).digest(),
                    sign=_sign,
                ),
            ),
            (keys, "is_key_of", lambda ca_pem, key_pem: (ca_pem, key_pem) == (CA, CA_KEY)),
            (lifecycle, "client_context", lambda *_: tls),
            (lifecycle, "_newcomer", self._newcomer),
        )
        self._world = world
        self._before: list[Any] = []

    def _newcomer(self, directory: Path, ca_fingerprint: bytes) -> Newcomer:
        """As if `joining.json` in this machine's directory said so."""
        machine = next(m for m in self._world.by_id.values() if m.name == directory.name)
        return Newcomer(
            ca_fingerprint, machine.id, b"key of " + machine.name.encode(), b"request of " + machine.name.encode()
        )

    def __enter__(self) -> None:
        self._before = [getattr(module, name) for module, name, _ in self._stands]
        for module, name, stand in self._stands:
            setattr(module, name, stand)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for (module, name, _), before in zip(self._stands, self._before, strict=True):
            setattr(module, name, before)

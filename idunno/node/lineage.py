# idunno/node/lineage.py: that a cluster was recovered as another one: how it is proved, and how an old node hears of it.
#
# Rule 1: the proof is signed with the old cluster's CA key. Without a valid one nothing is believed: anybody may answer a Hello.
# Rule 2: only a node that has no leader ends because of it: a majority that works is not stopped by somebody's mistake.
# Rule 3: nobody is asked unless a peer showed a certificate that is not of our CA, and each at most every ASK_S.
from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from idunno.base.errors import Corrupt, IdunnoError, Incompatible
from idunno.base.ids import NodeId
from idunno.coordinator.messages import HELLO, Hello, Succession
from idunno.coordinator.views import iso_time
from idunno.wire.rpc import connect_tcp
from idunno.wire.security import is_signed_by, sign_statement

if TYPE_CHECKING:
    from idunno.node.node import Node

log = logging.getLogger("idunno.node")

RECOVERED_FILE: Final = "recovered.json"
ASK_S: Final = 5.0
"""An old node that comes back alone hears of it within seconds, and nobody is asked often."""
ANSWER_S: Final = 3.0
SUCCESSIONS_MAX: Final = 100
"""Kept of the past: a cluster that was recovered more often has other sorrows."""


def statement(succession: Succession) -> bytes:
    """What is signed."""
    return b"idunno succession\n" + msgspec.msgpack.encode(msgspec.structs.replace(succession, signature=b""))


def signed(succession: Succession, old_ca_key_pem: bytes | None) -> Succession:
    if old_ca_key_pem is None:
        return succession
    return msgspec.structs.replace(succession, signature=sign_statement(old_ca_key_pem, statement(succession)))


def is_proved(succession: Succession, old_ca_pem: bytes) -> bool:
    return is_signed_by(old_ca_pem, statement(succession), succession.signature)


def load_succession(directory: Path) -> tuple[Succession, ...]:
    path = directory / RECOVERED_FILE
    try:
        return tuple(msgspec.json.decode(path.read_bytes(), type=list[Succession]))
    except FileNotFoundError:
        return ()
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path} is damaged ({error}): copy it from another node of the cluster, or delete it") from None


def encode_succession(past: tuple[Succession, ...]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(past[-SUCCESSIONS_MAX:]))


class Lineage:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._asked_s: dict[NodeId, float] = {}  # of the members, so it is bounded
        self._told: set[str] = set()  # successors that the log has been told of

    def refused(self, peer: NodeId) -> None:
        """A peer's certificate is not of our CA, or it does not know ours."""
        now_s = asyncio.get_running_loop().time()
        if self._node.platform.anonymous_tls is None or now_s < self._asked_s.get(peer, -ASK_S) + ASK_S:
            return
        self._asked_s[peer] = now_s
        self._node.spawn(self._ask(peer), "ask who it is")

    async def _ask(self, peer: NodeId) -> None:
        endpoint = self._node.known.endpoint(peer)
        if endpoint is None:
            return
        tls = self._node.platform.anonymous_tls
        try:
            connection = await connect_tcp(endpoint.host, endpoint.port, tls, expect=None, timeout_s=ANSWER_S)
            try:
                answer = await connection.call(HELLO, Hello(), timeout_s=ANSWER_S)
            finally:
                await connection.close()
        except IdunnoError as error:
            log.info("stranger at a member's address says nothing", extra={"node": peer, "error": str(error)})
            return
        self._hear(peer, f"{endpoint.host}:{endpoint.port}", answer.cluster, answer.succeeds)

    def _hear(self, peer: NodeId, address: str, cluster: str, succeeds: tuple[Succession, ...]) -> None:
        identity, ca_pem = self._node.platform.identity, self._node.platform.secrets.ca_pem
        ours = [found for found in succeeds[-SUCCESSIONS_MAX:] if found.cluster == identity.cluster]
        proved = next((found for found in reversed(ours) if is_proved(found, ca_pem)), None)
        if proved is None:
            if cluster != identity.cluster:
                log.warning(
                    "another cluster answers at a member's address",
                    extra={"node": peer, "address": address, "cluster": cluster[:32], "says_it_succeeds": bool(ours)},
                )
            return
        if self._node.driver.leader is not None:
            if proved.successor in self._told:
                return
            self._told.add(proved.successor)  # proved ones only, so these are few
            log.error(
                "this cluster was recovered as another one while it works",
                extra={"successor": proved.successor, "address": address, "at": iso_time(proved.at_ms)},
            )
            return
        self._node.fail(Incompatible(outlived(proved, address)))


def outlived(found: Succession, address: str) -> str:
    """For a node of the old identity: what happened, and what to do."""
    return (
        f"cluster {found.cluster[:8]} was recovered as {found.successor[:8]} at {iso_time(found.at_ms)}, entry {found.index}, "
        f"and this node was not part of that; to have it back with its blocks: `idunno token new --role node` there, then "
        f"`idunno join {address} --adopt --token TOKEN --dir DIR` here"
    )

# idunno/node/lifecycle.py: making a node's directory, and joining a cluster with it. What runs it is in running.py.
#
# Rule 1: these functions are synchronous and own their event loop: the command line calls them, one at a time.
# Rule 2: whatever is made half-way can be made again: the identity is written last. A join that was cut off goes on with the
#         key and the node id that it began with: the cluster may know them already, and their name is taken.
from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from idunno.base.errors import Conflict, DeadlineExceeded, Unauthenticated
from idunno.base.ids import NodeId, check_label
from idunno.base.version import VERSION
from idunno.consensus.log import Log
from idunno.coordinator.commands import FORMAT, Entry, Genesis, encode_entry
from idunno.coordinator.electorate import voters_of
from idunno.coordinator.messages import ENROLL, HELLO, Enroll, EnrollAnswer, Hello, MemberAddress
from idunno.coordinator.records import MACHINE_VERSION, NodeRecord, TokenRecord
from idunno.node.config import NodeConfig, parse_address
from idunno.node.disk import RealDisk, ThreadOffload, replace_file
from idunno.node.identity import (
    Identity,
    KnownPeers,
    Secrets,
    check_empty,
    load_identity,
    make_directory,
    new_node_id,
    write_identity,
)
from idunno.node.reach import NONCE_BYTES, check_reachable
from idunno.node.running import run_async
from idunno.wire.calls import Role
from idunno.wire.rpc import connect_tcp
from idunno.wire.security import client_context, fingerprint, make_ca, make_key_and_csr, sign
from idunno.wire.tokens import make_token, parse_token

FIRST_TOKEN_S: Final = 7 * 86_400
"""The token that `init` prints: long enough to carry to the other machines, short enough to forget."""
JOIN_TIMEOUT_S: Final = 30.0
JOINING_FILE: Final = "joining.json"


def make_cluster(directories: list[Path], configs: list[NodeConfig]) -> dict[str, str]:
    """A new cluster: its CA, its first nodes with identical logs, a token to join. Returns {cluster, token}.

    The first `voters_of(n)` nodes vote from the beginning: entry 1, the genesis, is the same bytes in each one's log.
    """
    for directory in directories:
        check_empty(directory)
    ca_pem, ca_key_pem = make_ca()
    cluster, cluster_key = secrets.token_hex(16), secrets.token_bytes(32)
    now_ms = int(time.time() * 1000)
    text, token_id, secret_hash = make_token(fingerprint(ca_pem))
    voters = voters_of(len(configs))
    made: list[tuple[NodeRecord, Secrets]] = []
    for place, config in enumerate(configs):
        node = new_node_id()
        key_pem, csr_pem = make_key_and_csr(node)
        certificate_pem = sign(ca_pem, ca_key_pem, csr_pem, common_name=node, role=Role.NODE)
        record = NodeRecord(
            node=node,
            name=config.name,
            address=config.address,
            fingerprint=fingerprint(certificate_pem),
            voter=place < voters,
            slots=config.slots,
            zone=config.zone,
            software=VERSION,
            since_ms=now_ms,
        )
        held = Secrets(ca_pem, certificate_pem, key_pem, cluster_key, ca_key_pem if record.voter else None)
        made.append((record, held))
    records = tuple(record for record, _ in made)
    token = TokenRecord(
        token=token_id,
        role="node",
        secret_hash=secret_hash,
        expires_ms=now_ms + FIRST_TOKEN_S * 1000,
        created_by="init",
    )
    genesis = Genesis(
        cluster=cluster, nodes=records, cluster_key=cluster_key, tokens=(token,), machine_version=MACHINE_VERSION
    )
    entry = Entry(format=FORMAT, stamp_ms=now_ms, actor="init", role="node", request="", command=genesis)
    payload = encode_entry(entry)
    peers = KnownPeers([_address(record) for record in records])
    for directory, config, (record, held) in zip(directories, configs, made, strict=True):
        make_directory(directory, config, held, peers)
        run_async(_create_log(directory, payload if record.voter else None))
    # Only now do the directories count: a crash before this line leaves nothing that could run.
    for directory, (record, _) in zip(directories, made, strict=True):
        write_identity(directory, Identity(1, cluster, record.node))
    return {"cluster": cluster, "token": text}


def _address(record: NodeRecord) -> MemberAddress:
    return MemberAddress(record.node, record.name, record.address, record.fingerprint, record.voter)


async def _create_log(directory: Path, payload: bytes | None) -> None:
    """A log that begins with the genesis, or an empty one that the leader will fill."""
    offload = ThreadOffload(1, "log")
    try:
        disk = RealDisk(str(directory), offload)
        for entry in await disk.list("log"):  # of an attempt that did not reach its identity
            await disk.remove(f"log/{entry.name}")
        await Log.create(disk, payload)
    finally:
        offload.close()


def init(directory: Path, listen: str, name: str | None = None, advertise: str = "") -> dict[str, str]:
    """A new cluster of this one node. Returns {cluster, node, name, token, directory}."""
    config = NodeConfig(name=name or default_name(listen), listen=listen, advertise=advertise)
    made = make_cluster([directory], [config])
    node = load_identity(directory).node
    return {**made, "node": node, "name": config.name, "address": config.address, "directory": str(directory)}


def join(
    address: str, token: str, directory: Path, listen: str, name: str | None = None, advertise: str = ""
) -> dict[str, str]:
    """Make `directory` a member of the cluster behind `address`. Returns {cluster, node, name, directory}."""
    config = NodeConfig(name=name or default_name(listen), listen=listen, advertise=advertise)
    check_empty(directory)
    return run_async(_join(address, token, directory, config))


class Newcomer(msgspec.Struct, frozen=True):
    """`joining.json`: who a join that is under way will be."""

    ca_fingerprint: bytes
    node: NodeId
    key_pem: bytes
    csr_pem: bytes


def _newcomer(directory: Path, ca_fingerprint: bytes) -> Newcomer:
    """Who this directory began to be when it was last to join that cluster, else somebody new; on disk before it is told."""
    path = directory / JOINING_FILE
    try:
        before = msgspec.json.decode(path.read_bytes(), type=Newcomer)
        if before.ca_fingerprint == ca_fingerprint:
            return before
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        pass  # nothing that anybody could know of
    node = new_node_id()
    key_pem, csr_pem = make_key_and_csr(node)
    made = Newcomer(ca_fingerprint, node, key_pem, csr_pem)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(str(path), msgspec.json.encode(made))
    return made


async def _join(address: str, token: str, directory: Path, config: NodeConfig) -> dict[str, str]:
    newcomer, ca_pem, answer = await enroll(address, token, directory, config)
    config = replace(config, name=answer.name)  # what it was called when it joined for the first time
    held = Secrets(ca_pem, answer.certificate_pem, newcomer.key_pem, answer.cluster_key)
    make_directory(directory, config, held, KnownPeers(answer.members))
    await _create_log(directory, None)
    write_identity(directory, Identity(1, answer.cluster, newcomer.node))
    (directory / JOINING_FILE).unlink()
    return {"cluster": answer.cluster, "node": newcomer.node, "name": config.name, "directory": str(directory)}


async def enroll(
    address: str, token: str, directory: Path, config: NodeConfig, *, before: str = ""
) -> tuple[Newcomer, bytes, EnrollAnswer]:
    """Who was let in, the cluster's CA, and what it answered. Raises DeadlineExceeded: join again with the same directory.

    `before`: the cluster that the directory belonged to; it must be another one (Conflict).
    """
    try:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            return await _enroll(address, token, directory, config, before)
    except TimeoutError:
        raise DeadlineExceeded(
            f"{address} did not let this node in within {JOIN_TIMEOUT_S:g} s; join again with the same --dir"
        ) from None


async def _enroll(
    address: str, token: str, directory: Path, config: NodeConfig, before: str
) -> tuple[Newcomer, bytes, EnrollAnswer]:
    parsed = parse_token(token)
    host, port = parse_address(address)
    # The first word is not trusted: it only brings the CA, which must be the one whose fingerprint the token carries.
    first = await connect_tcp(host, port, client_context(None, None, None), expect=None, timeout_s=10.0)
    try:
        hello = await first.call(HELLO, Hello(), timeout_s=10.0)
    finally:
        await first.close()
    if fingerprint(hello.ca_pem) != parsed.ca_fingerprint:
        raise Unauthenticated(f"{address} does not belong to the cluster that this token is for: check the address")
    if before and hello.cluster == before:  # a node that has only just started does not know its cluster yet
        raise Conflict(
            f"{directory} belongs to this very cluster, {before[:8]}: start it with `idunno node run --dir {directory}`"
        )
    newcomer = _newcomer(directory, parsed.ca_fingerprint)
    second = await connect_tcp(host, port, client_context(None, None, hello.ca_pem), expect=None, timeout_s=10.0)
    try:
        nonce = secrets.token_bytes(NONCE_BYTES)
        await check_reachable(second, token=token, listen=config.listen, address=config.address, nonce=nonce)
        request = Enroll(
            token=token,
            csr_pem=newcomer.csr_pem,
            name=config.name,
            node=newcomer.node,
            address=config.address,
            slots=config.slots,
            zone=config.zone,
            software=VERSION,
        )
        answer = await second.call(ENROLL, request, timeout_s=20.0)
    finally:
        await second.close()
    return newcomer, hello.ca_pem, answer


def default_name(listen: str) -> str:
    import socket

    _, port = parse_address(listen)
    return check_label("node", f"{socket.gethostname().split('.')[0][:50]}-{port}")

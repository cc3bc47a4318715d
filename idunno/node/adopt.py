# idunno/node/adopt.py: `idunno join --adopt`: the directory of another cluster's node becomes a newcomer that keeps its blocks.
#
# Rule 1: nothing of the old identity is used: another node id, an empty log, the new cluster's keys. What was there is put aside.
# Rule 2: a block counts by its content: each is read, and what is not as its name says goes to quarantine/ before the node says
#         that it has anything.
# Rule 3: enrolled first, switched then (switch.py): cut off in between, the same command goes on as the same newcomer.
from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from idunno.consensus.log import Log
from idunno.coordinator.messages import EnrollAnswer
from idunno.coordinator.views import iso_time
from idunno.node import switch
from idunno.node.config import CONFIG_FILE, NodeConfig, load_config, save_config
from idunno.node.disk import RealDisk, ThreadOffload, replace_file, sync_directory
from idunno.node.founding import now_ms
from idunno.node.identity import (
    IDENTITY_FILE,
    PEERS_FILE,
    Identity,
    KnownPeers,
    encode_peers,
    load_identity,
)
from idunno.node.lifecycle import Newcomer, enroll
from idunno.node.recover import locked
from idunno.node.running import run_async
from idunno.node.survivors import blocks_of

NAMES = (IDENTITY_FILE, "log", "ca.pem", "node.pem", "node.key", "cluster.key", PEERS_FILE, CONFIG_FILE)
READ_BYTES = 1024 * 1024


def adopt(
    address: str,
    token: str,
    directory: Path,
    *,
    listen: str | None = None,
    name: str | None = None,
    advertise: str | None = None,
    heard: Callable[[int, int], None] = lambda done, total: None,
    step: switch.Step = switch.quiet,
) -> dict[str, Any]:
    """Make the node of `directory` a member of the cluster behind `address`. Must not be called in a loop.

    `heard(blocks read, blocks in all)`. Returns {cluster, node, name, directory, blocks, quarantined, aside}.
    Raises Conflict, InvalidArgument, and what joining raises.
    """
    with locked([directory]):
        begun = switch.decided(directory)
        if begun is not None:
            switch.finish(directory, step)
            return _answer(directory, begun, 0, 0)
        old = load_identity(directory)
        config = _config(directory, listen, name, advertise)
        step("enrol")
        newcomer, ca_pem, answer = run_async(enroll(address, token, directory, config, before=old.cluster))
        step("read the blocks")
        good, bad = count_blocks(directory, heard)
        parties = [switch.Party(newcomer.node, answer.name)]
        at = iso_time(now_ms())
        aside = f"recovered-from-{old.cluster[:8]}-{at[:19].replace(':', '').replace('-', '')}-{secrets.token_hex(2)}"
        plan = switch.Plan(
            switch.FORMAT, "adopt", secrets.token_hex(8), answer.cluster, old.cluster, parties, aside, list(NAMES), at
        )
        config = replace(config, name=answer.name)
        switch.prepare(directory, plan, lambda place: _fill(place, config, newcomer, ca_pem, answer), step)
        switch.decide(directory, step)
        switch.finish(directory, step)
        return _answer(directory, plan, good, bad)


def _answer(directory: Path, plan: switch.Plan, good: int, bad: int) -> dict[str, Any]:
    identity = load_identity(directory)
    return {
        "cluster": identity.cluster,
        "node": identity.node,
        "name": load_config(directory).name,
        "directory": str(directory),
        "blocks": good,
        "quarantined": bad,
        "aside": plan.aside,
    }


def _config(directory: Path, listen: str | None, name: str | None, advertise: str | None) -> NodeConfig:
    config = load_config(directory)
    return replace(
        config,
        listen=config.listen if listen is None else listen,
        name=config.name if name is None else name,
        advertise=config.advertise if advertise is None else advertise,
    )


def _fill(place: Path, config: NodeConfig, newcomer: Newcomer, ca_pem: bytes, answer: EnrollAnswer) -> None:
    files = {
        "ca.pem": ca_pem,
        "node.pem": answer.certificate_pem,
        "node.key": newcomer.key_pem,
        "cluster.key": answer.cluster_key.hex().encode(),
        PEERS_FILE: encode_peers(KnownPeers(answer.members)),
        IDENTITY_FILE: msgspec.json.format(msgspec.json.encode(Identity(1, answer.cluster, newcomer.node))),
    }
    for name, content in files.items():
        replace_file(str(place / name), content)
    save_config(place, config)
    asyncio.run(_empty_log(place))


async def _empty_log(place: Path) -> None:
    offload = ThreadOffload(1, "log")
    try:
        await Log.create(RealDisk(str(place), offload), None)
    finally:
        offload.close()


def count_blocks(directory: Path, heard: Callable[[int, int], None]) -> tuple[int, int]:
    """How many blocks are as their names say, and how many were not and are in quarantine/ now. Raises OSError."""
    blocks = [directory / "blocks" / block[:2] / block for block, _ in blocks_of(directory)]
    bad = 0
    for count, path in enumerate(blocks, 1):
        digest = blake3()
        with open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
        if digest.hexdigest() != path.name:
            quarantine = directory / "quarantine"
            quarantine.mkdir(mode=0o700, exist_ok=True)
            os.rename(path, quarantine / path.name)
            sync_directory(str(quarantine))
            sync_directory(str(path.parent))
            bad += 1
        heard(count, len(blocks))
    return len(blocks) - bad, bad

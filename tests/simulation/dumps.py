# tests/simulation/dumps.py: a world that begins with the metadata of `idunno dump`: to look at a state, and to go on with it.
#
# Rule 1: every node of the roster is a machine here, with its id, name and boot number, and the dump's machine as its snapshot.
# Rule 2: a world has a CA, keys and addresses of its own. What differs is replaced in the roster (`grafted`), and nothing else;
#         of a world's own dump nothing does, so its machines are equal to the one that was dumped, byte for byte.
from __future__ import annotations

import json
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from idunno.base.ids import NodeId, Term
from idunno.consensus import snapshot as snapshot_file
from idunno.consensus.log import Log
from idunno.coordinator.machine import Machine
from idunno.coordinator.messages import MemberAddress
from idunno.coordinator.records import NodeRecord, TokenRecord
from idunno.coordinator.roster import Roster
from idunno.node.dumping import MACHINE_FILE
from idunno.node.identity import KnownPeers
from idunno.wire.security import fingerprint
from tests.simulation.disk import DiskView
from tests.simulation.machine import BOOT_FILE, CLUSTER, EPOCH_MS, SEGMENT_BYTES, certificate_of
from tests.simulation.signatures import CA_KEY
from tests.simulation.world import _TOKEN, World


@dataclass(frozen=True, slots=True)
class Loaded:
    manifest: dict[str, Any]
    files: dict[str, bytes]  # "n1/raft.json" -> its content

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    def json(self, node: str, part: str) -> Any:
        return json.loads(self.files[f"{node}/{part}.json"])

    def machine(self) -> Machine:
        """A new one each time. Raises AssertionError when the dump holds only a part of it."""
        assert self.manifest["complete"], "only the beginning of the machine is in this dump"
        return Machine.restore(self.files[f"{self.manifest['node']}/{MACHINE_FILE}"])

    @property
    def term(self) -> int:
        return int(self.json(self.manifest["node"], "raft")["term"])


def load(path: Path) -> Loaded:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return Loaded(json.loads(files.pop("manifest.json")), files)


def grafted(machine: Machine) -> Machine:
    """The machine in a world: certificates, cluster and the admin's token are that world's."""
    state = machine.roster.state()
    nodes = tuple(_of_this_world(node) for node in state.nodes)
    if nodes != state.nodes or state.cluster != CLUSTER:
        tokens = (*state.tokens, TokenRecord(_TOKEN, "admin", bytes(32), EPOCH_MS * 2, "init"))
        machine.roster = Roster(msgspec.structs.replace(state, cluster=CLUSTER, nodes=nodes, tokens=tokens))
    return machine


def _of_this_world(node: NodeRecord) -> NodeRecord:
    return msgspec.structs.replace(node, fingerprint=fingerprint(certificate_of(node.name)))


class DumpedWorld(World):
    def __init__(self, loaded: Loaded, seed: int | str, *, watch: bool = False) -> None:
        self.loaded = loaded
        roster = loaded.machine().roster.nodes()
        super().__init__(seed, len(roster), watch=watch)
        for machine, record in zip(self.machines, roster, strict=True):
            machine.id, machine.name, machine.voter = record.node, record.name, record.voter
            machine.certificate = machine.host.certificate = certificate_of(record.name)
            machine.config = replace(machine.config, name=record.name)
        self.by_id = {machine.id: machine for machine in self.machines}

    async def _make_cluster(self) -> None:
        machine = grafted(self.loaded.machine())
        records = machine.roster.nodes()
        addresses = {host.id: host.config.address for host in self.machines}
        peers = KnownPeers([MemberAddress(r.node, r.name, addresses[r.node], r.fingerprint, r.voter) for r in records])
        voters = tuple(sorted(NodeId(r.node) for r in records if r.voter))
        head = snapshot_file.Head(machine.index, Term(max(1, self.loaded.term)), voters, machine.index)
        for host, record in zip(self.machines, records, strict=True):
            host.prepare(peers, machine.roster.cluster_key, CA_KEY if host.voter else None)
            host.disk.put(BOOT_FILE, b"%d" % record.boot)
            disk = DiskView(host.disk, serial=False)
            await Log.create(disk, None, segment_bytes=SEGMENT_BYTES)
            await snapshot_file.write(disk, snapshot_file.NEW_PATH, head, _pages(machine))
            await snapshot_file.replace(disk, snapshot_file.NEW_PATH)


async def _pages(machine: Machine) -> AsyncIterator[bytes]:
    for page in machine.capture():
        yield page

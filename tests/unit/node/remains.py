# tests/unit/node/remains.py: directories of nodes that do not run, with logs and contents as a test wants them.
from __future__ import annotations

import asyncio
import copy
import os
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import snapshot as snapshot_file
from idunno.consensus.events import HardState
from idunno.consensus.log import Log
from idunno.consensus.messages import Entry as LogEntry
from idunno.coordinator import commands as c
from idunno.coordinator import snapshot as snapshots
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import Block
from idunno.node.config import NodeConfig
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.node.identity import load_identity
from idunno.node.lifecycle import make_cluster
from idunno.sdfs.hashing import block_id
from idunno.sdfs.small import SmallStore

START_MS = 4_000_000_000_000  # behind any clock, for machine time never goes back


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is synced and no space is reserved: these tests kill no machine, and would do little but wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
    monkeypatch.setattr("idunno.node.disk._allocate", lambda descriptor, length: None)


class Remains:
    """A cluster of `nodes` that was made, and whose logs are written by hand."""

    def __init__(self, top: Path, nodes: int, *, port: int = 901) -> None:
        self.directories = [top / f"n{i + 1}" for i in range(nodes)]
        configs = [NodeConfig(name=f"n{i + 1}", listen=f"127.0.0.1:{port + i}") for i in range(nodes)]
        self.cluster = make_cluster(self.directories, configs)["cluster"]
        self.ids = [load_identity(directory).node for directory in self.directories]

    def copied(self, top: Path) -> Remains:
        """The same once more, elsewhere."""
        made = copy.copy(self)
        made.directories = [top / directory.name for directory in self.directories]
        for source, target in zip(self.directories, made.directories, strict=True):
            shutil.copytree(source, target)
        return made

    def append(self, places: Iterable[int], entries: list[tuple[int, bytes]], *, behind: int | None = None) -> None:
        """Add entries (term, payload) to these nodes' logs; `behind`: in the place of what stands behind that entry."""
        for place in places:
            asyncio.run(_append(self.directories[place], entries, behind))

    def hold(self, place: int, content: bytes) -> Block:
        """A block on that node's disk."""
        block = block_id(content)
        path = self.directories[place] / "blocks" / block[:2] / block
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return Block(block, len(content))

    def keep_small(self, place: int, content: bytes) -> None:
        asyncio.run(_keep_small(self.directories[place], content))

    def cut(self, place: int) -> None:
        """The node takes a snapshot of all that its log holds, and lets the log go."""
        asyncio.run(_cut(self.directories[place]))


def entry(command: c.Command, *, at_s: int = 0, actor: str = "alice", role: str = "admin", request: str = "") -> bytes:
    return c.encode_entry(c.Entry(c.FORMAT, START_MS + at_s * 1000, actor, role, request, command))


def put(name: str, blocks: tuple[Block, ...], *, at_s: int = 0) -> list[bytes]:
    size = sum(block.size for block in blocks)
    return [
        entry(c.BeginPut(f"put-{name}", name), at_s=at_s),
        entry(c.CommitPut(f"put-{name}", name, size, blocks), at_s=at_s),
    ]


def put_small(name: str, content: bytes) -> bytes:
    return entry(c.PutSmall(f"put-{name}", name, block_id(content), content))


def machine_of(directory: Path) -> tuple[Machine, int]:
    """What a node that starts here begins with, snapshot and log, and the term of the last entry."""
    return asyncio.run(_machine_of(directory))


async def _at_once(work, /):  # type: ignore[no-untyped-def]
    return work()


async def _append(directory: Path, entries: list[tuple[int, bytes]], behind: int | None) -> None:
    offload = ThreadOffload(1, "test")
    disk = RealDisk(str(directory), offload)
    try:
        reader = await snapshot_file.Reader.open(disk, snapshot_file.PATH)
        await reader.close()
        place = (reader.head.index, reader.head.term)
    except LookupError:
        place = None
    log = await Log.open(disk, snapshot=place)
    first = (log.terms.last if behind is None else behind) + 1
    log.stage(Index(first), [LogEntry(Term(term), payload) for term, payload in entries])
    await log.flush()
    log.hard = HardState(max(log.hard.term, Term(entries[-1][0])))
    await log.close()
    offload.close()


async def _keep_small(directory: Path, content: bytes) -> None:
    offload = ThreadOffload(1, "test")
    store = SmallStore(RealDisk(str(directory), offload), _at_once)
    await store.open()
    store.keep(block_id(content), content)
    await store.close()
    offload.close()


async def _machine_of(directory: Path) -> tuple[Machine, int]:
    offload = ThreadOffload(1, "test")
    disk = RealDisk(str(directory), offload)
    machine, place = Machine(), None
    try:
        reader = await snapshot_file.Reader.open(disk, snapshot_file.PATH)
        content = snapshots.Reader()
        async for piece in reader.content():
            content.feed(piece)
        machine, place = Machine.restored(content), (reader.head.index, reader.head.term)
        await reader.close()
    except LookupError:
        pass
    log = await Log.open(disk, snapshot=place)
    for index in range(machine.index + 1, log.terms.last + 1):
        (payload,) = await log.read(index, index)
        machine.apply(Index(index), payload)
    await log.close()
    offload.close()
    return machine, int(log.terms.last_term)


async def _cut(directory: Path) -> None:
    machine, term = await _machine_of(directory)
    offload = ThreadOffload(1, "test")
    disk = RealDisk(str(directory), offload)
    voters = tuple(sorted(NodeId(node.node) for node in machine.roster.nodes() if node.voter))
    head = snapshot_file.Head(machine.index, Term(term), voters, Index(0))

    async def pieces() -> AsyncIterator[bytes]:
        for piece in machine.capture():
            yield piece

    await snapshot_file.write(disk, snapshot_file.NEW_PATH, head, pieces())
    await snapshot_file.replace(disk, snapshot_file.NEW_PATH)
    log = await Log.open(disk, snapshot=(head.index, head.term))
    await log.roll()
    await log.forget(head.index)
    await log.close()
    offload.close()

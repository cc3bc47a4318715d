# idunno/sdfs/views.py: looking at files: stat, ls, versions, where, store.
#
# Rule 1: what is said of names and versions is linearizable: it is read after everything acknowledged before. Where blocks are
#         is the leader's knowledge of the moment.
# Rule 2: every answer fits one message: pages and bounds, said so by `more`.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from idunno.base.errors import Corrupt, IdunnoError, InvalidArgument, NotReady, Unavailable
from idunno.base.ids import BlockId, NodeId
from idunno.coordinator.machine import Machine
from idunno.coordinator.permissions import check_read, may_read
from idunno.coordinator.records import Block, NodeRecord, VersionRecord
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.hashing import block_id
from idunno.sdfs.messages import (
    LIST,
    READ_BLOCK,
    STAT,
    STORE,
    VERSIONS,
    WHERE,
    BlockCopies,
    ByName,
    FileInfo,
    List,
    ListAnswer,
    ListRow,
    ReadBlock,
    Stat,
    StatAnswer,
    Store,
    StoreAnswer,
    StoreRow,
    VersionRow,
    VersionsAnswer,
    WhereAnswer,
    WhereBlock,
)
from idunno.sdfs.ports import Coordination
from idunno.sdfs.rules import iso
from idunno.sdfs.small import SmallStore
from idunno.sdfs.where import Where
from idunno.wire.answering import left_s
from idunno.wire.calls import Call, Lane, Peers, Registrar, Role

log = logging.getLogger("idunno.sdfs")

ROWS_MAX: Final = 1_000
"""Rows in one answer: with the longest names still below a header's 1 MiB."""
VERSIONS_BLOCKS_MAX: Final = 10_000
"""Blocks whose holders are looked up for one list of versions; the list ends there."""
SLICE_NAMES: Final = 100
"""Names looked at in one turn of the loop: with 40 blocks each about a millisecond."""
SLICE_VERSIONS: Final = 500
"""Versions looked at in one turn of the loop: with a block each less than a millisecond, with 40 each about two."""
LONG_ROWS_MAX: Final = 100
"""Of a long listing, which looks at each version and block."""
SMALL_S: Final = 2.0
"""For one other node to give a small content."""


class Views:
    def __init__(
        self,
        me: NodeId,
        coordinator: Coordination,
        blocks: BlockStore,
        small: SmallStore,
        peers: Peers,
        where: Where,
    ) -> None:
        self._me, self._coordinator, self._blocks, self._small = me, coordinator, blocks, small
        self._peers, self._where = peers, where

    def register(self, registrar: Registrar) -> None:
        registrar.register(STAT, self.stat)
        registrar.register(LIST, self.ls)
        registrar.register(VERSIONS, self.versions)
        registrar.register(WHERE, self.where)
        registrar.register(STORE, self.store)

    async def _read(self, call: Call[Any]) -> Machine:
        return await self._coordinator.read(left_s(call))

    async def stat(self, call: Call[Stat]) -> StatAnswer:
        request = call.request
        machine = await self._read(call)
        check_read(request.name, call.actor, machine)
        namespace = machine.namespace
        if request.last is not None:
            if not 1 <= request.last <= ROWS_MAX:
                raise InvalidArgument(f"the last {request.last} versions: ask for 1 to {ROWS_MAX}")
            return StatAnswer([_info(request.name, record) for record in namespace.last(request.name, request.last)])
        if request.version is not None:
            record = namespace.version(request.name, request.version)
        elif request.as_of_ms is not None:
            record = namespace.as_of(request.name, request.as_of_ms)
        else:
            record = namespace.latest(request.name)
        if record.small:
            block = record.blocks[0]
            content = await self._content(request.name, block)
            info = _info(request.name, record, [BlockCopies(block.block, block.size, [])], content)
        else:
            told = await self._where.told([block.block for block in record.blocks])
            info = _info(
                request.name, record, [BlockCopies(b.block, b.size, told.get(b.block, [])) for b in record.blocks]
            )
        return StatAnswer([info])

    async def _content(self, name: str, block: Block) -> bytes:
        """A small file's bytes: from this node, or else from whoever has them; then they are kept here again."""
        content = await self._small.get(block.block)
        if content is not None:
            return content
        problems: list[str] = []
        for node in self._where.everybody(block.block):
            if node == self._me:
                continue
            try:
                content = await self._content_from(node, block)
            except IdunnoError as error:
                problems.append(f"{node}: {error}")
                continue
            self._small.keep(block.block, content)
            log.info("small content fetched", extra={"block": block.block, "node": node})
            return content
        raise Unavailable(
            f"{name} cannot be read: its content is not on this node, and {'; '.join(problems) or 'on no other'}"
        )

    async def _content_from(self, node: NodeId, block: Block) -> bytes:
        request = ReadBlock(block.block, 0, block.size, local_only=True)
        async with self._peers.to(node, Lane.BULK).open(READ_BLOCK, request, timeout_s=SMALL_S) as stream:
            item = await stream.receive()  # one item: a small content is smaller than a frame
            content = bytes(item.body) if item is not None else b""
            await stream.answer()
        if block_id(content) != block.block:
            raise Corrupt(f"node {node} sent other bytes than block {block.block[:16]}")
        return content

    async def ls(self, call: Call[List]) -> ListAnswer:
        request = call.request
        machine = await self._read(call)
        limit = max(1, min(request.limit, LONG_ROWS_MAX if request.long else ROWS_MAX))
        rows: list[ListRow] = []
        turns = _Turns()
        after, more = request.after, True
        while more and not rows:  # a page with nothing for this actor's eyes is no end
            names, more = machine.namespace.names(request.prefix, after, limit, system=request.system)
            seen = [(name, machine.namespace.history(name)) for name in names if may_read(name, call.actor, machine)]
            for name, versions in seen:
                rows.append(await _long_row(name, versions, turns) if request.long else _list_row(name, versions))
            after = names[-1] if names else after
            await asyncio.sleep(0)  # other work first: a listing is in no hurry
        return ListAnswer(rows, more)

    async def versions(self, call: Call[ByName]) -> VersionsAnswer:
        machine = await self._read(call)
        check_read(call.request.name, call.actor, machine)
        records: list[VersionRecord] = []
        blocks = 0
        found = machine.namespace.last(call.request.name, ROWS_MAX + 1)
        for record in found[:ROWS_MAX]:
            blocks += 0 if record.small else len(record.blocks)
            if records and blocks > VERSIONS_BLOCKS_MAX:
                break
            records.append(record)
        large = [block.block for record in records if not record.small for block in record.blocks]
        told = await self._where.told(large)
        roster = machine.roster
        everybody = [n.name for n in roster.nodes() if n.presence == "present"]
        rows = []
        for record in records:
            nodes = dict.fromkeys(node for block in record.blocks for node in told.get(block.block, []))
            replicas = everybody if record.small else sorted(roster.name(node) for node in nodes)
            rows.append(VersionRow(record.version, record.size, iso(record.created_ms), replicas))
        return VersionsAnswer(rows, len(found) > len(records))

    async def where(self, call: Call[ByName]) -> WhereAnswer:
        name = call.request.name
        machine = await self._read(call)
        check_read(name, call.actor, machine)
        record, roster = machine.namespace.latest(name), machine.roster
        recovering = False
        if record.small:  # it came with the log, to every node
            present = [n.node for n in roster.nodes() if n.presence == "present"]
            found = {block.block: present for block in record.blocks}
        else:
            found, recovering = await self._where.known([block.block for block in record.blocks], left_s(call))
        rows = [
            WhereBlock(block.block, block.size, sorted(roster.name(node) for node in found[block.block]))
            for block in record.blocks[:ROWS_MAX]
        ]
        fewest = min((len(found[block.block]) for block in record.blocks), default=0)
        more = len(record.blocks) > ROWS_MAX
        return WhereAnswer(name, record.version, roster.copies_wanted(), fewest, rows, more, recovering)

    async def store(self, call: Call[Store]) -> StoreAnswer:
        """The newest version of each file with a block on the node, asked of that node itself."""
        request = call.request
        machine = await self._read(call)
        node = machine.roster.resolve(request.node) if request.node else machine.roster.node(self._me)
        if node.node != self._me:
            check_present(node)
            onward = Store(node.node, request.after, request.limit)
            actor = None if call.actor.role is Role.NODE else call.actor  # nodes act for users, not for each other
            return await self._peers.to(node.node).call(STORE, onward, timeout_s=left_s(call), actor=actor)
        limit = max(1, min(request.limit, ROWS_MAX))
        rows: list[StoreRow] = []
        turns = _Turns()
        after, more = request.after, True
        while more and len(rows) + SLICE_NAMES <= max(limit, SLICE_NAMES):
            names, more = machine.namespace.names("", after, SLICE_NAMES)
            for name, last in [(name, machine.namespace.last(name, ROWS_MAX)) for name in names]:
                if (row := await self._held_version(name, last, turns)) is not None:
                    rows.append(row)
            after = names[-1] if names else after
            await asyncio.sleep(0)  # other work first: a listing is in no hurry
        return StoreAnswer(node.name, rows, more, after if more else "")

    async def _held_version(self, name: str, newest: Sequence[VersionRecord], turns: _Turns) -> StoreRow | None:
        """The first version of which a block is here."""
        for record in newest:
            await turns.looked_at(1)
            store = self._small if record.small else self._blocks
            if any(block.block in store for block in record.blocks):
                return StoreRow(name, record.version, record.size)
        return None


def check_present(node: NodeRecord) -> None:
    """Raises NotReady for a node that is away: who asks only it need not wait until his time is over."""
    if node.presence != "present":
        raise NotReady(
            f"{node.name} is {node.presence} since {iso(node.since_ms)} ({node.reason}); ask it when it is back, "
            "or see `idunno where NAME` for who else has a file"
        )


class _Turns:
    """Others have their turn after every SLICE_VERSIONS versions that were looked at."""

    def __init__(self) -> None:
        self._versions = 0

    async def looked_at(self, versions: int) -> None:
        self._versions += versions
        if self._versions >= SLICE_VERSIONS:
            self._versions = 0
            await asyncio.sleep(0)


def _list_row(name: str, versions: Sequence[VersionRecord]) -> ListRow:
    last = versions[-1]
    return ListRow(name, last.version, last.size, iso(last.created_ms))


async def _long_row(name: str, versions: Sequence[VersionRecord], turns: _Turns) -> ListRow:
    last, logical, sizes = versions[-1], 0, dict[BlockId, int]()
    for at in range(0, len(versions), SLICE_VERSIONS):
        part = versions[at : at + SLICE_VERSIONS]
        logical += sum(record.size for record in part)
        sizes.update((block.block, block.size) for record in part for block in record.blocks)
        await turns.looked_at(len(part))
    return ListRow(name, last.version, last.size, iso(last.created_ms), len(versions), logical, sum(sizes.values()))


def _info(
    name: str, record: VersionRecord, blocks: list[BlockCopies] | None = None, content: bytes | None = None
) -> FileInfo:
    return FileInfo(name, record.version, record.size, iso(record.created_ms), record.owner, blocks or [], content)

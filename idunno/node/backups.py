# idunno/node/backups.py: `cluster.snapshot`: a node streams the metadata as of a linearizable point to an admin.
#
# Rule 1: the machine is captured between two entries, and given page by page, whatever is applied meanwhile: memory is a page,
#         and what changes while the asker reads. So few at once, and each has its deadline.
# Rule 2: the CA's key is with voters; a node that does not hold it passes the whole question on to the leader.
from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from idunno.base.errors import Exhausted, IdunnoError, NotReady
from idunno.base.ids import BlockId
from idunno.base.version import VERSION
from idunno.coordinator import backup as b
from idunno.coordinator.keeper import holders, small_blocks
from idunno.coordinator.machine import Machine
from idunno.coordinator.messages import TAKE_BACKUP, BackupTaken, TakeBackup
from idunno.wire.calls import Call, Lane

if TYPE_CHECKING:
    from idunno.node.node import Node

AT_ONCE_MAX: Final = 2
READ_S: Final = 30.0
SMALLS_AT_ONCE: Final = 48
"""Contents in a record: they fit it at their largest."""


class Backups:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._running = 0
        node.server.register(TAKE_BACKUP, self._take)

    async def _take(self, call: Call[TakeBackup]) -> BackupTaken:
        if self._running >= AT_ONCE_MAX:
            raise Exhausted(f"{AT_ONCE_MAX} backups are being taken from this node: wait, or ask another node")
        self._running += 1
        try:
            if call.request.keys and self._node.keys.ca_key_pem is None:
                return await self._pass_on(call)
            with self._node.small.pinned():  # for what is deleted for good while this is sent
                return await self._stream(call)
        finally:
            self._running -= 1

    async def _pass_on(self, call: Call[TakeBackup]) -> BackupTaken:
        node = self._node
        leader = node.driver.leader
        if leader is None or leader == node.me or call.peer.node is not None:
            raise NotReady("this node does not hold the CA's key, and no leader is known that does: ask again")
        caller = node.peers.to(leader, Lane.BULK)
        async with caller.open(TAKE_BACKUP, call.request, timeout_s=call.remaining_s(), actor=call.actor) as stream:
            while (item := await stream.receive()) is not None:
                await call.send(item.body, item.note)
            return await stream.answer()

    async def _stream(self, call: Call[TakeBackup]) -> BackupTaken:
        node = self._node
        await node.coordinator.read(min(READ_S, call.remaining_s()))
        machine, missing = node.machine, 0
        roster = machine.roster
        head = b.Head(
            b.FORMAT,
            roster.cluster,
            machine.index,
            machine.now_ms,
            roster.machine_version,
            VERSION,
            call.request.keys,
        )
        files = machine.namespace.files
        keys = self._keys(machine) if call.request.keys else b""
        mentioned: list[BlockId] = []
        pages = _pages(machine, mentioned)  # captured here, with no await since the read
        await call.send(msgspec.msgpack.encode(head), b.HEAD)
        for piece in pages:
            for at in range(0, len(piece), b.BYTES_MAX[b.MACHINE]):
                await call.send(piece[at : at + b.BYTES_MAX[b.MACHINE]], b.MACHINE)
            missing += await self._send_smalls(call, mentioned)
            await asyncio.sleep(0)
        for at in range(0, len(keys), b.BYTES_MAX[b.MACHINE]):
            await call.send(keys[at : at + b.BYTES_MAX[b.MACHINE]], b.KEYS)
        return BackupTaken(head.cluster, head.index, files, missing)

    def _keys(self, machine: Machine) -> bytes:
        ca_key_pem = self._node.keys.ca_key_pem
        assert ca_key_pem is not None
        held = self._node.platform.secrets
        keys = b.Keys(held.ca_pem, ca_key_pem, machine.roster.users(), machine.roster.tokens())
        return msgspec.msgpack.encode(keys)

    async def _send_smalls(self, call: Call[TakeBackup], mentioned: list[BlockId]) -> int:
        """What the last page mentioned; how many of it nobody had."""
        wanted, missing = list(dict.fromkeys(mentioned)), 0
        mentioned.clear()
        store = self._node.small
        lacking = [block for block in wanted if block not in store]
        if lacking:
            with contextlib.suppress(IdunnoError):  # counted below: a backup of the rest is worth having
                await self._node.small_copies.fetch(lacking, holders(self._node.machine))
        for at in range(0, len(wanted), SMALLS_AT_ONCE):
            found: list[b.Small] = []
            for block in wanted[at : at + SMALLS_AT_ONCE]:
                content = await store.get(block)
                if content is None:
                    missing += 1
                else:
                    found.append(b.Small(block, content))
            if found:
                await call.send(msgspec.msgpack.encode(found), b.SMALL)
        return missing


def _pages(machine: Machine, mentioned: list[BlockId]) -> Iterator[bytes]:
    def note(kind: str, record: Any) -> None:
        mentioned.extend(block.block for block in small_blocks(kind, record))

    return b.without_secrets(machine).capture(note)

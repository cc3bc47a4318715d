# idunno/node/dumping.py: `cluster.dump`: state for a bug report, from all nodes that answer.
#
# Rule 1: nothing is waited for that may be what is wrong: no leader, no read, no other node for longer than NODE_S. A node tells
#         what it has; who does not answer, and a part that cannot be told, are named.
# Rule 2: bounded: PART_BYTES_MAX a part, MACHINE_BYTES_MAX of the machine, a few nodes' parts in memory at a time.
# Rule 3: no secret: no key, no token or its hash, no content of any file, small ones included.
from __future__ import annotations

import asyncio
import platform as interpreter
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import msgspec
from blake3 import blake3

from idunno.base.errors import Exhausted, IdunnoError, NotFound
from idunno.base.ids import NodeId
from idunno.base.version import VERSION
from idunno.coordinator import backup
from idunno.coordinator.messages import DUMP, Dump, Dumped, DumpPart
from idunno.coordinator.records import MACHINE_VERSION
from idunno.wire.calls import BODY_BYTES_MAX, Call, Lane, pack

if TYPE_CHECKING:
    from idunno.node.node import Node

NODE_S: Final = 8.0
"""For another node's part: it needs a tenth of a second, or is what the report is about."""
NODES_AT_ONCE: Final = 8
PART_BYTES_MAX: Final = 1024 * 1024
LOG_BYTES_MAX: Final = 256 * 1024
LOG_PATH: Final = "logs/node.jsonl"
MACHINE_BYTES_MAX: Final = 64 * 1024 * 1024
"""The stream of about 300,000 files."""
MACHINE_S: Final = 20.0
MACHINE_FILE: Final = "machine.snapshot"
CUT_FILE: Final = "machine.cut"
"""The beginning of one that was too large, or took too long: to be looked at, not to be loaded."""
AT_ONCE_MAX: Final = 2
_TOKEN: Final = re.compile(rb"idunno-[a-z2-7]{16,}", re.IGNORECASE)

Parts = dict[str, bytes]


class Dumping:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._running = 0
        node.server.register(DUMP, self._dump)

    async def _dump(self, call: Call[Dump]) -> Dumped:
        if self._running >= AT_ONCE_MAX:
            raise Exhausted(f"{AT_ONCE_MAX} dumps are being made by this node: wait, or ask another node")
        self._running += 1
        try:
            return await (self._own(call) if call.request.own else self._gather(call))
        finally:
            self._running -= 1

    async def _own(self, call: Call[Dump]) -> Dumped:
        name = self._node.config.name
        await _send(call, name, await self._parts())
        return Dumped(name, [name], {})

    async def _gather(self, call: Call[Dump]) -> Dumped:
        node, me = self._node, self._node.config.name
        await _send(call, me, await self._parts())
        index, digest, complete = await self._send_machine(call)
        answered, missing = [me], dict[str, str]()
        slots = asyncio.Semaphore(NODES_AT_ONCE)
        sending = asyncio.Lock()  # a file's pieces follow each other

        async def one(other: NodeId, name: str) -> None:
            async with slots:
                try:
                    async with asyncio.timeout(NODE_S):
                        parts = await self._ask(call, other)
                except TimeoutError:
                    missing[name] = f"no answer within {NODE_S:g} s"
                except IdunnoError as error:
                    missing[name] = str(error)[:500]
                else:
                    async with sending:
                        await _send(call, name, parts)
                    answered.append(name)

        others = [(member.node, member.name) for member in node.known.members() if member.node != node.me]
        await asyncio.gather(*(one(other, name) for other, name in others))
        return Dumped(me, sorted(answered), dict(sorted(missing.items())), index, digest, complete)

    async def _ask(self, call: Call[Dump], other: NodeId) -> Parts:
        found: dict[str, bytearray] = {}
        size = 0
        caller = self._node.peers.to(other, Lane.BULK)
        async with caller.open(DUMP, Dump(own=True), timeout_s=NODE_S, actor=call.actor) as stream:
            while (item := await stream.receive()) is not None:
                size += len(item.body)
                if size > 8 * PART_BYTES_MAX:
                    raise Exhausted(f"{size} bytes and more: cut off")
                part = msgspec.msgpack.decode(item.note, type=DumpPart)
                found.setdefault(part.file, bytearray()).extend(item.body)
            await stream.answer()
        return {file: bytes(content) for file, content in found.items()}

    # -- what a node has ----------------------------------------------------------------------------------------------

    async def _parts(self) -> Parts:
        node = self._node
        sources: dict[str, Callable[[], Any]] = {
            "status": lambda: node.seat.own_status(),
            "members": lambda: node.seat.own_members(),
            "events": lambda: node.seat.own_events(),
            "raft": self._raft,
            "queues": self._queues,
            "config": lambda: asdict(node.config),
            "version": lambda: {
                "idunno": VERSION,
                "machine_version": MACHINE_VERSION,
                "python": interpreter.python_version(),
                "system": interpreter.platform(),
                "node": node.me,
                "boot": node.boot,
                "now_ms": node.platform.now_ms(),
            },
        }
        parts: Parts = {}
        for name, source in sources.items():
            try:
                content = msgspec.json.format(msgspec.json.encode(source()))
            except Exception as error:  # noqa: BLE001 - what is broken is what a report is for
                content = msgspec.json.encode({"error": repr(error)[:1_000]})
            parts[f"{name}.json"] = content[:PART_BYTES_MAX]
        parts["log.jsonl"] = await self._log()
        return parts

    def _raft(self) -> dict[str, Any]:
        driver, roster = self._node.driver, self._node.machine.roster
        return {
            "me": self._node.me,
            "leader": driver.leader,
            "term": driver.term,
            "commit": driver.commit,
            "applied": driver.applied_index,
            "last": driver.last_index,
            "snapshot": driver.snapshot_index,
            "voters": sorted(driver.voters),
            "voters_index": driver.voters_index,
            "copies_needed": driver.copies_needed,
            "problem": driver.problem,
            "short_of_space": driver.short_of_space,
            "followers": driver.followers(),
            "roster": [
                [record.node, record.name, record.presence, record.boot, record.voter] for record in roster.nodes()
            ],
        }

    def _queues(self) -> dict[str, Any]:
        node = self._node
        return {
            "tasks": len(asyncio.all_tasks()),
            "connections": node.server.connections,
            "scheduler_waiting": node.scheduler.waiting if node.driver.is_leader else None,
            "scheduler_recovering": node.scheduler.recovering if node.driver.is_leader else None,
            "small_dropped": node.small.dropped,
            "blocks": len(node.blocks),
            "blocks_buffered_bytes": node.blocks.buffered_bytes,
            "blocks_problem": node.blocks.problem,
            "blocks_rotten": node.blocks.rotten,
            "membership": node.membership.counters,
            "clock_skew_ms": node.membership.skew(),
        }

    async def _log(self) -> bytes:
        """The last lines of the node's log, whole ones."""
        try:
            file = await self._node.disk.open(LOG_PATH)
        except (NotFound, IdunnoError):
            return b""
        try:
            size = await file.size()
            start = max(0, size - LOG_BYTES_MAX)
            content = await file.read(start, LOG_BYTES_MAX)
        finally:
            await file.close()
        if start:
            content = content[content.find(b"\n") + 1 :]
        return _TOKEN.sub(b"idunno-(a token)", content)

    async def _send_machine(self, call: Call[Dump]) -> tuple[int, str, bool]:
        """Index, digest, and whether it was sent whole."""
        machine = self._node.machine
        index, hasher, size = int(machine.index), blake3(), 0
        loop = asyncio.get_running_loop()
        end_s = loop.time() + MACHINE_S
        name = self._node.config.name
        sent: list[bytes] = []
        complete = True
        for page in backup.for_a_report(machine).capture():
            size += len(page)
            if size > MACHINE_BYTES_MAX or loop.time() > end_s:
                complete = False
                break
            hasher.update(page)
            sent.append(page)
            await asyncio.sleep(0)
        file = MACHINE_FILE if complete else CUT_FILE
        for page in sent:
            await _send(call, name, {file: page})
        return index, hasher.hexdigest(), complete


async def _send(call: Call[Dump], node: str, parts: Parts) -> None:
    for file, content in parts.items():
        note = pack(DumpPart(node, file))
        for at in range(0, len(content), BODY_BYTES_MAX):
            await call.send(content[at : at + BODY_BYTES_MAX], note)

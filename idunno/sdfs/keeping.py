# idunno/sdfs/keeping.py: what clients ask about keeping and throwing away: retention rules, the trash, scrubs.
#
# Rule 1: any node serves any client; who may do what is decided by the machine (permissions.py), here only what to propose.
# Rule 2: a purge names explicit entries, those the asker owns; pages and commands are bounded, `more` says that there is more.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Final

from idunno.base.errors import IdunnoError, InvalidArgument, Unconfirmed
from idunno.base.ids import NodeId
from idunno.coordinator.commands import Purge, RestoreTrash, SetRetention
from idunno.coordinator.machine import Machine
from idunno.coordinator.names import SYSTEM
from idunno.coordinator.results import Purged, Restored
from idunno.coordinator.trash import TrashEntry
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.messages import (
    EMPTY_TRASH,
    LIST_TRASH,
    RESTORE,
    RETAIN,
    SCRUB,
    EmptyTrash,
    EmptyTrashAnswer,
    ListTrash,
    RestoreAnswer,
    RestoreFile,
    Retain,
    RetainAnswer,
    RetainRow,
    Scrub,
    ScrubAnswer,
    TrashAnswer,
    TrashRow,
)
from idunno.sdfs.ports import Coordination
from idunno.sdfs.rules import iso
from idunno.sdfs.views import check_present
from idunno.wire.answering import left_s
from idunno.wire.calls import Actor, Call, Peers, Registrar, Role

ROWS_MAX: Final = 1_000
VERSIONS_TOLD_MAX: Final = 100
PURGE_VERSIONS_MAX: Final = 1_000
LOOKED_AT_MAX: Final = 2_000
"""Entries of the trash that are looked at in one turn of the loop: about a millisecond."""
ASK_S: Final = 5.0


class Keeping:
    def __init__(
        self, me: NodeId, coordinator: Coordination, peers: Peers, scrub: Callable[[], None], *, config: SdfsConfig
    ) -> None:
        self._me, self._coordinator, self._peers, self._begin_scrub = me, coordinator, peers, scrub
        self._trash_ms = config.trash_ms

    def register(self, registrar: Registrar) -> None:
        registrar.register(RETAIN, self.retain)
        registrar.register(LIST_TRASH, self.list_trash)
        registrar.register(RESTORE, self.restore)
        registrar.register(EMPTY_TRASH, self.empty_trash)
        registrar.register(SCRUB, self.scrub)

    async def retain(self, call: Call[Retain]) -> RetainAnswer:
        request = call.request
        if not request.show:
            if request.prefix.startswith(SYSTEM) and (
                request.versions or request.age_ms
            ):  # nothing there would ever expire
                raise InvalidArgument(
                    f"what is below {SYSTEM} is the system's own and goes with its model or job: no rule holds there"
                )
            command = SetRetention(request.prefix, request.versions, request.age_ms)
            await self._coordinator.propose(command, actor=call.actor, request=request.request, timeout_s=left_s(call))
        try:
            machine = await self._coordinator.read(left_s(call))
        except IdunnoError as error:
            if request.show:
                raise
            raise Unconfirmed(
                f"the rule for {request.prefix} is set; what holds there cannot be read: {error}"
            ) from None
        rules = [
            RetainRow(rule.prefix, rule.owner, rule.versions, rule.age_ms)
            for rule in machine.namespace.retention.rules()
            if rule.prefix.startswith(request.prefix) or request.prefix.startswith(rule.prefix)
        ]
        return RetainAnswer(sorted(rules, key=lambda row: (row.prefix, row.owner)))

    async def list_trash(self, call: Call[ListTrash]) -> TrashAnswer:
        request = call.request
        machine = await self._coordinator.read(left_s(call))
        limit = max(1, min(request.limit, ROWS_MAX))
        found: list[TrashEntry] = []
        async for entry in _entries(machine, request.after):
            if entry.name.startswith(request.prefix):
                found.append(entry)
                if len(found) > limit:
                    break
        return TrashAnswer([self._row(entry) for entry in found[:limit]], len(found) > limit)

    def _row(self, entry: TrashEntry) -> TrashRow:
        return TrashRow(
            entry.entry,
            entry.name,
            [record.version for record in entry.versions[-VERSIONS_TOLD_MAX:]],
            sum(record.size for record in entry.versions),
            iso(entry.at_ms),
            entry.by,
            entry.expired,
            iso(entry.at_ms + self._trash_ms),
        )

    async def restore(self, call: Call[RestoreFile]) -> RestoreAnswer:
        command = RestoreTrash(call.request.name)
        done, _ = await self._coordinator.propose(
            command, actor=call.actor, request=call.request.request, timeout_s=left_s(call)
        )
        assert isinstance(done, Restored)
        return RestoreAnswer(done.name, done.versions)

    async def empty_trash(self, call: Call[EmptyTrash]) -> EmptyTrashAnswer:
        machine = await self._coordinator.read(left_s(call))
        entries, last, more = await _owned(machine, call.request, call.actor)
        if not entries:
            return EmptyTrashAnswer(0, 0)
        done, _ = await self._coordinator.propose(
            Purge(entries), actor=call.actor, request=call.request.request, timeout_s=left_s(call)
        )
        assert isinstance(done, Purged)
        return EmptyTrashAnswer(done.versions, done.size, more, last)

    async def scrub(self, call: Call[Scrub]) -> ScrubAnswer:
        roster = self._coordinator.machine.roster
        if call.request.node:
            node = roster.resolve(call.request.node)
            if node.node == self._me:
                self._begin_scrub()
                return ScrubAnswer([node.name])
            check_present(node)
            actor = None if call.actor.role is Role.NODE else call.actor
            timeout_s = min(ASK_S, left_s(call))
            return await self._peers.to(node.node).call(SCRUB, Scrub(node.node), timeout_s=timeout_s, actor=actor)
        present = [record for record in roster.nodes() if record.presence == "present"]
        answers = await asyncio.gather(*(self._ask_scrub(record.node, left_s(call)) for record in present))
        begun = [record.name for record, why in zip(present, answers, strict=True) if not why]
        failed = [f"{record.name}: {why}" for record, why in zip(present, answers, strict=True) if why]
        failed += [f"{away.name}: it is {away.presence}" for away in roster.nodes() if away.presence != "present"]
        return ScrubAnswer(begun, failed)

    async def _ask_scrub(self, node: NodeId, left_s: float) -> str:
        """Why it did not begin, "" when it did."""
        if node == self._me:
            self._begin_scrub()
            return ""
        try:
            await self._peers.to(node).call(SCRUB, Scrub(node), timeout_s=min(ASK_S, left_s))
        except IdunnoError as error:
            return str(error)
        return ""


async def _entries(machine: Machine, after: int) -> AsyncIterator[TrashEntry]:
    """Of the trash, the oldest first: those behind entry `after` that are there when their turn comes."""
    while some := list(islice(machine.namespace.trash.entries.behind(after), LOOKED_AT_MAX)):
        for entry in some:
            yield entry
        after = some[-1].entry
        await asyncio.sleep(0)  # a million of them may be others'


async def _owned(machine: Machine, request: EmptyTrash, actor: Actor) -> tuple[tuple[int, ...], int, bool]:
    """Entries that are asked for and that the actor may purge, for one command; the last looked at; whether there are more."""
    prefix, last = request.prefix, request.after
    found: list[int] = []
    versions = 0
    async for entry in _entries(machine, request.after):
        if entry.name.startswith(prefix) and (actor.may(Role.ADMIN) or entry.versions[-1].owner == actor.name):
            versions += len(entry.versions)
            if found and versions > PURGE_VERSIONS_MAX:
                return tuple(found), last, True
            found.append(entry.entry)
        last = entry.entry
    return tuple(found), last, False

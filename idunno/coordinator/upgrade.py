# idunno/coordinator/upgrade.py: `idunno upgrade`: the cluster's machine version follows what all of its nodes know.
#
# Rule 1: nodes say themselves what they know, asked one by one: a log that older nodes read cannot hold it.
# Rule 2: one that does not answer may be of any release: the version is raised when all nodes of the roster have answered.
# Rule 3: a release that does not know the question knows machine version 1.
from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from idunno.base.errors import Conflict, IdunnoError, Incompatible, NotLeader
from idunno.base.version import VERSION
from idunno.coordinator.client import Coordinator
from idunno.coordinator.commands import RaiseVersion
from idunno.coordinator.messages import KNOWS, UPGRADE, UPGRADE_CHECK, Knows, Upgrade, UpgradeAnswer, UpgradeNode
from idunno.coordinator.records import NodeRecord
from idunno.wire.answering import left_s
from idunno.wire.calls import Actor, Call, Empty, Method, Peers, Registrar

ASK_S: Final = 3.0
AT_ONCE: Final = 64
"""Nodes asked at once: a thousand take some seconds."""


class Upgrades:
    """Registers its handlers. `problem` says why this node takes no part in the consensus, "" when it does."""

    def __init__(
        self, coordinator: Coordinator, peers: Peers, server: Registrar, *, problem: Callable[[], str] = lambda: ""
    ) -> None:
        self._coordinator, self._peers, self._problem = coordinator, peers, problem
        server.register(KNOWS, self._knows)
        server.register(UPGRADE_CHECK, lambda call: self._at_leader(UPGRADE_CHECK, call))
        server.register(UPGRADE, lambda call: self._at_leader(UPGRADE, call))

    async def _knows(self, call: Call[Empty]) -> Knows:
        return self._own()

    def _own(self) -> Knows:
        return Knows(VERSION, self._coordinator.machine.supports, self._problem())

    async def _at_leader(self, method: Method[Upgrade, UpgradeAnswer], call: Call[Upgrade]) -> UpgradeAnswer:
        coordinator, check = self._coordinator, method is UPGRADE_CHECK or call.request.check

        async def here(timeout_s: float) -> UpgradeAnswer:
            found = await self.look(timeout_s)
            return found if check else await self._raise(found, call.actor, call.request.request, timeout_s)

        if call.peer.node is not None and not call.peer.local:
            if coordinator.driver.leader != coordinator.me:
                raise NotLeader(f"{coordinator.me} does not lead")
            return await here(left_s(call))
        return await coordinator.ask_leader(
            method, call.request, here, timeout_s=left_s(call), actor=call.actor, again=True
        )

    async def look(self, timeout_s: float) -> UpgradeAnswer:
        """What every node knows. Raises NotLeader, NoQuorum."""
        machine = await self._coordinator.read(timeout_s)
        version, records = machine.roster.machine_version, machine.roster.nodes()
        gate = asyncio.Semaphore(AT_ONCE)

        async def ask(record: NodeRecord) -> Knows | IdunnoError:
            async with gate:
                return await self._ask(record)

        answers = await asyncio.gather(*(ask(record) for record in records))
        newest = max((a.supports for a in answers if isinstance(a, Knows)), default=version)
        nodes = [_row(record, answer, newest) for record, answer in zip(records, answers, strict=True)]
        held = [node for node in nodes if node.why]
        if held:
            shown = "; ".join(f"{node.name}: {node.why}" for node in held[:8])
            why = f"{len(held)} of {len(nodes)} nodes are not ready for machine version {newest}: {shown}"
        elif newest > version:
            why = f"all {len(nodes)} nodes know machine version {newest}: `idunno upgrade` raises it from {version}"
        else:
            why = f"machine version {version} is the newest that the nodes know: there is nothing to do"
        return UpgradeAnswer(version, newest, not held, False, why, nodes)

    async def _ask(self, record: NodeRecord) -> Knows | IdunnoError:
        if record.node == self._coordinator.me:
            return self._own()
        try:
            return await self._peers.to(record.node).call(KNOWS, Empty(), timeout_s=ASK_S)
        except Incompatible:
            return Knows(record.software, 1)
        except IdunnoError as error:
            return error

    async def _raise(self, found: UpgradeAnswer, actor: Actor, request: str, timeout_s: float) -> UpgradeAnswer:
        if not found.ready:
            raise Conflict(found.why)
        if found.next <= found.version:
            return found
        await self._coordinator.propose_here(
            RaiseVersion(found.next), actor=actor, request=request, timeout_s=timeout_s
        )
        why = f"the machine version is {found.next} now: releases that do not know it cannot take part any more"
        return UpgradeAnswer(found.next, found.next, True, True, why, found.nodes)


def _row(record: NodeRecord, answer: Knows | IdunnoError, newest: int) -> UpgradeNode:
    if isinstance(answer, IdunnoError):
        why = f"it does not answer ({answer}): start it, or `idunno remove {record.name}`"
        return UpgradeNode(record.name, record.node, record.software, 0, why)
    why = answer.problem
    if answer.supports < newest:
        why = f"idunno {answer.software or '(unknown)'} knows machine version {answer.supports}: upgrade it and restart it"
    return UpgradeNode(record.name, record.node, answer.software, answer.supports, why)

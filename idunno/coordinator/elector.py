# idunno/coordinator/elector.py: the leader's part in who votes: it looks twice a second, and takes one step at a time.
#
# Rule 1: a step is taken by what this leader sees itself (who has its log, who answers), never by gossip.
# Rule 2: a node holds the CA's key before it votes: any voter may lead, and the leader signs.
# Rule 3: when a node is out of the roster, and gets no more of the log, the cluster's key is renewed.
# Rule 4: a step that fails is tried again, by the rule as it is then (electorate.py).
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from idunno.base.errors import IdunnoError
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.driver import RaftDriver
from idunno.coordinator.client import Coordinator
from idunno.coordinator.commands import RenewClusterKey
from idunno.coordinator.electorate import Change, next_change
from idunno.coordinator.messages import CA_KEY, CaKey
from idunno.wire.calls import Actor, Peers, Role

log = logging.getLogger("idunno.coordinator")

CHECK_S: Final = 0.5
"""A learner that synced, within this, all that was committed at the check before is caught up: the rest of its lag is less
than half an election timeout (Raft thesis, 4.2.1)."""
ANSWERS_MS: Final = 500
"""A learner that was heard within this answers."""
STEP_S: Final = 10.0
KEY_S: Final = 5.0
REFUSED_S: Final = 10.0
"""A node that did not take the CA's key is asked again after this."""


class Elector:
    """`new_key` makes a cluster key (32 bytes); `silent_s`: how long a voter may be silent before it is replaced."""

    def __init__(
        self,
        coordinator: Coordinator,
        driver: RaftDriver,
        peers: Peers,
        *,
        ca_key_pem: Callable[[], bytes | None],
        new_key: Callable[[], bytes],
        silent_s: float,
    ) -> None:
        self._driver, self._peers, self._coordinator = driver, peers, coordinator
        self._machine, self._me, self._new_key = coordinator.machine, coordinator.me, new_key
        self._ca_key_pem, self._silent_ms = ca_key_pem, silent_s * 1000
        self._leaving: dict[NodeId, int] = {}  # node -> how many ask
        self._task: asyncio.Task[None] | None = None
        self._term = Term(0)
        self._wake = asyncio.Event()

    def role_changed(self, is_leader: bool, term: Term) -> None:
        self._end()
        if is_leader:
            self._term = term
            self._task = asyncio.get_running_loop().create_task(self._lead(term), name="elector")

    async def stop(self) -> None:
        task = self._task
        self._end()
        if task is not None:
            await asyncio.wait({task})

    def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def begin_leaving(self, node: NodeId) -> None:
        """It is not to vote, until `end_leaving`."""
        self._leaving[node] = self._leaving.get(node, 0) + 1
        self._wake.set()

    def end_leaving(self, node: NodeId) -> None:
        self._leaving[node] -= 1
        if not self._leaving[node]:
            del self._leaving[node]

    def _leads(self, term: Term) -> bool:
        return self._driver.is_leader and self._driver.term == term

    async def _lead(self, term: Term) -> None:
        mark = Index(0)
        keyed: set[NodeId] = set()
        refused: dict[NodeId, float] = {}
        while self._leads(term):
            try:
                before, mark = mark, self._driver.last_index
                change = self._next(before, refused) if before else None
                # Preparing takes a call: whoever was to vote, or to outvote, may be silent by now.
                prepared = change is not None and await self._prepare(change, keyed, refused)
                if change is not None and prepared and self._next(before, refused) == change:
                    await self._take(change)
                if self._machine.roster.key_is_stale:
                    await self._renew_key()
            except IdunnoError as error:
                log.info("voters not changed", extra={"problem": str(error)})
            except Exception:
                log.exception("elector failed")
            self._wake.clear()
            try:
                async with asyncio.timeout(CHECK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _next(self, mark: Index, refused: dict[NodeId, float]) -> Change | None:
        """`mark`: how far the log went at the check before."""
        voters, followers = self._driver.voters, self._driver.followers()
        now_s = asyncio.get_running_loop().time()
        roster = self._machine.roster.nodes()
        ready = {
            record.node
            for record in roster
            if record.presence == "present"
            and (seen := followers.get(record.node)) is not None
            and not seen.installing
            and seen.silent_ms <= ANSWERS_MS
            and seen.match >= mark
            and refused.get(record.node, 0.0) <= now_s
        }
        silent = {node for node, seen in followers.items() if node in voters and seen.silent_ms >= self._silent_ms}
        away = {node for node, seen in followers.items() if node in voters and seen.silent_ms > ANSWERS_MS}
        names = [record.node for record in roster]
        return next_change(names, voters, self._me, ready=ready, silent=silent, away=away, leaving=self._leaving)

    async def _prepare(self, change: Change, keyed: set[NodeId], refused: dict[NodeId, float]) -> bool:
        """Whether the node has what a voter needs."""
        if not change.joins or change.node in keyed:
            return True
        key = self._ca_key_pem()
        if key is None:
            log.error("this leader lacks the CA's key, and can make no voters")
            refused[change.node] = asyncio.get_running_loop().time() + REFUSED_S
            return False
        try:
            await self._peers.to(change.node).call(CA_KEY, CaKey(key), timeout_s=KEY_S)
        except IdunnoError as error:
            log.warning("node did not take the CA's key", extra={"node_id": change.node, "problem": str(error)})
            refused[change.node] = asyncio.get_running_loop().time() + REFUSED_S
            return False
        keyed.add(change.node)
        return True

    async def _renew_key(self) -> None:
        command = RenewClusterKey(self._new_key())
        await self._coordinator.propose_here(command, actor=Actor(self._me, Role.NODE), request="", timeout_s=STEP_S)

    async def _take(self, change: Change) -> None:
        voters = self._driver.voters
        log.info("voter joins" if change.joins else "voter goes", extra={"node_id": change.node, "why": change.why})
        await self._driver.change_voters(voters ^ {change.node}, STEP_S)

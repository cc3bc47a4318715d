# idunno/coordinator/digests.py: that all machines are equal, looked at now and then; one that differs says so and stops.
#
# Rule 1: an entry says when: every node captures its machine right behind it, and hashes that in slices, whatever is applied
#         meanwhile.
# Rule 2: a second entry says what it should be: what most voters have. The leader asks them: it may be the one that differs.
# Rule 3: a node that has another digest applies, votes and answers nothing from then on, and does not start again with that log.
from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from blake3 import blake3

from idunno.base.errors import IdunnoError
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.driver import RaftDriver
from idunno.consensus.quorum import majority
from idunno.coordinator.client import Coordinator
from idunno.coordinator.commands import SINCE, ConfirmDigest, TakeDigest
from idunno.coordinator.effects import DigestDue, DigestTold, Effect
from idunno.wire.calls import Actor, Call, Method, Peers, Registrar, Role

log = logging.getLogger("idunno.coordinator")

EVERY_S: Final = 300.0
"""A digest costs what a snapshot does: at a million files 1.2 s of processor time, 0.4 %."""
SLICE_S: Final = 0.005
ASK_S: Final = 5.0
PATIENCE_S: Final = 60.0
"""How long voters may take to hash, above what a million files take on a board."""
PROPOSE_S: Final = 10.0


class AskDigest(msgspec.Struct, frozen=True):
    index: Index


class DigestAnswer(msgspec.Struct, frozen=True):
    digest: bytes  # empty: not known (yet)


DIGEST: Final = Method("coordinator.digest", AskDigest, DigestAnswer, Role.NODE)


class Digests:
    """Registers its handler. `differs(why)` is called once, when this node's machine is not what the others have."""

    def __init__(
        self,
        coordinator: Coordinator,
        driver: RaftDriver,
        peers: Peers,
        server: Registrar,
        *,
        differs: Callable[[str], None],
        every_s: float = EVERY_S,
    ) -> None:
        self._coordinator, self._driver, self._peers = coordinator, driver, peers
        self._differs, self._every_s = differs, every_s
        self._index, self._digest = Index(0), b""  # the newest, empty until it is hashed
        self._told: dict[Index, bytes] = {}  # what the newest should be, when that came first
        self._hashing: asyncio.Task[None] | None = None
        self._leading: asyncio.Task[None] | None = None
        self._hashed = asyncio.Event()
        self._taken = Index(0)  # of a leader: the last entry that was asked about
        server.register(DIGEST, self._asked)

    async def stop(self) -> None:
        tasks = [task for task in (self._hashing, self._leading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- every node -------------------------------------------------------------------------------------------------

    def follow(self, index: Index, effect: Effect) -> None:
        if isinstance(effect, DigestDue):
            if self._hashing is not None:
                self._hashing.cancel()  # a replay: only the newest matters
            self._index, self._digest, self._told = index, b"", {}
            self._hashed.clear()
            pieces = self._coordinator.machine.capture()
            self._hashing = asyncio.get_running_loop().create_task(self._hash(index, pieces), name="digest")
            self._hashing.add_done_callback(_log_failure)
        elif isinstance(effect, DigestTold) and effect.of == self._index:
            self._told[effect.of] = effect.digest
            self._compare()

    async def _hash(self, index: Index, pieces: Iterator[bytes]) -> None:
        hasher, now_s = blake3(), asyncio.get_running_loop().time
        end_s = now_s() + SLICE_S
        for piece in pieces:
            hasher.update(piece)
            if now_s() >= end_s:
                await asyncio.sleep(0)
                end_s = now_s() + SLICE_S
        self._digest = hasher.digest()
        self._hashed.set()
        self._compare()

    def _compare(self) -> None:
        told = self._told.get(self._index)
        if told is not None and self._digest and told != self._digest:
            self._told = {}
            self._differs(
                f"the machine of this node differs from the others' behind entry {self._index}: its digest is "
                f"{self._digest.hex()[:16]}, theirs {told.hex()[:16]}"
            )

    async def _asked(self, call: Call[AskDigest]) -> DigestAnswer:
        return DigestAnswer(self._digest if call.request.index == self._index else b"")

    # -- the leader -------------------------------------------------------------------------------------------------

    def role_changed(self, is_leader: bool, term: Term) -> None:
        if self._leading is not None:
            self._leading.cancel()
            self._leading = None
        if is_leader:
            self._leading = asyncio.get_running_loop().create_task(self._lead(), name="digests")
            self._leading.add_done_callback(_log_failure)

    async def _lead(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            machine = self._coordinator.machine
            if machine.roster.machine_version < SINCE[TakeDigest] or machine.index <= self._taken:
                continue  # nothing was applied since the last one
            try:
                await self.check()
            except IdunnoError as error:
                log.info("machines not compared", extra={"problem": str(error)})

    async def check(self) -> bool:
        """Have all nodes compare their machines now; whether it came to that. Raises what proposing raises."""
        actor = Actor(self._coordinator.me, Role.NODE)
        taken = await self._coordinator.propose_here(TakeDigest(), actor=actor, request="", timeout_s=PROPOSE_S)
        index = Index(taken.index)
        digest = await self._agreed(index)
        if digest is None:
            log.warning("machines not compared: no digest is that of most voters", extra={"index": index})
            return False
        told = await self._coordinator.propose_here(
            ConfirmDigest(index, digest), actor=actor, request="", timeout_s=PROPOSE_S
        )
        self._taken = Index(told.index)
        log.info("machines compared", extra={"index": index, "digest": digest.hex()[:16]})
        return True

    async def _agreed(self, index: Index) -> bytes | None:
        """The digest that a majority of the voters has; None when none has one in time."""
        end_s = asyncio.get_running_loop().time() + PATIENCE_S
        found: dict[NodeId, bytes] = {}
        pause_s = 0.1
        while asyncio.get_running_loop().time() < end_s and self._index == index:
            voters = sorted(self._driver.voters)
            waiting = [node for node in voters if node not in found]
            for node, digest in zip(
                waiting, await asyncio.gather(*(self._ask(n, index) for n in waiting)), strict=True
            ):
                if digest:
                    found[node] = digest
            counts = Counter(found[node] for node in voters if node in found).most_common(1)
            if counts and counts[0][1] >= majority(len(voters)):
                return counts[0][0]
            if len(found) == len(voters):
                return None
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, ASK_S)
        return None

    async def _ask(self, node: NodeId, index: Index) -> bytes:
        if node == self._coordinator.me:
            return self._digest if self._index == index else b""
        try:
            return (await self._peers.to(node).call(DIGEST, AskDigest(index), timeout_s=ASK_S)).digest
        except IdunnoError as error:
            log.debug("no digest", extra={"node_id": node, "problem": str(error)})
            return b""


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("digests failed", exc_info=error, extra={"task": task.get_name()})

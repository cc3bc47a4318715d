# idunno/consensus/readmission.py: how a node whose disk is an old image, or whose log lost what it had acknowledged, comes back.
#
# Such a node has forgotten promises: votes, and acknowledged entries. Its word may count again when nothing that it can have
# promised is missing on its disk, or matters any more. The argument is in docs/consensus.md, "Coming back".
#
# Rule 1: that its log is an old one is on its disk (`log/readmission`) before anything else is done about it, and stays there
#         until the log is whole. A process that finds it copies the leader's log and promises nothing: what it answers bears
#         `silent`, and no majority counts it.
# Rule 2: a leader hears it only as long as no other process of that node has answered for QUIET_MS, and only under a boot number
#         above all that were seen. It drops the words of all earlier processes first; then it has an entry committed, by a
#         majority that this node is no part of. That entry is younger than every promise that was forgotten.
# Rule 3: with that entry synced here, the disk is as good as any: the process shows its claim like one that has just started.
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from typing import Final

import msgspec

from idunno.base.disk import Disk
from idunno.base.errors import Conflict, Corrupt, IdunnoError, NotFound, NotLeader
from idunno.base.ids import NodeId, Term
from idunno.consensus.driver import RaftDriver
from idunno.consensus.messages import READMIT, Readmit, ReadmitAnswer
from idunno.consensus.standing import Run, Witness, sealed, unsealed
from idunno.wire.calls import Call, Lane, Peers, Switchboard

log = logging.getLogger("idunno.consensus")

PATH: Final = "log/readmission"
CLAIM_PATH: Final = "log/claim"
FILE_BYTES_MAX: Final = 64 * 1024
FORMAT: Final = 1
QUIET_MS: Final = 3_000
"""How long no other process of the node may have answered a leader: twenty heartbeats."""
ASK_AGAIN_S: Final = 0.5
ANSWER_S: Final = 5.0
"""For an entry to be committed."""
STANDS_STILL_S: Final = 10.0
"""When no entry came for so long the leader is asked anew: it may hear another process of this node by now. Twice ANSWER_S."""
COPY_S: Final = 30.0
"""When another process of this node answers the leader for so long, this one is the copy."""


class _Saved(msgspec.Struct, frozen=True):
    format: int
    why: str
    term: Term = Term(0)


class Readmission:
    """`begin_again` ends this process in favour of one whose boot number is above the one given; `is_copy` is told that the node
    runs elsewhere. `boot_seen`: a node's boot number in the roster."""

    def __init__(
        self,
        me: NodeId,
        driver: RaftDriver,
        peers: Peers,
        server: Switchboard,
        disk: Disk,
        witness: Witness,
        *,
        run: int,
        boot_seen: Callable[[NodeId], int],
        name: Callable[[NodeId], str],
        begin_again: Callable[[int], None],
        is_copy: Callable[[str], None],
    ) -> None:
        self._me, self._driver, self._peers, self._disk = me, driver, peers, disk
        self._witness, self._run, self._boot_seen, self._name = witness, run, boot_seen, name
        self._begin_again, self._is_copy = begin_again, is_copy
        self.why = ""
        """Why this disk's log is an old one; "" if it is not, as far as is known."""
        self._term = Term(0)  # in which this node once was, as who refused it knows
        self._turn = 0
        server.register(READMIT, self._readmit)

    # -- the node that comes back -------------------------------------------------------------------------------------

    async def open(self) -> None:
        """At start. Raises DiskFailed."""
        try:
            saved = unsealed(await self._disk.read_all(PATH, bytes_max=FILE_BYTES_MAX), _Saved, PATH)
            self.why, self._term = saved.why, saved.term
        except NotFound:
            return
        except Corrupt as error:  # that it is there says enough
            self.why = str(error)

    async def found_old(self, why: str, term: Term) -> None:
        """Another refuses this process, and knows that it once was in `term`: end it in favour of one that knows."""
        self.why = why
        while True:
            try:
                await self._disk.replace(PATH, sealed(_Saved(FORMAT, why, term)))
                break
            except IdunnoError as error:  # until it is there a restart would show its claim again, and be refused again
                log.warning("not remembered that the log is an old one", extra={"problem": str(error)})
                await asyncio.sleep(ASK_AGAIN_S)
        self._begin_again(0)

    async def become_whole(self, voters: Callable[[], Collection[NodeId]]) -> None:
        """Copy the log until nothing that was ever promised is missing. `voters`: whom to ask while no leader is known."""
        # No leader of an earlier term than it was in has it back: who refused it would again. So that one stands anew, above it.
        self._driver.copy(self._term)
        log.warning("log is an old one: it is brought up to date before it counts again", extra={"why": self.why})
        loop = asyncio.get_running_loop()
        copy_since_s: float | None = None
        while True:
            answer = await self._ask(voters())
            if answer.index:
                self._say(f"it copies the log, up to entry {answer.index}: ")
                if await self._copied(answer):
                    break
                continue
            if answer.boot:
                self._begin_again(answer.boot)
            copy_since_s = (copy_since_s or loop.time()) if answer.alive else None
            if copy_since_s is not None and loop.time() - copy_since_s >= COPY_S:
                self._is_copy(answer.why)
            self._say(f"{answer.why}: ")
            await asyncio.sleep(ASK_AGAIN_S)
        await self._forget()

    def _say(self, waits_for: str) -> None:
        driver = self._driver
        self._driver.unproved(
            f"its log was an old one ({self.why}); it comes back by itself when that is whole again; "
            f"{waits_for}it has {driver.durable[1]} entries of {max(driver.commit, driver.durable[1])} that it knows of"
        )

    async def _ask(self, voters: Collection[NodeId]) -> ReadmitAnswer:
        others = [self._driver.leader] if self._driver.leader is not None else sorted(set(voters) - {self._me})
        if not others:
            return ReadmitAnswer(why="no other node votes, so nobody can confirm what its log lacks")
        self._turn += 1
        node = others[self._turn % len(others)]
        assert node is not None
        try:
            return await self._peers.to(node, Lane.CONSENSUS).call(READMIT, Readmit(self._run), timeout_s=ANSWER_S)
        except IdunnoError as error:
            if self._driver.leader is None:
                return ReadmitAnswer(
                    why="it waits for a leader, elected by a majority of the voters without it; if there can be none (`idunno "
                    "status` at the others), stop all and run `idunno recover` with all nodes' directories"
                )
            return ReadmitAnswer(why=f"{self._name(node)}, which leads, does not help yet ({error})")

    async def _copied(self, answer: ReadmitAnswer) -> bool:
        """Wait until the log has that entry; False: ask anew, for this leader is gone and the entry may be cut away here, or
        nothing comes."""
        loop, leader = asyncio.get_running_loop(), self._driver.leader
        durable, since_s = self._driver.durable, loop.time()
        while not self._driver.holds(answer.term, answer.index):
            if self._driver.durable != durable:
                durable, since_s = self._driver.durable, loop.time()
            if self._driver.leader != leader or loop.time() - since_s >= STANDS_STILL_S:
                return False
            await asyncio.sleep(ASK_AGAIN_S)
            self._say(f"it copies the log, up to entry {answer.index}: ")
        return True

    async def _forget(self) -> None:
        """The claim of the old log first: without it, and with the other file, the next start would begin this anew."""
        while True:
            try:
                for path in (CLAIM_PATH, PATH):
                    with contextlib.suppress(NotFound):
                        await self._disk.remove(path)
                    await self._disk.sync_directory("log")
                break
            except IdunnoError as error:
                self._say(f"its disk refuses ({error}): ")
                await asyncio.sleep(ASK_AGAIN_S)
        self.why = ""
        log.warning("log is whole again", extra={"index": self._driver.durable[1], "term": self._driver.term})

    # -- the leader -----------------------------------------------------------------------------------------------------

    async def _readmit(self, call: Call[Readmit]) -> ReadmitAnswer:
        sender, run = call.peer.node, Run.of(call.request.run)
        if sender is None:
            raise Conflict("only nodes come back")
        seen = self._driver.followers().get(sender)
        if not self._driver.is_leader or seen is None:
            raise NotLeader(f"{self._name(self._me)} does not lead, or does not send its log to {sender}")
        if self._witness.accepted(sender) != run.number:
            newest = max(Run.of(self._witness.accepted(sender)).boot, self._boot_seen(sender))
            if seen.silent_ms < QUIET_MS:
                why = (
                    f"boot {newest} of it answered {self._name(self._me)}, which leads, "
                    f"within {seen.silent_ms / 1000:.1f} s: another process of this node may run"
                )
                return ReadmitAnswer(why=why, alive=True)
            if run.boot <= newest:
                return ReadmitAnswer(why=f"boot {newest} of it was seen", boot=newest)
            self._witness.believe(sender, run)
            log.warning("node comes back with an old log", extra={"node_id": sender, "boot": run.boot})
        term, index = await self._driver.mark_end(ANSWER_S)
        return ReadmitAnswer(term, index)

# idunno/consensus/vouching.py: the shell around standing.py: who is heard by this node's log, and how this node gets to be heard.
#
# Rule 1: this process takes no part until as many others have accepted its claim as make, with it, a majority of the voters.
#         A lone voter asks those who follow it, and goes on without them after a while.
# Rule 2: whoever is refused by anybody stops: what it said to others may help nobody any more. Its next process brings its log up
#         to date first (readmission.py), and vouches for nobody until then.
# Rule 3: what others acknowledged is saved once a second, and told by the leader to all. What this process claims is saved
#         before it asks, and stays as it is, over restarts, until it is accepted: what the disk takes in meanwhile proves
#         nothing.
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

import msgspec

from idunno.base.disk import Disk
from idunno.base.errors import Conflict, Corrupt, IdunnoError, Incompatible, NotFound, Unavailable
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.driver import RaftDriver
from idunno.consensus.messages import (
    HELLO,
    MARKS,
    RAFT,
    WHO,
    Hello,
    HelloAnswer,
    Marks,
    RaftEnvelope,
    RaftMessage,
)
from idunno.consensus.quorum import majority
from idunno.consensus.readmission import CLAIM_PATH, Readmission
from idunno.consensus.records import REJOIN
from idunno.consensus.standing import Claim, Run, Witness, sealed, unsealed
from idunno.wire.calls import Call, Empty, Lane, Peer, Peers, Switchboard
from idunno.wire.codec import encode

log = logging.getLogger("idunno.consensus")

MARKS_PATH: Final = "log/marks"
FILE_BYTES_MAX: Final = 1024 * 1024
ASK_AGAIN_S: Final = 0.25
"""Between attempts at nodes that do not answer: they are starting too, and an election takes a second."""
HELLO_S: Final = 1.0
ALONE_S: Final = 2.0
"""How long a lone voter waits for those who follow it: longer than a connection takes, short for who has lost them."""
SPREAD_S: Final = 1.0
"""How old an acknowledgement may be that others do not know of and no disk holds."""
SPREAD_ALL_TICKS: Final = 10
"""Marks that have not changed are told again so seldom: for who missed them."""
WHO_S: Final = 0.2


class Vouching:
    """Between the node and its RaftDriver, which begins unproved. Registers its handlers."""

    def __init__(
        self,
        me: NodeId,
        driver: RaftDriver,
        peers: Peers,
        server: Switchboard,
        disk: Disk,
        *,
        run: Run,
        cluster: str,
        members: Callable[[], Collection[NodeId]],
        boot_seen: Callable[[NodeId], int],
        name: Callable[[NodeId], str],
        begin_again: Callable[[int], None],
        is_copy: Callable[[str], None],
    ) -> None:
        """`boot_seen`: a node's boot number in the roster. `begin_again`, `is_copy`: see Readmission."""
        self._me, self._driver, self._peers, self._disk = me, driver, peers, disk
        self._run, self._cluster, self._members = run.number, cluster, members
        self._boot_seen, self._name = boot_seen, name
        self.witness = Witness()
        self.readmission = Readmission(
            me,
            driver,
            peers,
            server,
            disk,
            self.witness,
            run=run.number,
            boot_seen=boot_seen,
            name=name,
            begin_again=begin_again,
            is_copy=is_copy,
        )
        self.proved = asyncio.Event()
        """Others have confirmed this process."""
        self._started = False
        self._claim = Claim(Term(0), Index(0))  # as the disk held it at the start
        self._proving = True  # the claim is on the disk, and not accepted yet
        self._why = ""  # refused
        self._accepted: set[NodeId] = set()
        self._met: frozenset[NodeId] = frozenset()  # who sent something before this process was proved
        self._asking: set[NodeId] = set()
        self._answered = asyncio.Event()
        self._heard_voters: tuple[Index, frozenset[NodeId]] = (Index(0), frozenset())
        self._asked_who: dict[NodeId, float] = {}
        self._told: Marks | None = None
        self._sent: tuple[RaftMessage | None, msgspec.Raw] = (None, msgspec.Raw(b""))  # the last message, encoded
        self._tasks: set[asyncio.Task[None]] = set()
        server.listen(RAFT, self._receive)
        server.register(HELLO, self._hello)
        server.register(WHO, self._who)
        server.register(MARKS, self._marks)

    # -- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """The driver has started. Raises Corrupt, DiskFailed."""
        try:
            with contextlib.suppress(NotFound):
                self.witness.load(await self._read(MARKS_PATH), self._cluster, MARKS_PATH)
        except Corrupt as error:  # one witness less; the others have theirs
            log.error("what others acknowledged is lost here", extra={"problem": str(error)})
        await self.readmission.open()
        if not self.readmission.why:
            await self._begin_claim()
        self._started = True
        self._spawn(self._prove(), "prove")
        self._spawn(self._spread(), "spread marks")

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._started = False

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("vouching failed", exc_info=error, extra={"task": task.get_name()})
            self._driver.refuse(f"{task.get_name()} failed: {error!r}")

    async def _read(self, path: str) -> bytes:
        return await self._disk.read_all(path, bytes_max=FILE_BYTES_MAX)

    # -- this process -----------------------------------------------------------------------------------------------

    async def _begin_claim(self) -> None:
        try:
            self._claim = unsealed(
                await self._read(CLAIM_PATH), Claim, CLAIM_PATH
            )  # an earlier start's, not accepted yet
        except Corrupt as error:
            raise Corrupt(f"{error}; {REJOIN}") from error
        except NotFound:
            self._claim = Claim(*self._driver.durable)
            if not self._is_proved():
                await self._disk.replace(CLAIM_PATH, sealed(self._claim))

    def _hello_message(self) -> Hello:
        return Hello(self._run, self._claim.term, self._claim.index)

    def _voters(self) -> frozenset[NodeId]:
        """By the newest word that was heard: this log may be of a time when others voted, who are gone."""
        index, voters = self._heard_voters
        return voters if index > self._driver.voters_index else self._driver.voters

    def _others(self) -> frozenset[NodeId]:
        """Whom to ask."""
        voters = self._voters()
        return (voters | self._met if voters != {self._me} else frozenset(self._members())) - {self._me}

    def _is_proved(self) -> bool:
        voters = self._voters()
        if voters == {self._me}:
            return self._others() <= self._accepted
        return len((self._accepted | {self._me}) & voters) >= majority(len(voters))

    async def _prove(self) -> None:
        now_s = asyncio.get_running_loop().time
        if self.readmission.why:
            await self.readmission.become_whole(self._others)
            self._claim = Claim(*self._driver.durable)
        begun_s = now_s()
        while not self._is_proved():
            if self._why:
                return
            if self._voters() == {self._me} and now_s() - begun_s >= ALONE_S:
                break
            self._answered.clear()
            for node in sorted(self._others() - self._accepted - self._asking):
                self._asking.add(node)
                self._spawn(self._ask(node), f"ask {node}")
            try:
                async with asyncio.timeout(ASK_AGAIN_S):
                    await self._answered.wait()
            except TimeoutError:
                self._driver.unproved(self._waits_for())
        await self._end_claim()
        if not self._why:
            self._driver.prove()
            self.proved.set()

    def _waits_for(self) -> str:
        voters = self._voters()
        heard = (self._accepted | {self._me}) & voters
        missing = ", ".join(self._name(node) for node in sorted(voters - heard))
        return (
            f"it has just started, and {len(heard)} of {len(voters)} voters, itself included, have confirmed that its log is no "
            f"old one; {majority(len(voters))} are needed; no answer from {missing}"
        )

    async def _end_claim(self) -> None:
        """Before anything is said that binds: from now on the disk may hold more than was claimed."""
        while True:
            try:
                with contextlib.suppress(NotFound):
                    await self._disk.remove(CLAIM_PATH)
                await self._disk.sync_directory("log")
                break
            except IdunnoError as error:
                self._driver.unproved(f"its disk refuses: {error}")
                await asyncio.sleep(ASK_AGAIN_S)
        self._proving = False

    async def _ask(self, node: NodeId) -> None:
        try:
            answer = await self._peers.to(node, Lane.CONSENSUS).call(HELLO, self._hello_message(), timeout_s=HELLO_S)
        except Incompatible:
            answer = HelloAnswer("")  # an older release, which hears everybody
        except IdunnoError as error:
            log.debug("no answer to hello", extra={"node_id": node, "problem": str(error)})
            return
        finally:
            self._asking.discard(node)
        if answer.why:
            if not self._why:
                self._why = answer.why
                self._driver.refuse(f"{self._name(node)} does not hear this node: {answer.why}")
                self._spawn(self.readmission.found_old(answer.why, answer.term), "found old")
        else:
            self._accepted.add(node)
            if answer.voters_index > self._heard_voters[0]:
                self._heard_voters = (answer.voters_index, frozenset(answer.voters))
        self._answered.set()

    async def _who(self, call: Call[Empty]) -> Empty:
        """Somebody does not hear this process, who may have restarted: say hello."""
        node = call.peer.node
        old = self._why or self.readmission.why
        if self._started and node is not None and not old and node not in self._asking:
            self._asking.add(node)
            await self._ask(node)
        return Empty()

    def send(self, node: NodeId, message: RaftMessage) -> None:
        if message is not self._sent[0]:  # an append goes to all, one after another
            self._sent = (message, msgspec.Raw(encode(RaftEnvelope(message, self._run, self._driver.copying))))
        self._peers.to(node, Lane.CONSENSUS).notify(RAFT, self._sent[1])

    # -- the others -------------------------------------------------------------------------------------------------

    def _receive(self, peer: Peer, envelope: RaftEnvelope) -> None:
        sender = peer.node
        if sender is None:
            raise Conflict("raft messages come from nodes only")
        if self._proving and sender not in self._met:
            self._met |= {sender}
        if self._hears(sender, envelope.run):
            self.witness.heard(sender, envelope.message)
            self._driver.receive(sender, envelope.message, counts=not envelope.silent)

    def _hears(self, sender: NodeId, run: int) -> bool:
        if not self._started:
            return False
        if run in (0, self.witness.accepted(sender)):
            return True
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._asked_who.get(sender, 0.0):
            self._asked_who[sender] = now_s + WHO_S
            self._peers.to(sender, Lane.CONSENSUS).notify(WHO, Empty())
        return False

    async def _hello(self, call: Call[Hello]) -> HelloAnswer:
        sender, hello = call.peer.node, call.request
        if sender is None:
            raise Conflict("only nodes say hello")
        if not self._started:
            raise Unavailable("this node is starting: ask again")
        why = self.witness.judge(sender, Run.of(hello.run), Claim(hello.term, hello.index), self._boot_seen(sender))
        if why:
            log.error("node is not heard", extra={"node_id": sender, "name_of_node": self._name(sender), "why": why})
            self._driver.doubt(sender)  # or that of a copy of it: then what the node itself says next counts again
            return HelloAnswer(why, term=self.witness.mark(sender).term)
        if self.readmission.why:
            raise Unavailable("this node's own log is an old one: its word counts for nobody")
        return HelloAnswer(why, sorted(self._driver.voters), self._driver.voters_index)

    async def _marks(self, call: Call[Marks]) -> Empty:
        sender, told = call.peer.node, call.request
        if sender is not None and self._hears(sender, told.run):
            for node, index in told.marks.items():
                if node != self._me:
                    self.witness.learn(node, told.term, index, told.runs.get(node, 0))
        return Empty()

    async def _spread(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(SPREAD_S)
            ticks += 1
            if not self._proving and self._driver.leader is not None:
                self.witness.keep({*self._members(), *self._driver.voters})
                self._greet()
            self._tell(again=ticks % SPREAD_ALL_TICKS == 0)
            if self.witness.changed:
                await self._save()

    def _greet(self) -> None:
        """Voters that have not heard of this process yet: what it says in the next election is not to be lost on them."""
        for node in sorted(self._driver.voters - self._accepted - self._asking - {self._me}):
            self._asking.add(node)
            self._spawn(self._ask(node), f"ask {node}")

    def _tell(self, *, again: bool) -> None:
        """Of a leader."""
        driver = self._driver
        if not driver.is_leader:
            self._told = None
            return
        seen = driver.followers()
        # Who has acknowledged nothing in this term may not even have heard of it.
        marks = {node: seen[node].match for node in sorted(driver.voters) if node in seen and seen[node].match > 0}
        if self._me in driver.voters:
            marks[self._me] = driver.durable[1]
        for node, index in marks.items():
            if node != self._me:
                self.witness.learn(node, driver.term, index)
        runs = {node: self._run if node == self._me else self.witness.accepted(node) for node in marks}
        message = Marks(self._run, driver.term, marks, runs)
        if message == self._told and not again:
            return
        self._told = message
        for node in seen:
            self._peers.to(node, Lane.CONSENSUS).notify(MARKS, message)

    async def _save(self) -> None:
        try:
            await self._disk.replace(MARKS_PATH, self.witness.encode(self._cluster))
        except IdunnoError as error:
            self.witness.changed = True
            log.warning("what others acknowledged is not saved", extra={"problem": str(error)})

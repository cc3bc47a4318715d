# idunno/coordinator/client.py: how every other part of a node asks the coordinator, wherever its leader is.
#
# Rule 1: a command goes to the leader; while there is none, or it changes, the asker waits for the event, not for luck, and
#         tries again until its deadline.
# Rule 2: what may have happened is sent again only if doing it twice is doing it once (`is_idempotent`): the command is found
#         again by a put's, job's or token's id, by the request id, or sets what is set already. A refusal of the second try is
#         no word about the first, which may come yet.
# Rule 3: who gives up says what it waited for: NoQuorum when certainly nothing happened, DeadlineExceeded when it may have.
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

import msgspec

from idunno.base.disk import Buffer
from idunno.base.errors import (
    WHEN_LOST,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    Exhausted,
    IdunnoError,
    InternalError,
    NoQuorum,
    NotLeader,
    PermissionDenied,
    Unavailable,
    Unconfirmed,
    undecided,
)
from idunno.base.ids import Index, NodeId, Term
from idunno.coordinator import commands as c
from idunno.coordinator import permissions
from idunno.coordinator.machine import Applied, Machine
from idunno.coordinator.messages import PROPOSE, READ_INDEX, Propose, Proposed, ReadIndex, ReadIndexAnswer
from idunno.coordinator.reads import PASSES, ROUND_S, ReadRounds
from idunno.coordinator.results import convert
from idunno.wire.calls import A, Actor, Method, Peers, Q

PAUSE_MIN_S: Final = 0.05
PAUSE_MAX_S: Final = 0.5
"""Between attempts at a leader that does not answer, doubling; cut short as soon as another leader is known."""

NEEDS_REQUEST: Final = (c.DeleteFile, c.Deploy, c.Undeploy, c.ForgetJob, c.RevokeUser, c.RemoveNode)
"""Commands that find their first try by the request id alone. All others name what they make, or set what may be set twice."""


BEGINS: Final = (c.BeginPut, c.PutSmall, c.Deploy, c.SubmitJob, c.AddNode, c.AddUser, c.AddToken)
"""Commands that begin something new: refused while the leader lives on its log's reserve."""


class Driver(Protocol):
    """What this file needs of consensus.driver.RaftDriver."""

    on_leader: list[Callable[[NodeId | None, Term], None]]

    @property
    def leader(self) -> NodeId | None: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def term(self) -> Term: ...
    @property
    def short_of_space(self) -> bool: ...

    async def propose(self, payload: bytes, timeout_s: float) -> tuple[Index, int, Any]: ...
    async def read_index(self, timeout_s: float) -> Index: ...
    async def applied(self, index: Index, timeout_s: float) -> None: ...


def is_idempotent(command: c.Command, request: str) -> bool:
    """Whether this command, under this request id, may be proposed a second time when the first try's fate is unknown."""
    return bool(request) or not isinstance(command, NEEDS_REQUEST)


class Coordinator:
    def __init__(self, driver: Driver, machine: Machine, peers: Peers, me: NodeId, now_ms: Callable[[], int]) -> None:
        self.driver, self.machine, self.me, self.now_ms = driver, machine, me, now_ms
        self._peers = peers
        self._waiters: set[asyncio.Future[None]] = set()
        self._rounds = ReadRounds(self._read_index)
        self._reads_alone = False
        driver.on_leader.append(self._leader_changed)

    async def close(self) -> None:
        """End what runs in the background; reads that wait are answered Unavailable."""
        await self._rounds.close()

    # -- writing ------------------------------------------------------------------------------------------------------

    async def propose(
        self, command: c.Command, *, actor: Actor, request: str = "", timeout_s: float
    ) -> tuple[Any, int]:
        """Have a command applied on behalf of `actor`; its result (results.py), and on how many nodes it is synced.

        Raises what the machine refused it with; NoQuorum (nothing happened), DeadlineExceeded or Unconfirmed (it may have).
        """

        def here(left_s: float) -> Awaitable[Proposed]:
            return self.propose_here(command, actor=actor, request=request, timeout_s=left_s)

        def there(leader: NodeId, left_s: float) -> Awaitable[Proposed]:
            asked = Propose(c.encode_command(command), request)
            return self._peers.to(leader).call(PROPOSE, asked, timeout_s=left_s, actor=actor)

        again = is_idempotent(command, request)
        answer = await self._at_leader(PROPOSE.name, here, there, timeout_s=timeout_s, again=again, changes=True)
        result = answer.result
        return result if isinstance(result, msgspec.Struct) else convert(type(command), result), answer.copies

    async def propose_here(self, command: c.Command, *, actor: Actor, request: str, timeout_s: float) -> Proposed:
        """The leader's part. `result` is the result's struct. Raises NotLeader too."""
        if self.driver.leader != self.me:
            raise NotLeader(f"{self.me} does not lead; the leader is {self.driver.leader or 'not known'}")
        permissions.check_new_name(command, self.machine)
        if self.driver.short_of_space and isinstance(command, BEGINS):
            raise Exhausted(
                f"the log's disk of the leader, {self.machine.roster.name(self.me)}, is full: only what frees space is done; "
                "delete files or jobs, or free space on that disk"
            )
        try:
            permissions.check(command, actor, self.machine)
        except (PermissionDenied, Conflict):
            # This leader may be new and its machine a little behind: refuse only by what is certainly true.
            end_s = _now_s() + timeout_s
            index = await self.driver.read_index(timeout_s)
            await self.driver.applied(index, _left_s(end_s))
            permissions.check(command, actor, self.machine)
            timeout_s = _left_s(end_s)
        entry = c.Entry(c.FORMAT, max(0, self.now_ms()), actor.name, actor.role.value, request, command)
        index, copies, applied = await self.driver.propose(c.encode_entry(entry), timeout_s)
        if not isinstance(applied, Applied):
            raise InternalError(f"entry {index} was applied by something that is not a machine: {applied!r:.80}")
        if applied.error is not None:
            raise applied.error
        return Proposed(index, copies, applied.result)

    # -- reading ------------------------------------------------------------------------------------------------------

    async def read(self, timeout_s: float) -> Machine:
        """This node's machine, in a state that holds everything acknowledged anywhere before this call.

        Raises NoQuorum, DeadlineExceeded. The machine moves on with the next await.
        """
        end_s = _now_s() + timeout_s
        index = await self._lone_read(timeout_s) if self.driver.is_leader and self._rounds.idle else None
        if index is None:
            index = await self._rounds.join(_left_s(end_s))
        await self.driver.applied(index, _left_s(end_s))
        return self.machine

    async def _lone_read(self, timeout_s: float) -> Index | None:
        """At the leader, who reads while nobody else does asks for himself: that saves a task, and two turns of the loop. None
        when that failed for a reason that passes."""
        if self._reads_alone:
            return None
        self._reads_alone = True
        try:
            return await self.driver.read_index(min(timeout_s, ROUND_S))
        except PASSES:
            return None
        finally:
            self._reads_alone = False

    async def read_index_here(self, timeout_s: float) -> ReadIndexAnswer:
        """The leader's part: one round of heartbeats. Raises NotLeader, NoQuorum, DeadlineExceeded."""
        return ReadIndexAnswer(await self.driver.read_index(timeout_s), self.driver.term)

    async def _read_index(self, timeout_s: float) -> Index:
        answer = await self.ask_leader(READ_INDEX, ReadIndex(), self.read_index_here, timeout_s=timeout_s, again=True)
        return Index(answer.index)

    # -- finding the leader -------------------------------------------------------------------------------------------

    def ask_leader(
        self,
        method: Method[Q, A],
        request: Q,
        here: Callable[[float], Awaitable[A]],
        *,
        timeout_s: float,
        actor: Actor | None = None,
        body: Buffer = b"",
        again: bool,
    ) -> Coroutine[Any, Any, A]:
        """Have the leader answer: `here(timeout_s)` when it is this node, a call of `method` otherwise.

        Waits for a leader, follows it when it changes. `again`: the request may be sent again although it may have happened.
        A handler must answer a node's call with NotLeader rather than forward it a second time.
        Raises what the leader raised; NoQuorum (nothing happened), DeadlineExceeded or Unconfirmed (something may have).
        """

        def there(leader: NodeId, left_s: float) -> Awaitable[A]:
            return self._peers.to(leader).call(method, request, timeout_s=left_s, actor=actor, body=body)

        return self._at_leader(method.name, here, there, timeout_s=timeout_s, again=again, changes=method.changes)

    async def _at_leader(
        self,
        what: str,
        here: Callable[[float], Awaitable[A]],
        there: Callable[[NodeId, float], Awaitable[A]],
        *,
        timeout_s: float,
        again: bool,
        changes: bool,
    ) -> A:
        """See `ask_leader`; `there(leader, timeout_s)` asks another node."""
        left_s, end_s, pause_s, unsure = timeout_s, _now_s() + timeout_s, PAUSE_MIN_S, False
        last: IdunnoError | None = None
        while left_s > 0:
            leader = self.driver.leader
            try:
                if leader == self.me:
                    return await here(left_s)
                if leader is None:
                    await self._change(left_s)
                elif again:
                    return await self._while_led_by(leader, there(leader, left_s))
                else:
                    return await there(leader, left_s)
            except (NotLeader, NoQuorum, Unavailable) as error:
                last = error
            except Unconfirmed as error:
                if not again:
                    raise
                last, unsure = error, changes
            except IdunnoError as error:
                if not unsure or not undecided(error):
                    raise
                raise DeadlineExceeded(f"{what} was sent, its answer was lost; asked again: {error}") from error
            if leader is not None and self.driver.leader == leader:
                await self._change(min(pause_s, end_s - _now_s()))
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
            left_s = end_s - _now_s()
        if last is None:  # nothing was sent
            raise NoQuorum(
                "no leader is known: too few voters are up, or one is being elected; see `idunno status`; " + WHEN_LOST
            )
        text = f"{what} not done within {timeout_s:g} s: {last}; see `idunno status`"
        raise DeadlineExceeded(text) if unsure else NoQuorum(f"{text}; {WHEN_LOST}")

    async def _while_led_by(self, leader: NodeId, call: Awaitable[A]) -> A:
        """The call's answer; raises ConnectionLost as soon as another node is known to lead: a frozen leader never answers."""
        task = asyncio.ensure_future(call)
        try:
            while True:
                change = self._next_change()
                try:
                    both: set[asyncio.Future[Any]] = {task, change}
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self._waiters.discard(change)
                if task.done():
                    return task.result()
                if self.driver.leader not in (leader, None):
                    raise ConnectionLost(f"{leader} lost the leadership before it answered")
        finally:
            task.cancel()
            task.add_done_callback(_observe)  # it may fail yet, and nobody asks for its error

    def _leader_changed(self, leader: NodeId | None, term: Term) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _next_change(self) -> asyncio.Future[None]:
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(change)
        return change

    async def _change(self, timeout_s: float) -> None:
        """Wait until leader or term are others, at most `timeout_s`."""
        change = self._next_change()
        try:
            await asyncio.wait({change}, timeout=max(0.0, timeout_s))
        finally:
            self._waiters.discard(change)


def _observe(task: asyncio.Future[Any]) -> None:
    """A call that was given up may end in any way; nobody waits for it any more."""
    if not task.cancelled():
        task.exception()


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _left_s(end_s: float) -> float:
    return max(0.001, end_s - _now_s())

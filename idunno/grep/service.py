# idunno/grep/service.py: the two calls of grep on a node.
#
# Rule 1: `grep.query` (anybody who may look) asks the ring; `grep.search` (nodes only) searches this node's files.
# Rule 2: a search runs in a child process (see child.py for why) that is killed when its time is over or its asker is gone.
# Rule 3: at most SEARCHES_MAX children and QUERIES_MAX queries at a time; more are refused, not queued.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

import msgpack
import msgspec

from idunno.base.disk import Disk
from idunno.base.errors import DeadlineExceeded, Exhausted, InternalError, from_code
from idunno.base.ids import NodeId
from idunno.grep.engine import check
from idunno.grep.messages import QUERY, SEARCH, NodeResult, Order, Query, QueryAnswer
from idunno.grep.process import Child, Spawn, spawn_child
from idunno.grep.query import Emit, ask_all
from idunno.membership.messages import MemberView
from idunno.wire.calls import HEADER_BYTES_MAX, Call, Peers, Registrar

log = logging.getLogger("idunno.grep")

SEARCHES_MAX: Final = 4
"""Children at a time on one node, 50 MB each; a machine of two cores has better things to do than more."""
QUERIES_MAX: Final = 16
SEARCH_S_MAX: Final = 600.0
"""However much time an asker gives: logs are bounded, and who takes nothing must not hold the places of others for ever."""
LOGS_DIRECTORY: Final = "logs"


class GrepService:
    """Registers both calls. `members` is the membership's view; `disk` the node's, of which "logs/" is searched."""

    def __init__(
        self,
        registrar: Registrar,
        peers: Peers,
        members: Callable[[], list[MemberView]],
        me: NodeId,
        disk: Disk,
        *,
        spawn: Spawn = spawn_child,
    ) -> None:
        self._peers, self._members, self._me, self._disk, self._spawn = peers, members, me, disk, spawn
        self._searches = self._queries = 0
        registrar.register(QUERY, self._query)
        registrar.register(SEARCH, self._search)

    async def _query(self, call: Call[Query]) -> QueryAnswer:
        check(call.request)
        if self._queries >= QUERIES_MAX:
            raise Exhausted(
                f"{QUERIES_MAX} greps run through this node already; wait for one to end, or ask another node"
            )
        self._queries += 1
        try:
            one_at_a_time = asyncio.Lock()

            async def emit(batch: bytes) -> None:
                async with one_at_a_time:
                    await call.send(note=batch)

            return await ask_all(
                call.request, self._members(), self._me, self._search_here, self._peers, emit, _time_s(call)
            )
        finally:
            self._queries -= 1

    async def _search(self, call: Call[Query]) -> NodeResult:
        check(call.request)

        async def emit(batch: bytes) -> None:
            await call.send(note=batch)

        return await self._search_here(call.request, _time_s(call), emit)

    async def _search_here(self, query: Query, timeout_s: float, emit: Emit) -> NodeResult:
        """Search this node's logs in a child. Raises Exhausted, DeadlineExceeded, and what the child reports."""
        if self._searches >= SEARCHES_MAX:
            raise Exhausted(f"{SEARCHES_MAX} searches run on this node already; wait for one to end")
        self._searches += 1
        child: Child | None = None
        try:
            async with asyncio.timeout(timeout_s):
                child = await self._spawn()
                name = next((member.name for member in self._members() if member.node == self._me), self._me)
                order = Order(query, name, self._disk.local_path(LOGS_DIRECTORY), max(1, int(timeout_s) + 1))
                await child.give(msgspec.msgpack.encode(order))
                return await self._pass_on(child, emit)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the search was not done within {timeout_s:.1f} s; ask for less (--since, --limit) or a simpler pattern"
            ) from error
        finally:
            if child is not None:
                await self._end(child)
            self._searches -= 1

    async def _pass_on(self, child: Child, emit: Emit) -> NodeResult:
        unpacker = msgpack.Unpacker(raw=False, max_buffer_size=4 * HEADER_BYTES_MAX)
        while data := await child.read():
            unpacker.feed(data)
            for answer in unpacker:
                match answer:
                    case ["lines", bytes() as batch]:
                        await emit(batch)
                    case ["done", result]:
                        return msgspec.convert(result, NodeResult)
                    case ["error", str() as code, str() as text]:
                        raise from_code(code, text)
                    case _:
                        raise InternalError("the search process answered with something unknown")
        status = await child.end()
        log.warning("search process died", extra={"status": status})
        raise InternalError(
            f"the search process ended with status {status} and no result; a simpler pattern or a narrower time may do"
        )

    async def _end(self, child: Child) -> None:
        """Reap the child even while this task is being cancelled: killed, it needs milliseconds."""
        ending: asyncio.Task[Any] = asyncio.ensure_future(child.end())
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise


def _time_s(call: Call[Query]) -> float:
    return min(call.remaining_s(), SEARCH_S_MAX)

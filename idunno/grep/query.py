# idunno/grep/query.py: one query over the whole ring.
#
# Rule 1: every living member is asked at once, this one included; each one's lines are passed on as they come, in its order.
# Rule 2: who is not alive, does not answer in time, fails or dies in the middle is named with the reason; what the others
#         found is complete.
# Rule 3: whoever asked is gone: everything that was begun for it ends (the streams are cancelled, the children killed).
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from idunno.base.errors import IdunnoError, NotFound
from idunno.base.ids import NodeId
from idunno.grep.messages import SEARCH, NodeResult, Query, QueryAnswer
from idunno.membership.messages import MemberView
from idunno.wire.calls import Peers

AT_ONCE_MAX: Final = 32
"""Nodes searched at the same time. Each may have STREAM_CREDIT_BYTES (2 MiB) under way: 64 MiB at most at the asker's node."""
ANSWER_SHARE: Final = 0.9
"""Of the time that is left, what the nodes get: the rest is for saying which of them were late."""

Emit = Callable[[bytes], Awaitable[None]]
"""Pass on one packed LineBatch; waits while the asker does not take it."""
SearchHere = Callable[[Query, float, Emit], Awaitable[NodeResult]]

_ALIVE: Final = ("active", "suspicious")


def choose(members: Sequence[MemberView], wanted: Sequence[str]) -> tuple[list[MemberView], dict[str, str]]:
    """(members to ask, those that are not alive by name with the reason).

    `wanted` holds names or ids; [] means all but those that left. Raises NotFound for one that nobody has.
    """
    chosen = [member for member in members if member.state != "left"]
    if wanted:
        names = set(wanted)
        chosen = [member for member in members if member.name in names or member.node in names]
        missing = sorted(names - {m.name for m in chosen} - {m.node for m in chosen})
        if missing:
            raise NotFound(f"no member is called {', '.join(missing)[:200]}; see `idunno members`")
    dead = {m.name: f"{m.state}: {m.reason}" for m in chosen if m.state not in _ALIVE}
    return [member for member in chosen if member.state in _ALIVE], dead


async def ask_all(
    query: Query,
    members: Sequence[MemberView],
    me: NodeId,
    search_here: SearchHere,
    peers: Peers,
    emit: Emit,
    timeout_s: float,
) -> QueryAnswer:
    """Search on all `members`, passing lines on by `emit`. Raises NotFound for an unknown name in `query.nodes`."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    asked, unreachable = choose(members, query.nodes)
    results: dict[str, NodeResult] = {}
    slots = asyncio.Semaphore(AT_ONCE_MAX)
    end_s = began_s + timeout_s * ANSWER_SHARE

    async def ask(member: MemberView) -> None:
        try:
            async with asyncio.timeout_at(end_s), slots:
                left_s = max(0.01, end_s - loop.time())
                if member.node == me:
                    result = await search_here(query, left_s, emit)
                else:
                    result = await _ask_one(peers, member.node, query, left_s, emit)
            results[member.name] = result
            if result.problem:
                unreachable[member.name] = f"incomplete: {result.problem}"
        except IdunnoError as error:
            unreachable[member.name] = f"{error.code}: {error}"
        except TimeoutError:
            unreachable[member.name] = (
                f"deadline-exceeded: not done within {timeout_s * ANSWER_SHARE:.1f} s; what it found is above"
            )

    async with asyncio.TaskGroup() as group:
        for member in asked:
            group.create_task(ask(member))
    return QueryAnswer(
        counts={name: results[name].count for name in sorted(results)},
        node_seconds={name: results[name].seconds for name in sorted(results)},
        unreachable=dict(sorted(unreachable.items())),
        seconds=loop.time() - began_s,
        truncated=any(result.truncated for result in results.values()),
    )


async def _ask_one(peers: Peers, node: NodeId, query: Query, timeout_s: float, emit: Emit) -> NodeResult:
    async with peers.to(node).open(SEARCH, query, timeout_s=timeout_s) as stream:
        await stream.end()
        while (item := await stream.receive()) is not None:
            await emit(item.note)
        return await stream.answer()

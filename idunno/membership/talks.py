# idunno/membership/talks.py: what the detector says over TCP: a probe, an exchange of lists. Both are optional.
#
# Rule 1: at most PROBES_MAX probes and EXCHANGES_MAX exchanges at once, one of a kind per member; what does not fit is not
#         begun, and the core does without. Exchanges with the dead hang for seconds: they do not keep a probe of the living
#         waiting.
# Rule 2: every talk has a deadline, its failure is the core's knowledge and nobody's exception; stop() ends all.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from idunno.base.errors import DecodeError, IdunnoError
from idunno.base.ids import NodeId
from idunno.membership.messages import WholeList, decode_list, encode

log = logging.getLogger("idunno.membership")

PROBES_MAX: Final = 32
EXCHANGES_MAX: Final = 16
EXCHANGE_S: Final = 5.0
"""Two lists of 2,000 members are 250 KB: a fraction of a second, unless the way is nearly closed."""

TcpProbe: TypeAlias = Callable[[NodeId], Awaitable[bool]]
"""Whether the member answers over TCP at all."""
ExchangeBytes: TypeAlias = Callable[[NodeId, bytes], Awaitable[bytes]]
"""Hands our list to the member's `Membership.exchanged`, returns what that returned."""


class Talks:
    def __init__(self, probe: TcpProbe | None, exchange: ExchangeBytes | None) -> None:
        self._probe, self._exchange = probe, exchange
        self._tasks: dict[tuple[str, NodeId], asyncio.Task[None]] = {}

    def probe(self, node: NodeId, timeout_ms: int, answered: Callable[[], None]) -> None:
        """Call `answered` if the member answers within `timeout_ms`."""
        if self._probe is None:
            return
        ask = self._probe

        async def talk() -> None:
            try:
                async with asyncio.timeout(timeout_ms / 1000):
                    alive = await ask(node)
            except (IdunnoError, OSError, TimeoutError) as error:
                log.debug("no answer over TCP", extra={"node_id": node, "error": str(error)})
                return
            if alive:
                answered()

        self._begin("probe", node, talk)

    def exchange(
        self, node: NodeId, ours: WholeList, heard: Callable[[WholeList], None], failed: Callable[[], None]
    ) -> None:
        """Call `heard` with the member's list, or `failed`."""
        if self._exchange is None:
            failed()
            return
        swap = self._exchange

        async def talk() -> None:
            try:
                async with asyncio.timeout(EXCHANGE_S):
                    theirs = decode_list(await swap(node, encode(ours)))
            except (IdunnoError, OSError, TimeoutError, DecodeError) as error:
                log.debug("lists not exchanged", extra={"node_id": node, "error": str(error)})
                failed()
                return
            heard(theirs)

        self._begin("exchange", node, talk)

    def _begin(self, kind: str, node: NodeId, talk: Callable[[], Awaitable[None]]) -> None:
        most = PROBES_MAX if kind == "probe" else EXCHANGES_MAX
        if (kind, node) in self._tasks or sum(other == kind for other, _ in self._tasks) >= most:
            return

        async def bounded() -> None:
            try:
                await talk()
            except Exception:  # a bug of what was handed in must not stop the detector, nor pass unseen
                log.exception("talk over TCP failed", extra={"kind": kind, "node_id": node})
            finally:
                self._tasks.pop((kind, node), None)

        self._tasks[kind, node] = asyncio.get_running_loop().create_task(bounded(), name=f"membership-{kind}")

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

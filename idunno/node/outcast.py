# idunno/node/outcast.py: what a node does when it is not to be trusted any more: said in one line, with the next step.
#
# Rule 1: a node that the others do not hear (an old disk, a copy) ends.
# Rule 2: a node whose machine differs from the others' applies, votes and answers nothing any more. It stays up, for its blocks
#         are good by their names; it does not start again with that log.
from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from idunno.base.errors import Conflict, Corrupt, IdunnoError, NotFound
from idunno.base.ids import NodeId

if TYPE_CHECKING:
    from idunno.node.node import Node

log = logging.getLogger("idunno.node")

QUARANTINE_PATH: Final = "log/quarantine"
WHY_BYTES_MAX: Final = 4096
WRITE_AGAIN_S: Final = 1.0


class Outcast:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._writing: asyncio.Task[None] | None = None

    def _next_step(self) -> str:
        name = self._node.config.name
        return f"run `idunno remove {name}` on another node while this one is down, then join again with an empty directory"

    def boot_seen(self, node: NodeId) -> int:
        """As the roster has it."""
        record = self._node.machine.roster.find(node)
        return record.boot if record is not None else 0

    def not_heard(self, why: str) -> None:
        node = self._node
        node.fail(
            Conflict(f"the others do not hear node {node.config.name} ({node.me}) any more: {why}; {self._next_step()}")
        )

    def differs(self, why: str) -> None:
        text = f"{why}; {self._next_step()}"
        log.error("node is in quarantine", extra={"node_id": self._node.me, "problem": text})
        self._node.applier.refused = text
        self._node.driver.refuse(text)
        self._writing = asyncio.get_running_loop().create_task(self._remember(text), name="quarantine")

    async def _remember(self, text: str) -> None:
        while True:
            try:
                await self._node.disk.replace(QUARANTINE_PATH, text.encode()[:WHY_BYTES_MAX])
                return
            except IdunnoError as error:
                log.warning("quarantine not remembered", extra={"problem": str(error)})
                await asyncio.sleep(WRITE_AGAIN_S)

    async def stop(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def check(self) -> None:
        """At start. Raises Corrupt."""
        try:
            why = await self._node.disk.read_all(QUARANTINE_PATH, bytes_max=WHY_BYTES_MAX)
        except NotFound:
            return
        raise Corrupt(why.decode(errors="replace"))

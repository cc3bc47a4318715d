# idunno/node/outcast.py: what a node does when it is not to be trusted any more: said in one line, with the next step.
#
# Rule 1: a process whose log the others find to be an old one ends, and the next one brings it up to date (readmission.py). One
#         whose node runs elsewhere ends for good.
# Rule 2: a node whose machine differs from the others' applies, votes and answers nothing any more. It stays up, for its blocks
#         are good by their names; it does not start again with that log.
from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from idunno.base.errors import Conflict, Corrupt, IdunnoError, NotFound
from idunno.base.ids import NodeId
from idunno.node.identity import BOOT_FILE

if TYPE_CHECKING:
    from idunno.node.node import Node

log = logging.getLogger("idunno.node")

QUARANTINE_PATH: Final = "log/quarantine"
WHY_BYTES_MAX: Final = 4096
WRITE_AGAIN_S: Final = 1.0


def replaced(name: str) -> str:
    return f"run `idunno remove {name}` on another node while this one is down, then join again with an empty directory"


class Outcast:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._writing: asyncio.Task[None] | None = None
        self._again: asyncio.Task[None] | None = None

    def boot_seen(self, node: NodeId) -> int:
        """As the roster has it."""
        record = self._node.machine.roster.find(node)
        return record.boot if record is not None else 0

    def is_copy(self, why: str) -> None:
        name = self._node.config.name
        self._node.fail(
            Conflict(
                f"{why}: this data directory is a copy of node {name} ({self._node.me}), which runs elsewhere; stop the one "
                "that is not wanted: if that one stops, this one comes back by itself when it is started again"
            )
        )

    def begin_again(self, boot: int) -> None:
        """End this process, and begin one whose boot number is above its own and above `boot`."""
        if self._again is None:
            self._again = asyncio.get_running_loop().create_task(self._begin_again(boot), name="begin again")

    async def _begin_again(self, boot: int) -> None:
        node = self._node
        while boot > node.boot:
            try:
                await node.disk.replace(BOOT_FILE, str(boot).encode())
                break
            except IdunnoError as error:
                log.warning("boot number not written", extra={"boot": boot, "problem": str(error)})
                await asyncio.sleep(WRITE_AGAIN_S)
        log.warning("node begins again", extra={"node_id": node.me, "boot": node.boot})
        node.again = True
        node.failed.set()

    def differs(self, why: str) -> None:
        text = f"{why}; {replaced(self._node.config.name)}"
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
        for task in (self._writing, self._again):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def check(self) -> None:
        """At start. Raises Corrupt."""
        try:
            why = await self._node.disk.read_all(QUARANTINE_PATH, bytes_max=WHY_BYTES_MAX)
        except NotFound:
            return
        raise Corrupt(why.decode(errors="replace"))

# idunno/node/outcast.py: what a node does when it is not to be trusted any more: said in one line, with the next step.
#
# Rule 1: a node that the others do not hear (an old disk, a copy) ends.
# Rule 2: a node whose machine differs from the others' applies, votes and answers nothing any more. It stays up, for its blocks
#         are good by their names; it does not start again with that log.
from __future__ import annotations

import asyncio
import logging
import re
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


def replaced_or_recovered(name: str) -> str:
    """The next step of who knows no leader: many may be refused at once, and their logs are all that there is."""
    return (
        "this node knows no leader: if the others have none either (`idunno status` there), remove nothing, stop all and run "
        f"`idunno recover --dir DIR --dir DIR ...` with all nodes' directories; if they have one, {replaced(name)}"
    )


def _boot_file(why: str) -> str:
    """What may be done first when only the boot number is too low."""
    seen = re.search(r"\bbut boot (\d+) of it was seen\b", why)
    return (
        f"if this is its newest disk, write {seen[1]} into the file `{BOOT_FILE}` and start again; else "
        if seen
        else ""
    )


class Outcast:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._writing: asyncio.Task[None] | None = None

    def _next_step(self) -> str:
        name, driver = self._node.config.name, self._node.driver
        return replaced(name) if driver.leader not in (None, self._node.me) else replaced_or_recovered(name)

    def boot_seen(self, node: NodeId) -> int:
        """As the roster has it."""
        record = self._node.machine.roster.find(node)
        return record.boot if record is not None else 0

    def not_heard(self, why: str) -> None:
        node = self._node
        node.fail(
            Conflict(
                f"the others do not hear node {node.config.name} ({node.me}) any more: {why}; "
                f"{_boot_file(why)}{self._next_step()}"
            )
        )

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

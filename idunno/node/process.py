# idunno/node/process.py: one node as a process: its lock, its log, its signals, from its start to its end.
from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

from idunno.base.errors import Incompatible
from idunno.node.config import NodeConfig
from idunno.node.identity import DirectoryLock, Identity
from idunno.node.lateness import BUSY_S, IDLE_S, SNAPSHOT_S, watch
from idunno.node.logs import start_logging
from idunno.node.node import Node
from idunno.node.platform import real_platform

SAME_SIGNAL_S: Final = 0.5
"""A signal so soon after the first is the same one: who sends it to a process and to its group (timeout, launchers, terminals)
reaches us twice. Nobody who waits in vain presses again that fast."""


def _pause_s(node: Node) -> float:
    """Until the loop's lateness is looked at again."""
    if node.driver.busy_with_snapshot:
        return SNAPSHOT_S
    return BUSY_S if node.datanode.busy else IDLE_S


async def run_node(directory: Path, config: NodeConfig, identity: Identity, seed: str | None, *, verbose: bool) -> None:
    """Run until SIGINT or SIGTERM; a second signal, later, ends it at once. Raises IdunnoError when it cannot start or go on."""
    lock = DirectoryLock(directory)
    lock.take()
    (directory / "logs").mkdir(exist_ok=True)
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    start_logging(str(directory / "logs" / "node.jsonl"), config.name, level=level, also_stderr=verbose)
    loop = asyncio.get_running_loop()
    wanted = asyncio.Event()
    first_s = 0.0

    def signalled() -> None:
        nonlocal first_s
        if not wanted.is_set():
            first_s = loop.time()
            wanted.set()
        elif loop.time() - first_s >= SAME_SIGNAL_S:
            os._exit(1)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signalled)
    while True:
        node = Node(config, real_platform(directory, config, identity), seed)
        ended = await _until(wanted, node)
        if not node.again or wanted.is_set() or not ended:
            break
    lock.release()
    if node.problem:
        raise Incompatible(node.problem)
    if not ended:
        if node.again and not wanted.is_set():  # nobody wanted it to end
            sys.stderr.write("error: the node was to begin again, but a step of its end did not end: start it again\n")
            os._exit(1)
        os._exit(0)  # the threads that hang would hold up the interpreter's own end; everything that could be closed is


async def _until(wanted: asyncio.Event, node: Node) -> bool:
    """Start the node, run it until it is wanted to end or fails, stop it. Returns what Node.stop does."""
    waiting = asyncio.create_task(wanted.wait())
    starting = asyncio.create_task(node.start())
    try:
        await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # a signal while it starts: what was started is stopped by `start` itself
            starting.cancel()
            await asyncio.wait([starting])
            return not node.is_late
        await starting
        failing = asyncio.create_task(node.failed.wait())
        watching = asyncio.create_task(watch(node.lateness, lambda: _pause_s(node)))
        await asyncio.wait([waiting, failing], return_when=asyncio.FIRST_COMPLETED)
        failing.cancel()
        watching.cancel()
        return await node.stop(hurry=bool(node.problem))
    finally:
        waiting.cancel()

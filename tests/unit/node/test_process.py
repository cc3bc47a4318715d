# A node as a process: what a signal finds when the node has not even started.
from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from idunno.node import node as nodes
from idunno.node.config import NodeConfig
from idunno.node.process import _until


class Starting(nodes.Node):
    """Its disk answers nothing while it starts; the threads that wait for it end when `answers` is set, or at once."""

    def __init__(self, *, hangs: bool) -> None:
        self.answers = threading.Event()
        if not hangs:
            self.answers.set()
        identity = SimpleNamespace(node="00" * 8)
        platform: Any = SimpleNamespace(identity=identity, boot=1, disk=None, close=self.answers.wait)
        super().__init__(NodeConfig(name="n1", listen="127.0.0.1:7400"), platform, None)

    def _make(self) -> None:
        return

    async def _start_parts(self) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("hangs", [True, False])
def test_a_signal_while_a_node_starts_does_not_wait_for_threads_that_hang(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "STEP_S", 0.05)

    async def story() -> bool:
        node, wanted = Starting(hangs=hangs), asyncio.Event()
        asyncio.get_running_loop().call_soon(wanted.set)
        try:
            return await asyncio.wait_for(_until(wanted, node), 5.0)
        finally:
            node.answers.set()

    assert asyncio.run(story()) is not hangs

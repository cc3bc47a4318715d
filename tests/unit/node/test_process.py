# A node as a process: what a signal finds when the node has not even started.
from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from idunno.base.ids import NodeId
from idunno.node import node as nodes
from idunno.node import process
from idunno.node.config import NodeConfig
from idunno.node.identity import Identity
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


def test_a_node_that_was_to_begin_again_and_cannot_end_does_not_look_as_if_it_had_been_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leaves(code: int) -> None:
        raise SystemExit(code)

    async def until(wanted: asyncio.Event, node: Any) -> bool:
        return False

    monkeypatch.setattr(process, "Node", lambda *_: SimpleNamespace(again=True, problem=""))
    monkeypatch.setattr(process, "real_platform", lambda *_: None)
    monkeypatch.setattr(process, "start_logging", lambda *_, **__: None)
    monkeypatch.setattr(process, "_until", until)
    monkeypatch.setattr(os, "_exit", leaves)
    config, identity = NodeConfig(name="n1", listen="127.0.0.1:7400"), Identity(1, "c" * 32, NodeId("0" * 16))
    with pytest.raises(SystemExit) as ended:
        asyncio.run(process.run_node(tmp_path, config, identity, None, verbose=False))
    assert ended.value.code == 1
    assert "start it again" in capsys.readouterr().err


def test_a_signal_that_comes_twice_at_once_stops_the_node_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout` and some launchers send a signal to the process and to its group: it was taken for an impatient second one."""

    def ended(code: int) -> None:
        raise AssertionError(f"ended at once with {code}")

    handled = asyncio.Queue[int]()

    async def until(wanted: asyncio.Event, node: Any) -> bool:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await handled.get() == signal.SIGTERM
        assert wanted.is_set()
        return True

    failures: list[dict[str, Any]] = []

    async def story() -> None:
        loop = asyncio.get_running_loop()
        add = loop.add_signal_handler

        def counted(number: int, signalled: Callable[[], None]) -> None:
            def handle() -> None:
                try:
                    signalled()
                finally:
                    handled.put_nowait(number)

            add(number, handle)

        monkeypatch.setattr(loop, "add_signal_handler", counted)
        loop.set_exception_handler(lambda loop, context: failures.append(context))
        config, identity = NodeConfig(name="n1", listen="127.0.0.1:7400"), Identity(1, "c" * 32, NodeId("0" * 16))
        await process.run_node(tmp_path, config, identity, None, verbose=False)

    monkeypatch.setattr(process, "Node", lambda *_: SimpleNamespace(again=False, problem=""))
    monkeypatch.setattr(process, "real_platform", lambda *_: None)
    monkeypatch.setattr(process, "start_logging", lambda *_, **__: None)
    monkeypatch.setattr(process, "_until", until)
    monkeypatch.setattr(os, "_exit", ended)
    asyncio.run(story())
    assert failures == []

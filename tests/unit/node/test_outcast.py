# What a node does whose log the others find to be an old one, and one that runs elsewhere as well.
from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from idunno.base.errors import DiskFailed, IdunnoError
from idunno.base.ids import NodeId
from idunno.node import outcast
from idunno.node.outcast import Outcast

ME = NodeId("1" * 16)


class BootDisk:
    def __init__(self, failures: int = 0) -> None:
        self.boot, self.failures = b"", failures

    async def replace(self, path: str, data: bytes) -> None:
        assert path == "boot"
        if self.failures:
            self.failures -= 1
            raise DiskFailed("no space left")
        self.boot = data


def node_on(disk: BootDisk) -> Any:
    errors: list[IdunnoError] = []
    return SimpleNamespace(
        config=SimpleNamespace(name="n1"),
        me=ME,
        boot=4,
        disk=disk,
        again=False,
        failed=asyncio.Event(),
        fail=errors.append,
        errors=errors,
    )


@pytest.mark.parametrize(("seen", "written"), [(0, b""), (4, b""), (5, b"5"), (9, b"9")])
def test_the_next_process_has_a_boot_number_above_its_own_and_above_all_that_were_seen(
    seen: int, written: bytes
) -> None:
    """A start raises what it finds in the file by one; this one has raised it to its own."""

    async def run() -> None:
        node = node_on(BootDisk())
        it = Outcast(node)
        it.begin_again(seen)
        it.begin_again(seen + 1)  # asked for once more: it is under way
        await asyncio.wait_for(node.failed.wait(), 5)
        assert (node.again, node.errors, node.disk.boot) == (True, [], written)
        await it.stop()

    asyncio.run(run())


def test_it_does_not_end_before_the_boot_number_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcast, "WRITE_AGAIN_S", 0.01)

    async def run() -> None:
        node = node_on(BootDisk(failures=3))
        Outcast(node).begin_again(7)
        await asyncio.wait_for(node.failed.wait(), 5)
        assert (node.disk.boot, node.disk.failures) == (b"7", 0)

    asyncio.run(run())


def test_a_copy_of_a_node_that_runs_elsewhere_ends_for_good() -> None:
    async def run() -> None:
        node = node_on(BootDisk())
        Outcast(node).is_copy("boot 5 of it answered n2, which leads")
        assert not node.again
        assert "this data directory is a copy of node n1" in str(node.errors[0])
        assert "stop the one that is not wanted" in str(node.errors[0])

    asyncio.run(run())

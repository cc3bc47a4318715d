# The client vanishes, or the room goes dark, at every single step of a put: it is there whole, or nothing of it is.
from __future__ import annotations

import asyncio
import itertools

import pytest

from idunno.sdfs.hashing import block_id
from tests.unit.sdfs.world import CONFIG, Node, World, content_of, run, until

CONTENT = content_of(20_000)
SMALL = content_of(1_000)


async def whole_or_nothing(world: World, content: bytes, *, acknowledged: bool) -> None:
    """At every node; and what nothing refers to goes from the disks."""
    version = world.machine.namespace.find("f")
    assert version is not None or not acknowledged
    for node in world.living:
        client = world.client(entry=int(node.id, 16))
        if version is None:
            assert await client.ls() == []
        else:
            assert await world.get("f", entry=int(node.id, 16)) == content
    world.now_ms += CONFIG.put_open_max_ms + 1
    await world.put(b"time goes on", "other")
    await world.leading.look()
    assert world.machine.namespace.open_puts() == []
    if version is None:
        name = block_id(content)

        def left() -> list[str]:
            return [f"{node.name} {path}" for node in world.living for path in node.disk.paths() if path.endswith(name)]

        await until(lambda: not left())
    elif content is CONTENT:
        await asyncio.sleep(40.0)  # sweeps come and go
        assert len(world.durable(block_id(content))) == 4
    assert not any(path.startswith("tmp/block-") for node in world.living for path in node.disk.paths())


@pytest.mark.parametrize("content", [SMALL, CONTENT], ids=["small", "large"])
def test_a_client_that_vanishes_at_any_step_leaves_a_version_or_nothing(content: bytes) -> None:
    steps = 0
    seen = set()

    async def story(step: int | None) -> None:
        nonlocal steps
        async with World(4) as world:
            count = itertools.count()
            putting: asyncio.Task[object] | None = None

            def before(node: Node, doing: str, path: str) -> None:
                if next(count) == step and putting is not None:
                    putting.cancel()

            world.before = before
            putting = asyncio.create_task(world.put(content, "f", timeout_s=60))
            await asyncio.wait([putting])
            await asyncio.sleep(1.0)
            world.before = None
            if step is None:
                steps = next(count)
            acknowledged = not putting.cancelled()
            seen.add((acknowledged, world.machine.namespace.find("f") is not None))
            await whole_or_nothing(world, content, acknowledged=acknowledged)

    run(lambda: story(None))
    for step in range(0, steps, 2):
        run(lambda step=step: story(step))  # type: ignore[misc]
    assert content is SMALL or (False, False) in seen  # a small one is one message
    assert (False, True) in seen  # it was committed, and nobody heard of it


def test_power_that_fails_everywhere_at_any_step_of_a_put_leaves_a_version_or_nothing() -> None:
    steps = 0
    seen = set()

    async def story(step: int | None) -> None:
        nonlocal steps
        async with World(4) as world:
            count = itertools.count()
            dark = asyncio.Event()

            def before(node: Node, doing: str, path: str) -> None:
                if next(count) == step:
                    dark.set()
                    for each in list(world.living):
                        world.kill(each, noticed_after_s=None)

            world.before = before
            putting = asyncio.create_task(world.put(CONTENT, "f", timeout_s=10))
            darkness = asyncio.create_task(dark.wait())
            await asyncio.wait([putting, darkness], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0.5)
            world.before = None
            if step is None:
                steps = next(count)
            acknowledged = putting.done() and not putting.cancelled() and putting.exception() is None
            putting.cancel()
            darkness.cancel()
            await asyncio.gather(putting, darkness, return_exceptions=True)
            if dark.is_set():
                for node in list(world.nodes.values()):
                    await world.restart(node)
                world.lead(world.node(2).id)
                await until(lambda: not world.leading.recovering)
            seen.add(acknowledged)
            await whole_or_nothing(world, CONTENT, acknowledged=acknowledged)

    run(lambda: story(None))
    assert steps > 20
    for step in range(0, steps, 3):
        run(lambda step=step: story(step))  # type: ignore[misc]
    assert seen == {False, True}

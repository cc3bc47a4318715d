"""When a disk is fast enough that its syncs are waited for on the loop."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from idunno.base.errors import DiskFailed
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.node.prompt import BYTES_MAX, FAST_S, LOOK_BACK, REST_S, SLOW_S, Promptness


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_disk_is_prompt_once_it_has_shown_it_and_until_it_takes_long() -> None:
    clock = Clock()
    promptness = Promptness(clock)
    for _ in range(LOOK_BACK):
        assert not promptness.is_prompt()
        promptness.took(FAST_S / 2)
    assert promptness.is_prompt()
    promptness.took(SLOW_S / 2)  # the processor was busy elsewhere
    assert promptness.is_prompt()
    promptness.took(2 * SLOW_S)
    clock.now_s += REST_S - 1
    assert not promptness.is_prompt()
    clock.now_s += 2
    assert promptness.is_prompt()


def test_a_disk_that_is_never_fast_is_never_prompt() -> None:
    promptness = Promptness(Clock())
    for _ in range(3 * LOOK_BACK):
        promptness.took(2 * FAST_S)
    assert not promptness.is_prompt()


def test_a_prompt_disk_syncs_on_the_loop_and_what_is_large_or_fails_does_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload, promptness = ThreadOffload(1, "test"), Promptness(Clock())
    threads: list[str] = []

    def fdatasync(descriptor: int) -> None:
        threads.append(threading.current_thread().name)

    monkeypatch.setattr("os.fdatasync", fdatasync)

    async def story() -> None:
        file = await RealDisk(str(tmp_path), offload, promptness).open("a", create=True)
        for at in range(LOOK_BACK + 1):
            await file.write(at, [b"x"], sync=True)
        await file.write(0, [bytes(BYTES_MAX + 1)], sync=True)
        assert [name.startswith("test") for name in threads] == [True] * LOOK_BACK + [False, True]
        monkeypatch.setattr("os.fdatasync", _refuse)
        with pytest.raises(DiskFailed, match="Input/output error"):
            await file.write(0, [b"x"], sync=True)
        await file.close()

    asyncio.run(story())
    offload.close()


def _refuse(descriptor: int) -> None:
    raise OSError(5, "Input/output error")

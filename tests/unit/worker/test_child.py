# Real child processes: what they answer, and how they die.
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idunno.base.errors import DecodeError, InvalidArgument, ModelFailed
from idunno.worker import protocol
from idunno.worker.protocol import Ran
from idunno.worker.runner import RUNNER, ChildFactory, ChildRunner, Pipes, child_environment, ending
from tests.unit.worker.helpers import EXAMPLES, add_one, endless, labels, npy, png, until, zipped

LIMIT_S = 20.0


@asynccontextmanager
async def child(folder: Path, model: Path | None = None) -> AsyncIterator[ChildRunner]:
    runner = await ChildFactory(str(folder))()
    assert isinstance(runner, ChildRunner)
    try:
        if model is not None:
            await runner.load("digits", str(model), "onnx", threads=1, timeout_s=LIMIT_S)
        yield runner
    finally:
        await runner.close()
        assert not runner.alive


def with_child(work: Callable[[ChildRunner], Awaitable[None]], folder: Path, model: Path | None = None) -> None:
    async def run() -> None:
        async with child(folder, model) as runner:
            await work(runner)

    asyncio.run(run())


def digits(folder: Path) -> Path:
    (folder / "m").mkdir()
    (folder / "m" / "digits.onnx").write_bytes((EXAMPLES / "digits.onnx").read_bytes())
    return folder / "m"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_digits_are_read_right_in_order_and_by_name(tmp_path: Path) -> None:
    pictures, out, truth = str(EXAMPLES / "digits.zip"), tmp_path / "out", labels()

    async def work(runner: ChildRunner) -> None:
        assert await runner.count(pictures, "zip", timeout_s=LIMIT_S) == 1797
        parts = []
        for first, last in ((0, 1000), (1000, 1797)):
            ran = await runner.run(pictures, "zip", first, last, str(out), timeout_s=LIMIT_S)
            assert (ran.done, ran.errors, ran.size) == (last - first, 0, out.stat().st_size)
            assert ran.timing.count == last - first
            assert sum(count for _, count in ran.timing.buckets) == last - first
            parts += lines(out)
        assert [line["query"] for line in parts] == list(truth)
        right = sum(line["output"]["label"] == truth[line["query"]] for line in parts)
        assert right / len(parts) > 0.95
        assert abs(sum(parts[0]["output"]["probabilities"]) - 1) < 1e-3

    with_child(work, tmp_path, digits(tmp_path))


def test_garbage_among_images_is_an_error_line_in_its_place(tmp_path: Path) -> None:
    archive, out = tmp_path / "in.zip", tmp_path / "out"
    archive.write_bytes(zipped({"a.png": png(), "b.png": b"garbage", "c.jpg": png(30, 20)}))

    async def work(runner: ChildRunner) -> None:
        ran = await runner.run(str(archive), "zip", 0, 3, str(out), timeout_s=LIMIT_S)
        assert (ran.done, ran.errors) == (2, 1)
        assert [line["query"] for line in lines(out)] == ["a.png", "b.png", "c.jpg"]
        assert [sorted(line) for line in lines(out)] == [["output", "query"], ["error", "query"], ["output", "query"]]

    with_child(work, tmp_path, digits(tmp_path))


def test_an_input_that_cannot_be_read_is_refused_and_the_child_lives_on(tmp_path: Path) -> None:
    whole = zipped({"a.png": png()})
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    (tmp_path / "good.zip").write_bytes(whole)

    async def work(runner: ChildRunner) -> None:
        with pytest.raises(InvalidArgument, match="no zip archive, or it is cut off"):
            await runner.count(str(tmp_path / "cut.zip"), "zip", timeout_s=LIMIT_S)
        assert await runner.count(str(tmp_path / "good.zip"), "zip", timeout_s=LIMIT_S) == 1

    with_child(work, tmp_path, digits(tmp_path))


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    (tmp_path / "in.npy").write_bytes(npy(np.array([[np.nan, 1], [np.inf, -np.inf]], np.float32)))

    async def work(runner: ChildRunner) -> None:
        await runner.run(str(tmp_path / "in.npy"), "npy", 0, 2, str(tmp_path / "out"), timeout_s=LIMIT_S)
        assert (tmp_path / "out").read_bytes() == (
            b'{"query":0,"output":[null,2.0]}\n{"query":1,"output":[null,null]}\n'
        )

    with_child(work, tmp_path, add_one(tmp_path / "m"))


def test_a_model_that_never_returns_is_killed_at_its_limit(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"[1, 2]\n")

    async def work(runner: ChildRunner) -> None:
        with pytest.raises(ModelFailed, match=r"model digits did not finish a task within 0\.3 s and was killed"):
            await runner.run(str(tmp_path / "in.jsonl"), "jsonl", 0, 1, str(tmp_path / "out"), timeout_s=0.3)
        assert not runner.alive
        with pytest.raises(ModelFailed, match=r"died: signal 9 \(killed\)"):
            await runner.count(str(tmp_path / "in.jsonl"), "jsonl", timeout_s=LIMIT_S)

    with_child(work, tmp_path, endless(tmp_path / "m"))


def test_a_child_killed_in_the_middle_of_a_task_says_how_it_died(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"[1, 2]\n")

    async def work(runner: ChildRunner) -> None:
        task: asyncio.Task[Ran] = asyncio.create_task(
            runner.run(str(tmp_path / "in.jsonl"), "jsonl", 0, 1, str(tmp_path / "out"), timeout_s=LIMIT_S)
        )
        await until(lambda: (tmp_path / "out").exists())
        os.kill(runner.pid, signal.SIGSEGV)
        with pytest.raises(ModelFailed, match=r"model digits died: signal 11 \(segmentation fault\)"):
            await task

    with_child(work, tmp_path, endless(tmp_path / "m"))


def test_who_stops_waiting_has_killed_the_child(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"[1, 2]\n")

    async def work(runner: ChildRunner) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await runner.run(str(tmp_path / "in.jsonl"), "jsonl", 0, 1, str(tmp_path / "out"), timeout_s=LIMIT_S)
        assert not runner.alive

    with_child(work, tmp_path, endless(tmp_path / "m"))


def test_a_file_that_is_no_model_is_refused_and_the_child_can_load_another(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "model.onnx").write_bytes(b"#!/bin/sh")

    async def work(runner: ChildRunner) -> None:
        with pytest.raises(ModelFailed, match=r"^model.onnx cannot be loaded: ") as caught:
            await runner.load("wrong", str(wrong), "onnx", threads=1, timeout_s=LIMIT_S)
        assert "\n" not in str(caught.value)
        assert (await runner.load("right", str(digits(tmp_path)), "onnx", threads=1, timeout_s=LIMIT_S)).startswith(
            "image"
        )

    with_child(work, tmp_path)


def test_the_child_is_nice_alone_in_its_group_and_knows_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDUNNO_SECRET", "hunter2")

    async def work(runner: ChildRunner) -> None:
        process = Path(f"/proc/{runner.pid}")
        assert b"hunter2" not in (process / "environ").read_bytes()
        assert os.getpgid(runner.pid) == os.getsid(runner.pid) == runner.pid
        assert os.getpriority(os.PRIO_PROCESS, runner.pid) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
        limits = (process / "limits").read_text()
        assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core")] == ["0"]

    with_child(work, tmp_path)


def test_the_child_ends_when_its_stdin_does(tmp_path: Path) -> None:
    async def run() -> None:
        runner = await ChildFactory(str(tmp_path))()
        assert isinstance(runner, ChildRunner)
        await runner.close()
        assert runner.returncode == 0

    asyncio.run(run())


async def scripted(code: str) -> ChildRunner:
    """A process that is not ours at all: it runs `code`, with struct, sys, os and time imported."""
    loop = asyncio.get_running_loop()
    transport, pipes = await loop.subprocess_exec(
        lambda: Pipes(loop), sys.executable, "-c", f"import os, struct, sys, time\n{code}", start_new_session=True
    )
    return ChildRunner(transport, pipes)


def test_a_child_does_not_choose_what_its_refusal_means() -> None:
    """A task that is "not ready" is given back and not counted: a hostile model could have it lent for ever."""

    async def run() -> None:
        ready, refused = protocol.encode(protocol.Ready()), protocol.encode(protocol.Refused("not-ready", "no" * 5000))
        runner = await scripted(f"os.write(1, {ready!r}); os.read(0, 100); os.write(1, {refused!r}); time.sleep(60)")
        await runner.started()
        with pytest.raises(ModelFailed) as caught:
            await runner.count("x", "zip", timeout_s=LIMIT_S)
        assert len(str(caught.value)) <= 1000
        await runner.close()

    asyncio.run(run())


def group(leader: int) -> list[str]:
    """The living processes of a group; the dead ones may wait for their parent to look."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == leader and state != "Z":
                found.append(stat.parent.name)
    return found


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "sys.stderr.write('line\\n' * 100_000 + 'no memory for it\\n'); sys.exit(3)",
            r"exit status 3; last lines: .*no memory",
        ),
        ("sys.stderr.write('x' * 10_000_000); os.abort()", r"signal 6 \(aborted\); last lines: x+"),
        ("print('hello', flush=True); time.sleep(60)", "broke the protocol and was killed: a frame has 1 to"),
        ("os.write(1, b'\\x01\\0\\0\\0?'); time.sleep(60)", "broke the protocol and was killed: 1 bytes are no answer"),
        ("os.fork() or time.sleep(60); os._exit(4)", "exit status 4"),
    ],
)
def test_a_process_that_does_not_keep_the_protocol_ends_in_one_bounded_line(code: str, told: str) -> None:
    async def run() -> None:
        runner = await scripted(code)
        with pytest.raises(ModelFailed, match=told) as caught:
            await runner.started()
        assert len(str(caught.value)) < 1_000
        assert "\n" not in str(caught.value)
        await until(lambda: group(runner.pid) == [])  # nothing of it is left, what it forked included
        await runner.close()

    asyncio.run(run())


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_a_decode_error(content: bytes) -> None:
    for decode in (protocol.decode_answer, protocol.decode_request):
        with contextlib.suppress(DecodeError):
            decode(content)
    with contextlib.suppress(DecodeError):
        assert 1 <= protocol.frame_length(content[:4].ljust(4, b"\0")) <= protocol.FRAME_BYTES_MAX


def test_the_environment_is_a_short_list() -> None:
    made = child_environment({"PATH": "/bin", "HOME": "/root", "AWS_SECRET_ACCESS_KEY": "x", "PYTHONPATH": "/a"})
    assert set(made) == {"PATH", "PYTHONPATH", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONUNBUFFERED"}
    assert made["PYTHONPATH"].endswith(":/a")


def test_endings_are_told_in_words() -> None:
    assert ending(-9) == "signal 9 (killed)"
    assert ending(3) == "exit status 3"


def test_every_state_of_a_runner_can_die() -> None:
    assert all(events["died"] == "dead" for events in RUNNER.values())

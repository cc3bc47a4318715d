# Deploying, and a job's way from its input to its results.
from __future__ import annotations

import asyncio
import zipfile
from collections.abc import Awaitable, Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idunno.base.errors import (
    DeadlineExceeded,
    DecodeError,
    InvalidArgument,
    ModelFailed,
    NotFound,
    NotReady,
    Unavailable,
)
from idunno.client.api import Cluster
from idunno.grep.messages import QUERY, Query, QueryAnswer
from idunno.scheduler.messages import ModelInfo, ModelWorker, OutputInfo, TaskCounts
from idunno.wire.calls import Call
from tests.unit.client import fake as support
from tests.unit.client.fake import FakeCluster, job_info, model


def play(fake: FakeCluster, body: Callable[[Cluster], Awaitable[Any]], *, timeout_s: float | None = None) -> Any:
    async def story() -> Any:
        async with await fake.connect(timeout_s) as cluster:
            return await body(cluster)

    return asyncio.run(story())


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "digits.onnx"
    path.write_bytes(b"not looked at here")
    return path


# -- deploy -----------------------------------------------------------------------------------------------------------


def test_deploying_waits_until_every_worker_is_ready_and_shows_each_step(onnx: Path) -> None:
    fake = FakeCluster()
    half = [ModelWorker("n1", "ready"), ModelWorker("n2", "assigned")]
    fake.world.model_story = [model("digits", "undeployed", workers=half), model("digits")]
    seen: list[ModelInfo] = []
    info = play(fake, lambda cluster: cluster.deploy("digits", onnx, weight=2.0, progress=seen.append))
    assert info.state == "deployed"
    assert [[worker.state for worker in step.workers] for step in seen] == [
        ["assigned"],
        ["ready", "assigned"],
        ["ready", "ready"],
    ]
    (request,) = fake.world.asked("model.deploy")
    assert (request.runtime, request.weight, request.workers) == ("onnx", 2.0, 0)
    (file,) = request.files
    assert (file.path, file.name) == ("digits.onnx", f".idunno/models/digits/{request.request}/digits.onnx")
    assert fake.world.newest(file.name).content == b"not looked at here"


def test_a_model_that_cannot_be_set_up_names_each_reason(onnx: Path) -> None:
    fake = FakeCluster()
    workers = [ModelWorker("n1", "failed", "no protobuf"), ModelWorker("n2", "failed", "no protobuf")]
    fake.world.model_story = [model("digits", "failed", workers=workers)]
    with pytest.raises(ModelFailed, match="digits version 1 failed: n1: no protobuf; n2: no protobuf"):
        play(fake, lambda cluster: cluster.deploy("digits", onnx))


def test_a_deployment_that_takes_too_long_says_who_is_missing_and_that_it_goes_on(onnx: Path) -> None:
    with pytest.raises(DeadlineExceeded, match=r"0 of 1 workers ready, not n1\); it goes on: see `idunno explain dig"):
        play(FakeCluster(), lambda cluster: cluster.deploy("digits", onnx), timeout_s=0.4)


def test_only_onnx_files_are_models_in_this_version(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"x")
    (tmp_path / "e.onnx").write_bytes(b"")
    fake = FakeCluster()
    for path, text in [("m.pt", "is a .pt file: only"), (".", "is a folder: only"), ("e.onnx", "is empty")]:
        with pytest.raises(InvalidArgument, match=text):
            play(fake, partial(Cluster.deploy, model="m", path=tmp_path / path))
    with pytest.raises(FileNotFoundError):
        play(fake, lambda cluster: cluster.deploy("m", tmp_path / "gone.onnx"))
    with pytest.raises(InvalidArgument, match="cannot name a model"):
        play(fake, lambda cluster: cluster.deploy("a/b", tmp_path / "e.onnx"))
    assert fake.world.requests == []


def test_models_and_assignments_of_several_pages_are_one_list() -> None:
    fake = FakeCluster()
    names = [f"m{i}" for i in range(5)]
    fake.world.models = {name: model(name) for name in names}
    assert [row.model for row in play(fake, Cluster.models)] == names
    assert [request.after for request in fake.world.asked("model.ls")] == ["", "m1", "m3"]
    assert [row.node for row in play(fake, Cluster.assignments)] == ["n1", "n2", "n3"]


# -- infer ------------------------------------------------------------------------------------------------------------


def ready() -> FakeCluster:
    fake = FakeCluster()
    fake.world.models["digits"] = model("digits")
    return fake


def test_a_folder_is_packed_uploaded_and_submitted_under_the_jobs_own_name(tmp_path: Path) -> None:
    for name in ("2.png", "1.png"):
        (tmp_path / name).write_bytes(name.encode())
    fake = ready()
    job = play(fake, lambda cluster: cluster.infer("digits", tmp_path, batch_size=7))
    (submitted,) = fake.world.submitted
    assert submitted.job == job.id
    assert (submitted.input_name, submitted.input_kind) == (f".idunno/jobs/{job.id}/input", "zip")
    assert (submitted.input_version, submitted.batch_size) == (1, 7)
    with zipfile.ZipFile(BytesIO(fake.world.newest(submitted.input_name).content)) as archive:
        assert archive.namelist() == ["1.png", "2.png"]


def test_an_array_is_uploaded_as_npy_and_a_list_of_paths_as_an_archive(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"png")
    fake = ready()
    array = np.arange(6.0).reshape(2, 3)
    play(fake, lambda cluster: cluster.infer("digits", array))
    play(fake, lambda cluster: cluster.infer("digits", [tmp_path / "1.png"]))
    play(fake, lambda cluster: cluster.infer("digits", [[1.0, 2.0], [3.0, 4.0]]))
    assert [submitted.input_kind for submitted in fake.world.submitted] == ["npy", "zip", "npy"]
    stored = fake.world.newest(fake.world.submitted[0].input_name).content
    assert (np.load(BytesIO(stored)) == array).all()
    with pytest.raises(InvalidArgument, match="int is no input"):
        play(fake, lambda cluster: cluster.infer("digits", 7))


def test_a_file_that_is_stored_already_is_not_sent_again() -> None:
    fake = ready()
    fake.world.put("in/a.zip", b"1")
    fake.world.put("in/a.zip", b"2")
    play(fake, lambda cluster: cluster.infer("digits", "sdfs:in/a.zip"))
    (submitted,) = fake.world.submitted
    assert (submitted.input_name, submitted.input_version, submitted.input_kind) == ("in/a.zip", 2, "zip")
    assert fake.world.asked("file.put-small") == []
    with pytest.raises(NotFound, match=r"no file gone\.zip"):
        play(fake, lambda cluster: cluster.infer("digits", "sdfs:gone.zip"))


def test_nothing_is_uploaded_for_a_model_that_cannot_serve(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    fake = ready()
    with pytest.raises(NotFound, match="no model 'digit'; known are: digits"):
        play(fake, lambda cluster: cluster.infer("digit", tmp_path / "a.npy"))
    fake.world.models["digits"] = model("digits", "undeployed", reason="n2 is still loading")
    with pytest.raises(NotReady, match=r"digits is undeployed \(n2 is still loading\): see `idunno explain digits`"):
        play(fake, lambda cluster: cluster.infer("digits", tmp_path / "a.npy"))
    with pytest.raises(FileNotFoundError):
        play(fake, lambda cluster: cluster.infer("digits", tmp_path / "gone"))
    assert fake.world.files == {}


def test_a_submission_whose_answer_was_lost_finds_its_job(tmp_path: Path) -> None:
    fake = ready()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    tries = 0

    def after(method: str) -> None:
        nonlocal tries
        if method == "job.submit":
            tries += 1
            fake.world.lost = {"n1", "n2"} if tries <= 2 else set()

    fake.world.after = after
    job = play(fake, lambda cluster: cluster.infer("digits", tmp_path / "a.npy"))
    assert {submitted.job for submitted in fake.world.submitted} == {job.id}
    assert len(fake.world.submitted) == 3


# -- waiting and results ----------------------------------------------------------------------------------------------


def part(fake: FakeCluster, task: int, first: int, last: int, **more: Any) -> OutputInfo:
    name = f".idunno/jobs/j/{task}"
    lines = b"".join(b'{"query":%d,"output":%d}\n' % (query, query * 10) for query in range(first, last))
    fake.world.put(name, lines if more.pop("newline", True) else lines.rstrip(b"\n"))
    return OutputInfo(task, first, last, name, len(lines))


async def collect(cluster: Cluster, job: str) -> list[dict[str, Any]]:
    return [row async for row in cluster.results(job)]


def test_results_come_in_input_order_with_an_error_line_for_each_query_of_a_failed_task() -> None:
    fake = ready()
    fake.world.jobs["j"] = job_info("j", "failed", 10, 6, reason="task 1 failed 3 times")
    fake.world.outputs["j"] = [
        part(fake, 2, 6, 9),
        OutputInfo(1, 3, 6, error="n1: the model died"),
        part(fake, 0, 0, 3, newline=False),
    ]
    rows = play(fake, lambda cluster: collect(cluster, "j"))
    assert [row["query"] for row in rows] == list(range(10))
    assert rows[2] == {"query": 2, "output": 20}
    assert rows[4] == {"query": 4, "error": "n1: the model died"}
    assert rows[9] == {"query": 9, "error": "job failed: task 1 failed 3 times"}


def test_results_of_a_running_job_are_given_out_as_they_come_and_never_out_of_order() -> None:
    fake = ready()
    first, second, third = (part(fake, i, i * 2, i * 2 + 2) for i in range(3))
    steps = [[second], [second, first], [first, second], [first, second, third]]
    fake.world.jobs["j"] = job_info("j", "running", 6)
    seen: list[int] = []

    def after(method: str) -> None:
        if method == "job.outputs":
            seen.append(len(fake.world.outputs["j"]))
            if len(steps) > 1:
                fake.world.outputs["j"] = steps.pop(0)
            else:
                fake.world.outputs["j"] = steps[0]
                fake.world.jobs["j"] = job_info("j", "success", 6, 6)

    fake.world.outputs["j"] = []
    fake.world.after = after
    rows = play(fake, lambda cluster: collect(cluster, "j"))
    assert [row["query"] for row in rows] == list(range(6))
    assert seen[:3] == [0, 1, 2]


def test_many_parts_are_fetched_a_few_at_a_time_and_leaving_early_ends_the_others() -> None:
    fake = ready()
    fake.world.jobs["j"] = job_info("j", "success", 100, 100)
    fake.world.outputs["j"] = [part(fake, i, i, i + 1) for i in range(100)]

    async def body(cluster: Cluster) -> None:
        lines = cluster.result_lines("j")
        assert [await anext(lines) for _ in range(3)][-1] == b'{"query":2,"output":20}\n'
        await lines.aclose()
        assert len(asyncio.all_tasks()) < 10

    play(fake, body)
    assert len(fake.world.asked("file.stat")) <= 8


def test_waiting_reports_progress_and_ends_with_the_job() -> None:
    fake = ready()
    fake.world.jobs["j"] = job_info("j", "planning")
    fake.world.job_story = [
        job_info("j", "planning"),
        job_info("j", "running", 10, 4),
        job_info("j", "success", 10, 10),
    ]
    heard: list[int] = []
    info = play(fake, lambda cluster: cluster.wait("j", lambda info: heard.append(info.done)))
    assert (info.state, heard) == ("success", [0, 4, 10])


def test_waiting_too_long_says_how_far_the_job_is_and_that_it_goes_on() -> None:
    fake = ready()
    fake.world.jobs["j"] = job_info("j", "running", 10, 4, tasks=TaskCounts(ready=1))
    with pytest.raises(DeadlineExceeded, match=r"job j is running after 0\.4 s, 4 of 10 queries answered; it goes on"):
        play(fake, lambda cluster: cluster.wait("j"), timeout_s=0.4)


def test_waiting_goes_on_through_an_election() -> None:
    fake = ready()
    fake.world.jobs["j"] = job_info("j", "success", 1, 1)
    errors = [Unavailable("the scheduler is gone")] * 3
    fake.world.trouble = lambda node, method: errors.pop() if errors else None
    assert play(fake, lambda cluster: cluster.wait("j")).state == "success"


# -- grep -------------------------------------------------------------------------------------------------------------


def test_lines_that_cannot_be_read_are_an_error_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nonsense(world: support.World, call: Call[Query]) -> QueryAnswer:
        await call.send(note=b"\xc1nonsense")
        return QueryAnswer({}, {}, {}, 0.0, False)

    others = [pair for pair in support.HANDLERS if pair[0] is not QUERY]
    monkeypatch.setattr(support, "HANDLERS", [*others, (QUERY, nonsense)])
    with pytest.raises(DecodeError, match="are no lines"):
        play(FakeCluster(1), lambda cluster: cluster.grep("x", lambda lines: None))


def test_what_was_uploaded_for_a_refused_job_or_deployment_is_taken_away_again(tmp_path: Path, onnx: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    fake = ready()
    refused = InvalidArgument("batch size 1000000 is too large")
    fake.world.trouble = lambda node, method: refused if method in ("job.submit", "model.deploy") else None
    with pytest.raises(InvalidArgument, match="too large"):
        play(fake, lambda cluster: cluster.infer("digits", tmp_path / "a.npy", batch_size=1_000_000))
    with pytest.raises(InvalidArgument, match="too large"):
        play(fake, lambda cluster: cluster.deploy("digits", onnx))
    assert len(fake.world.asked("file.put-small")) == 2
    assert fake.world.files == {}

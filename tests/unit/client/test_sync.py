# The same cluster for programs without asyncio.
from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from io import BytesIO

import pytest

from idunno.base.errors import NotFound, Unavailable
from idunno.client import api, sync
from tests.unit.client.fake import FakeCluster, job_info, model
from tests.unit.client.test_models_and_jobs import part


def test_files_and_results_without_asyncio() -> None:
    fake = FakeCluster()
    fake.world.jobs["j"] = job_info("j", "success", 3, 3)
    fake.world.outputs["j"] = [part(fake, 0, 0, 3)]
    with sync._connect(fake.connect) as cluster:
        cluster.put(BytesIO(b"hello"), "a")
        target = BytesIO()
        cluster.get("a", target)
        assert target.getvalue() == b"hello"
        assert [row["output"] for row in cluster.results("j")] == [0, 10, 20]
        with pytest.raises(NotFound):
            cluster.versions("gone")
    assert not [thread for thread in threading.enumerate() if thread.name == "idunno-client"]


def test_a_job_is_followed_from_its_array_to_its_results() -> None:
    fake = FakeCluster()
    fake.world.models["digits"] = model("digits")
    with sync._connect(fake.connect) as cluster:
        job = cluster.infer("digits", [[1.0], [2.0]], batch_size=64)
        fake.world.jobs[job.id] = job_info(job.id, "success", 2, 2)
        fake.world.outputs[job.id] = [part(fake, 0, 0, 2)]
        assert job.wait().state == "success"
        assert [row["query"] for row in job.results()] == [0, 1]


def test_results_left_half_way_do_not_outlive_the_connection() -> None:
    fake = FakeCluster()
    fake.world.jobs["j"] = job_info("j", "success", 50, 50)
    fake.world.outputs["j"] = [part(fake, i, i, i + 1) for i in range(50)]
    cluster = sync._connect(fake.connect)
    rows = cluster.results("j")
    assert next(rows)["query"] == 0
    cluster.close()
    del rows
    with pytest.raises(RuntimeError, match="closed"):
        cluster.ls()


def test_a_connection_that_fails_leaves_no_thread() -> None:
    fake = FakeCluster(1)
    fake.world.down = {"n1"}
    with pytest.raises(Unavailable):
        sync._connect(fake.connect)
    assert not [thread for thread in threading.enumerate() if thread.name == "idunno-client"]


@pytest.mark.parametrize(("mirror", "original"), [(sync.Cluster, api.Cluster), (sync.Job, api.Job)])
def test_every_method_is_mirrored_with_the_same_arguments(mirror: type, original: type) -> None:
    for name, method in inspect.getmembers(original, inspect.isfunction):
        if name.startswith("_") or name == "result_lines":  # lines are for the command line
            continue
        twin = getattr(mirror, name)
        assert list(inspect.signature(twin).parameters) == list(inspect.signature(method).parameters), name


def test_importing_idunno_is_light() -> None:
    program = (
        "import sys, idunno; print([m for m in sys.modules if m.split('.')[0] in ('asyncio', 'msgspec', 'numpy')])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"

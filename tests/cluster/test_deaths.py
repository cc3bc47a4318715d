# What a user would lose sleep over: machines die while jobs run and files are written.
from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from tests.cluster.answers import check_digits
from tests.cluster.harness import DIGITS, Cluster, CommandFailed, until

pytestmark = pytest.mark.cluster


class Writer(threading.Thread):
    """Puts files one after another until told to stop, and remembers what was acknowledged."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        super().__init__(name="writer")
        self._cluster, self._directory = cluster, directory
        self._rng = random.Random(7)
        self._stopped = threading.Event()
        self.acknowledged: dict[str, bytes] = {}
        self.refused: list[CommandFailed] = []

    def run(self) -> None:
        number = 0
        while not self._stopped.is_set():
            number += 1
            # Small ones ride in the log, larger ones travel as blocks.
            content = self._rng.randbytes(self._rng.choice([100, 4096, 4097, 300_000]))
            local = self._directory / f"out-{number}"
            local.write_bytes(content)
            try:
                self._cluster.json("put", str(local), f"files/{number}", timeout_s=30.0)
            except CommandFailed as failure:
                self.refused.append(failure)
            else:
                self.acknowledged[f"files/{number}"] = content

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=90.0)
        assert not self.is_alive(), "a put did not end within its timeout"

    def check(self, cluster: Cluster, directory: Path) -> None:
        """Everything acknowledged is there, byte for byte; what was refused was refused clearly."""
        assert self.acknowledged, "nothing was acknowledged: the test proves nothing"
        cluster.command("get", "files/", str(directory / "back"))
        for name, content in self.acknowledged.items():
            assert (directory / "back" / name.removeprefix("files/")).read_bytes() == content, name
        for failure in self.refused:
            assert failure.status in (1, 3)
            assert failure.error.strip().splitlines()[-1].startswith("error: "), failure.error


def progress(cluster: Cluster, job: str) -> float:
    row = cluster.job(job)
    return float(row["done"] / row["queries"]) if row["queries"] else 0.0


def finished(cluster: Cluster, job: str, *, timeout_s: float = 90.0) -> None:
    until(lambda: cluster.job(job)["state"] not in ("planning", "running"), "the job's end", timeout_s=timeout_s)
    row = cluster.job(job)
    assert row["state"] == "success", row


@pytest.mark.parametrize("victim", ["scheduler", "worker"])
def test_one_node_of_five_is_killed_while_a_job_runs_and_files_are_put(victim: str, tmp_path: Path) -> None:
    with Cluster(5) as cluster:
        cluster.json("deploy", "digits", str(DIGITS / "digits.onnx"))
        writer = Writer(cluster, tmp_path)
        writer.start()
        job = cluster.json("infer", "digits", str(DIGITS / "digits.zip"), "--batch-size", "4", "--no-wait")["job"]
        until(lambda: progress(cluster, job) >= 0.1, "a tenth of the job")
        scheduler = cluster.scheduler()
        dead = scheduler if victim == "scheduler" else next(name for name in cluster.names() if name != scheduler)
        cluster.kill(dead)
        finished(cluster, job)
        writer.stop()
        cluster.command("results", job, "--output", str(tmp_path / "answers.jsonl"))
        check_digits(tmp_path / "answers.jsonl")
        writer.check(cluster, tmp_path)
        assert cluster.scheduler() != dead or victim == "worker"


def test_three_nodes_of_ten_are_killed_at_once(tmp_path: Path) -> None:
    with Cluster(10) as cluster:
        cluster.json("deploy", "digits", str(DIGITS / "digits.onnx"), "--workers", "4")
        writer = Writer(cluster, tmp_path)
        writer.start()
        job = cluster.json("infer", "digits", str(DIGITS / "digits.zip"), "--batch-size", "4", "--no-wait")["job"]
        until(lambda: progress(cluster, job) >= 0.1, "a tenth of the job", timeout_s=60.0)
        scheduler = cluster.scheduler()
        workers = [worker["node"] for worker in cluster.json("assignments") if worker["models"]]
        victims = [scheduler, *[name for name in workers if name != scheduler][:2]]
        for name in victims:
            cluster.kill(name)
        finished(cluster, job, timeout_s=120.0)
        writer.stop()
        cluster.command("results", job, "--output", str(tmp_path / "answers.jsonl"))
        check_digits(tmp_path / "answers.jsonl")
        writer.check(cluster, tmp_path)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_whole_cluster_comes_back(how: str, tmp_path: Path) -> None:
    with Cluster(5) as cluster:
        cluster.json("deploy", "digits", str(DIGITS / "digits.onnx"))
        done = cluster.json("infer", "digits", str(DIGITS / "digits.zip"), "--output", str(tmp_path / "first.jsonl"))
        content = random.Random(1).randbytes(200_000)
        (tmp_path / "file").write_bytes(content)
        cluster.json("put", str(tmp_path / "file"), "kept/file")
        cluster.json("put", str(DIGITS / "labels.csv"), "kept/file")
        job = cluster.json("infer", "digits", str(DIGITS / "digits.zip"), "--batch-size", "4", "--no-wait")["job"]
        until(lambda: progress(cluster, job) >= 0.1, "a tenth of the job")
        if how == "killed":
            for name in cluster.names():
                cluster.kill(name)
        else:
            assert cluster.down() == {"stopped": 5, "killed": 0, "purged": False}
        assert cluster.living() == []
        cluster.up()
        assert cluster.json("models")[0]["state"] == "deployed"
        cluster.json("get", "kept/file", str(tmp_path / "back"), "--version", "1")
        assert (tmp_path / "back").read_bytes() == content
        assert [row["version"] for row in cluster.json("versions", "kept/file")] == [2, 1]
        cluster.command("results", done["job"], "--output", str(tmp_path / "again.jsonl"))
        assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
        finished(cluster, job)  # by itself: nobody asked for it
        cluster.command("results", job, "--output", str(tmp_path / "second.jsonl"))
        check_digits(tmp_path / "second.jsonl")


def test_three_of_five_dead_writing_waits_with_a_reason_and_goes_on_when_one_returns(tmp_path: Path) -> None:
    with Cluster(5) as cluster:
        (tmp_path / "file").write_bytes(b"x" * 10_000)
        cluster.json("put", str(tmp_path / "file"), "before")
        for name in ("n3", "n4", "n5"):
            cluster.kill(name)
        with pytest.raises(CommandFailed) as caught:
            cluster.json("put", str(tmp_path / "file"), "during", timeout_s=5.0)
        assert caught.value.status in (1, 3)
        status = until(
            lambda: (found := cluster.json("status"))["scheduler"] is None and found, "the loss of the scheduler"
        )
        assert not status["healthy"]
        assert "no quorum: 2 of 5" in status["why"], status["why"]
        cluster.up()  # starts what does not run
        cluster.json("get", "before", str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == b"x" * 10_000
        assert json.loads(json.dumps(cluster.json("put", str(tmp_path / "file"), "after")))["copies"] >= 4

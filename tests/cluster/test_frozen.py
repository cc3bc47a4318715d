# A leader that stands still and comes back: another leads meanwhile, and it answers nothing stale.
from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import idunno
from idunno.base.errors import IdunnoError
from tests.cluster.harness import Cluster, until

pytestmark = pytest.mark.cluster


def test_a_frozen_leader_is_replaced_and_answers_nothing_stale_when_it_comes_back(tmp_path: Path) -> None:
    with Cluster(3) as cluster:
        leader = cluster.scheduler()
        other = next(name for name in cluster.names() if name != leader)
        doors = {name: str(cluster.directory / name) for name in (leader, other)}
        (tmp_path / "old").write_bytes(b"old" * 100)
        (tmp_path / "new").write_bytes(b"new" * 100)
        with idunno.connect(doors[leader], timeout_s=20.0) as at_leader, idunno.connect(doors[other]) as at_other:
            at_leader.put(tmp_path / "old", "file")
            before = at_leader.status()
            os.kill(cluster.pid(leader), signal.SIGSTOP)
            try:
                begun = time.monotonic()
                assert at_other.put(tmp_path / "new", "file").version == 2
                waited = time.monotonic() - begun
                meanwhile = at_other.status()
            finally:
                os.kill(cluster.pid(leader), signal.SIGCONT)
            assert waited < 15, "an election takes two seconds"
            assert meanwhile.scheduler != leader
            assert meanwhile.term > before.term

            # What it is asked first is asked before it can have heard of its successor.
            deadline = time.monotonic() + 5
            answered = 0
            while time.monotonic() < deadline and answered < 20:
                try:
                    at_leader.get("file", tmp_path / "back")
                except IdunnoError:
                    continue  # it may say that it cannot know; nothing stale
                assert (tmp_path / "back").read_bytes() == b"new" * 100
                answered += 1
            assert answered == 20
            until(lambda: at_leader.status().term >= meanwhile.term, "it has heard of the new term")
            assert at_leader.status().scheduler == meanwhile.scheduler
            assert at_leader.put(tmp_path / "old", "file").version == 3

# A file far larger than what anybody may hold of it.
from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.harness import Cluster

pytestmark = pytest.mark.cluster

SIZE = 300 * 1024 * 1024
HELD_MB_MAX = 64

_MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "idunno", *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"status": done.returncode, "peak_mb": peak_kb / 1024, "answer": json.loads(done.stdout or "null")}))
"""


def test_300_mb_are_put_and_got_and_nobody_holds_more_than_64_mb_of_them(tmp_path: Path) -> None:
    rng = random.Random(11)
    digest = hashlib.sha256()
    with open(tmp_path / "large", "wb") as file:
        for _ in range(SIZE // 1024 // 1024):
            piece = rng.randbytes(1024 * 1024)
            digest.update(piece)
            file.write(piece)
    (tmp_path / "tiny").write_bytes(b"x" * 10_000)

    with Cluster(5) as cluster:

        def peak_mb(name: str) -> float:
            lines = Path(f"/proc/{cluster.pid(name)}/status").read_text().splitlines()
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

        def measured(*words: str) -> float:
            """Run a command; its own peak of resident memory, in MB."""
            done = subprocess.run(
                [sys.executable, "-c", _MEASURE, *words, "--json"],
                env=cluster.environment(),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout)
            assert found["status"] == 0, done.stdout
            return float(found["peak_mb"])

        idle_client = max(
            measured("put", str(tmp_path / "tiny"), "tiny"), measured("get", "tiny", str(tmp_path / "tiny-back"))
        )
        idle = {}
        for name in cluster.names():
            Path(f"/proc/{cluster.pid(name)}/clear_refs").write_text("5")  # begin a new peak
            idle[name] = cluster.resident_mb(name)
        put = measured("put", str(tmp_path / "large"), "large")
        get = measured("get", "large", str(tmp_path / "back"))
        for name in cluster.names():
            assert peak_mb(name) - idle[name] < HELD_MB_MAX, (name, idle[name], peak_mb(name))
        assert put - idle_client < HELD_MB_MAX, (put, idle_client)
        assert get - idle_client < HELD_MB_MAX, (get, idle_client)

        back = hashlib.sha256()
        with open(tmp_path / "back", "rb") as got:
            while piece := got.read(1024 * 1024):
                back.update(piece)
        assert back.digest() == digest.digest()
        where = cluster.json("where", "large")
        assert where["copies"] == {"wanted": 4, "found": 4}
        assert len(where["blocks"]) == SIZE // (8 * 1024 * 1024) + 1
    for path in ("large", "back"):
        (tmp_path / path).unlink()

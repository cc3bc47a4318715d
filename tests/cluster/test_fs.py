# The filesystem over a real cluster, through the same doors as numpy's and csv's users take.
from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from idunno.fs import ConflictError
from idunno.fs.connection import close_all
from tests.cluster.harness import Cluster

pytestmark = pytest.mark.cluster

MB = 1024 * 1024
STREAM_MB = 200
HELD_MB_MAX = 80

_STREAM = f"""
import fsspec
fs = fsspec.filesystem("idunno")
def mb(field):  # not ru_maxrss: that one begins with the parent's
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))
piece = bytes(range(256)) * 4096
fs.pipe_file("warm", piece * 9)
before = mb("VmRSS")
with fs.open("large", "wb") as file:
    for number in range({STREAM_MB}):
        file.write(number.to_bytes(8, "big") + piece[8:])
with fs.open("large") as file:
    for number in range({STREAM_MB}):
        assert file.read(len(piece)) == number.to_bytes(8, "big") + piece[8:], number
    assert file.read() == b""
print(mb("VmHWM") - before)
"""


def test_numpy_csv_and_large_files_on_a_cluster(tmp_path: Path) -> None:
    with Cluster(3) as cluster:
        where = str(cluster.directory)
        try:
            fs = fsspec.filesystem("idunno", where=where)

            array = np.random.default_rng(1).random((500, 300))
            with fsspec.open("idunno://data/array.npy", "wb", where=where) as file:
                np.save(file, array)
            with fsspec.open("idunno://data/array.npy", where=where) as file:
                assert np.array_equal(np.load(file), array)
            with fsspec.open("idunno://data/table.csv.gz", "w", where=where, compression="infer", newline="") as file:
                csv.writer(file).writerows([number, number**2] for number in range(1_000))
            with fsspec.open("idunno://data/table.csv.gz", "r", where=where, compression="infer") as file:
                assert [int(square) for _, square in csv.reader(file)][-1] == 999**2
            assert fs.glob("data/*") == ["data/array.npy", "data/table.csv.gz"]

            content = random.Random(3).randbytes(20 * MB)
            (tmp_path / "large").write_bytes(content)
            fs.put(str(tmp_path / "large"), "large")
            fs.get("large", str(tmp_path / "back"))
            assert (tmp_path / "back").read_bytes() == content
            assert fs.cat_file("large", start=-9 * MB, end=-MB) == content[-9 * MB : -MB]
            with fs.open("large", "ab") as file:
                file.write(b"more")
            with fs.open("large") as file, fs.open("large", version=1) as old:
                assert (file.read(), old.read()) == (content + b"more", content)

            with pytest.raises(FileExistsError):
                fs.pipe_file("large", b"", mode="create")
            slow = fs.open("data/table.csv.gz", "ab")
            fs.pipe_file("data/table.csv.gz", b"theirs")
            with pytest.raises(ConflictError, match="wanted version 1"):
                slow.close()

            done = subprocess.run(
                [sys.executable, "-c", _STREAM],
                env=cluster.environment(),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert float(done.stdout) < HELD_MB_MAX, done.stdout

            fs.rm(["data", "large"], recursive=True)
            assert not fs.exists("data")
            assert not fs.exists("large")
        finally:
            close_all()

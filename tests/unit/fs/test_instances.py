# Instances: arguments, threads, processes.
from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading

import fsspec
import pytest

from idunno.fs import IdunnoFileSystem, connection
from tests.unit.client.fake import FakeCluster


def test_the_protocol_is_registered() -> None:
    assert fsspec.get_filesystem_class("idunno") is IdunnoFileSystem


def test_paths_are_names_whatever_stands_before_them() -> None:
    strip = IdunnoFileSystem._strip_protocol
    for path in ("a/b", "/a/b", "a/b/", "idunno://a/b", "idunno:///a/b/", "idunno::a/b"):
        assert strip(path) == "a/b", path
    assert [strip(path) for path in ("", "/", "idunno://")] == ["", "", ""]
    assert strip(["idunno://a", "/b"]) == ["a", "b"]
    assert IdunnoFileSystem._parent("idunno://a/b/c") == "a/b"
    assert fsspec.core.url_to_fs("idunno://a/b", where="/x")[1] == "a/b"


def test_equal_arguments_are_one_instance_also_pickled() -> None:
    one = IdunnoFileSystem(where="/x", timeout_s=5.0)
    assert one is IdunnoFileSystem(where="/x", timeout_s=5.0)
    assert one is not IdunnoFileSystem(where="/y", timeout_s=5.0)
    assert pickle.loads(pickle.dumps(one)) is one
    assert fsspec.AbstractFileSystem.from_json(one.to_json()) is one


def test_nothing_connects_before_it_is_needed(fake: FakeCluster) -> None:
    fs = IdunnoFileSystem("/fake")
    assert fake.dialled == []
    fs.ls("")
    assert len(fake.dialled) == 1


def test_the_filesystem_is_identified_by_its_cluster(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    assert fs.fsid == "idunno_" + "c" * 32


def test_a_cluster_that_cannot_be_reached_is_an_oserror(tmp_path: os.PathLike[str]) -> None:
    fs = IdunnoFileSystem(os.fspath(tmp_path))
    with pytest.raises(FileNotFoundError, match="no cluster at"):
        fs.ls("")


def test_the_default_cluster_is_that_of_the_moment(fake: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = IdunnoFileSystem()
    monkeypatch.setenv("IDUNNO_CLUSTER", "/one")
    one = fs.connection()
    monkeypatch.setenv("IDUNNO_CLUSTER", "/two")
    assert fs.connection() is not one
    monkeypatch.setenv("IDUNNO_CLUSTER", "/one")
    assert fs.connection() is one is IdunnoFileSystem("/one").connection()


def test_threads_share_one_connection(fake: FakeCluster) -> None:
    wrong: list[int] = []

    def use(number: int) -> None:
        fs = IdunnoFileSystem("/fake")
        for step in range(10):
            content = bytes([number, step]) * 5_000
            with fs.open(f"{number}/{step}", "wb") as file:
                file.write(content)
            if fs.cat_file(f"{number}/{step}") != content or len(fs.ls(str(number))) != step + 1:
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (len(fake.dialled), len(fake.world.files)) == (1, 60)


def in_child(work: object) -> int:
    """Exit status of a forked child that runs `work`."""
    assert callable(work)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_its_own_connection(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    content = os.urandom(20_000)
    fake.world.put("a", content)
    reading, writing = fs.open("a"), fs.open("b", "wb", block_size=10)
    assert reading.read(10) == content[:10]
    writing.write(b"from the parent")

    def child() -> None:
        assert len(fake.dialled) == 1
        assert fs.cat_file("a") == content
        reading.seek(5_000)  # its block is held: from memory
        assert reading.read(10) == content[5_000:5_010]
        again = fs.open("a")
        assert again.read() == content
        assert len(fake.dialled) == 2
        with pytest.raises(OSError, match="before a fork"):
            writing.write(b"from the child, which has no right to it")
        writing.discard()
        writing.close()

    assert in_child(child) == 0
    assert len(fake.dialled) == 1
    writing.close()
    assert fs.cat_file("b") == b"from the parent"
    assert reading.read() == content[10:]
    assert connection._inherited == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_open_file_is_read_on_in_a_forked_child(fake: FakeCluster, fs: IdunnoFileSystem) -> None:
    content = os.urandom(9 * 1024 * 1024)
    fake.world.put("a", content)
    with fs.open("a") as file:
        file.read(10)

        def child() -> None:
            file.seek(-10, 2)  # in another block: it has to be fetched
            assert file.read() == content[-10:]

        assert in_child(child) == 0


def test_connections_end_with_the_process(fake: FakeCluster) -> None:
    IdunnoFileSystem("/fake").ls("")
    assert "idunno-client" in {thread.name for thread in threading.enumerate()}
    connection.close_all()
    assert "idunno-client" not in {thread.name for thread in threading.enumerate()}
    assert IdunnoFileSystem("/fake").ls("") == []  # and is made anew when it is needed


def test_the_filesystem_loads_neither_numpy_nor_the_command_line() -> None:
    code = "import sys, idunno.fs; print([m for m in ('numpy', 'onnxruntime', 'click', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

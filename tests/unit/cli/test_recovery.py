# What a person sees of a recovery, a backup and a restore.
from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.support import Terminal
from tests.unit.node.remains import Remains, machine_of, put, put_small, without_waiting
from tests.unit.node.test_restore import written


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    without_waiting(monkeypatch)


@pytest.fixture
def old(tmp_path: Path) -> Remains:
    made = Remains(tmp_path / "old", 3)
    gone = made.hold(0, b"only on n1")
    made.append(range(3), [(1, payload) for payload in put("files/one", (gone,))] + [(1, put_small("tiny", b"tiny"))])
    return made


def test_what_is_lost_is_shown_and_asked_about(idunno: Terminal, old: Remains) -> None:
    last = str(old.directories[2])
    refused = idunno("recover", "--dir", last, stdin="")
    assert refused.status == 1
    assert "look with --dry-run, then give --yes" in refused.error
    looked = idunno.ok("recover", "--dir", last, "--dry-run")
    assert looked.out == ""
    assert "out of the cluster: n1, n2" in looked.err
    assert "files/one version 1: 1 of 1 blocks" in looked.err
    assert "nothing that was acknowledged should be missing: 2 logs were not seen" in looked.err
    done = idunno.ok("recover", "--dir", last, "--yes")
    cluster, token = done.out.splitlines()
    assert cluster.endswith("of n3")
    assert token.startswith("idunno-")
    assert "idunno join ADDRESS --token TOKEN --dir DIR --adopt" in done.err


def test_a_majority_is_told_that_it_needs_no_recovery(idunno: Terminal, old: Remains) -> None:
    words = [word for directory in old.directories[1:] for word in ("--dir", str(directory))]
    looked = idunno.ok("recover", *words, "--dry-run", "--json")
    assert looked.json["report"]["acknowledged"] == "all-there"
    assert looked.json["recovered"] is False
    assert "started, they go on as they are" in idunno.ok("recover", *words, "--dry-run").err


def test_a_restore_lists_what_has_no_blocks(idunno: Terminal, old: Remains, tmp_path: Path) -> None:
    backup = written(machine_of(old.directories[0])[0], tmp_path / "backup")
    new = str(tmp_path / "new")
    wrong = idunno("restore", str(backup), "--listen", "127.0.0.1:960")
    assert (wrong.status, "give its directory with --dir" in wrong.error) == (2, True)
    done = idunno.ok("restore", str(backup), "--dir", new, "--listen", "127.0.0.1:960", "--name", "first")
    assert "holds 2 files, as of" in done.out
    assert "1 versions lack blocks on these nodes" in done.err
    again = idunno("restore", str(backup), "--dir", new)
    assert again.status == 1
    assert "not empty: it holds 2 versions of files" in again.error


def test_a_passphrase_is_never_on_the_command_line(idunno: Terminal, tmp_path: Path) -> None:
    for words in (["--with-keys"], ["--passphrase-file", "x"]):
        refused = idunno("snapshot", str(tmp_path / "backup"), *words, stdin="")
        assert refused.status == 2, refused.err
    assert "--passphrase-file or $IDUNNO_PASSPHRASE" in idunno("snapshot", "x", "--with-keys", stdin="").error


def test_a_file_that_holds_no_passphrase_is_wrong_usage(idunno: Terminal, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xc7\x00\xff" * 2000)
    outcome = idunno("snapshot", str(tmp_path / "b"), "--with-keys", "--passphrase-file", str(tmp_path / "key"))
    assert outcome.status == 2
    assert "is no text: give the file that holds the passphrase" in outcome.error

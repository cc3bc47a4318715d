# A backup becomes the first state of an empty cluster, whole or not at all; what is there is never overwritten.
from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from idunno.base.errors import Conflict, Corrupt, IdunnoError, InvalidArgument, Unauthenticated
from idunno.coordinator import backup as b
from idunno.coordinator.commands import BeginPut
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import UserRecord
from idunno.node.config import NodeConfig, load_config
from idunno.node.identity import DECIDED, UP_FILE, load_identity, load_peers, load_secrets
from idunno.node.restore import restore
from idunno.sdfs.hashing import block_id
from idunno.wire.security import is_key_of, make_ca
from tests.unit.node.remains import Remains, entry, machine_of, put, put_small, without_waiting
from tests.unit.node.test_recover import Crash, CrashAt, files_of

CONFIG = NodeConfig(name="first", listen="127.0.0.1:950")
CA = make_ca()
PASSPHRASE = "correct horse battery"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    without_waiting(monkeypatch)
    monkeypatch.setattr(b, "SCRYPT_N", 2**8)  # what is expensive on purpose is not what is tested here


def written(machine: Machine, path: Path, *, passphrase: str | None = None) -> Path:
    """A backup as a client writes it."""
    writer = b.Writer()
    head = b.Head(b.FORMAT, machine.roster.cluster, machine.index, machine.now_ms, 1, "test", passphrase is not None)
    stream = b"".join(b.without_secrets(machine).capture())
    parts = [writer.begin(head)]
    parts += [writer.record(b.MACHINE, stream[at : at + 100_000]) for at in range(0, len(stream), 100_000)]
    parts.append(writer.record(b.SMALL, msgspec.msgpack.encode([b.Small(block_id(b"tiny"), b"tiny")])))
    if passphrase is not None:
        keys = msgspec.msgpack.encode(b.Keys(*CA, machine.roster.users(), machine.roster.tokens()))
        parts.append(writer.record(b.KEYS, b.seal_keys(keys, passphrase, head, lambda n: bytes(n))))
    path.write_bytes(b"".join([*parts, writer.end()]))
    return path


@pytest.fixture
def old(tmp_path: Path) -> Remains:
    """Three files, one of them small; an open put; a user."""
    made = Remains(tmp_path / "old", 3)
    blocks = (made.hold(0, b"a block"),)
    made.append(range(3), [(1, payload) for name in ("files/one", "files/two") for payload in put(name, blocks)])
    made.append(range(3), [(1, put_small("tiny", b"tiny")), (1, entry(BeginPut("open", "open")))])
    return made


@pytest.fixture
def backup(old: Remains, tmp_path: Path) -> Path:
    return written(machine_of(old.directories[0])[0], tmp_path / "backup")


def test_into_a_new_directory(old: Remains, backup: Path, tmp_path: Path) -> None:
    before, _ = machine_of(old.directories[0])
    directory = tmp_path / "new"

    done = restore(backup, [directory], new=CONFIG)

    machine, term = machine_of(directory)
    assert machine.roster.cluster == done["cluster"] == load_identity(directory).cluster != old.cluster
    assert (done["from"]["cluster"], done["from"]["index"]) == (old.cluster, before.index)
    assert (machine.index, term) == (before.index + 1, 1)
    assert list(machine.namespace.each()) == list(before.namespace.each())  # versions, times, owners
    assert machine.namespace.open_puts() == []
    assert [(node.name, node.voter, node.presence) for node in machine.roster.nodes()] == [("first", True, "present")]
    assert load_config(directory) == CONFIG
    assert [member.name for member in load_peers(directory).members] == ["first"]
    assert [(row["name"], row["missing"]) for row in done["lost"]] == [("files/one", 1), ("files/two", 1)]
    assert b"tiny" in b"".join(path.read_bytes() for path in (directory / "small").glob("*.seg"))
    secrets = load_secrets(directory)
    assert is_key_of(secrets.certificate_pem, secrets.key_pem)
    assert machine.roster.cluster_key == secrets.cluster_key != before.roster.cluster_key


def test_into_all_directories_of_an_empty_cluster(backup: Path, tmp_path: Path) -> None:
    empty = Remains(tmp_path / "empty", 3, port=940)
    block = empty.hold(1, b"a block")  # its nodes may hold blocks of old
    done = restore(backup, empty.directories)
    machines = [machine_of(directory)[0] for directory in empty.directories]
    assert len({machine.digest() for machine in machines}) == 1
    assert machines[0].namespace.files == 3
    assert [node.name for node in machines[0].roster.nodes()] == ["n1", "n2", "n3"]
    assert sum(node.voter for node in machines[0].roster.nodes()) == 3
    assert done["versions_lost"] == 0, block


def test_refused_with_what_is_there_and_nothing_changed(old: Remains, backup: Path, tmp_path: Path) -> None:
    empty = Remains(tmp_path / "empty", 3, port=940)
    before = files_of(old.directories[0])
    cases: list[tuple[list[Path], NodeConfig | None, str]] = [
        (old.directories, None, "not empty: it holds 3 versions of files"),
        (empty.directories[:2], None, "n3 of this cluster is not given"),
        ([empty.directories[0]], CONFIG, "a node's directory already"),
    ]
    for directories, config, text in cases:
        with pytest.raises(Conflict, match=text):
            restore(backup, directories, new=config)
    assert files_of(old.directories[0]) == before


def test_what_is_no_nodes_directory_is_refused_with_what_to_give(backup: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"new is no directory: .* --listen HOST:PORT"):
        restore(backup, [tmp_path / "new"])
    for node in ("n1", "n2"):
        (tmp_path / "up" / node).mkdir(parents=True)
    (tmp_path / "up" / UP_FILE).write_text("{}")
    with pytest.raises(InvalidArgument, match=r"give the directory of each, --dir .*/up/n1 --dir .*/up/n2"):
        restore(backup, [tmp_path / "up"])


@pytest.mark.parametrize("harm", ["cut", "flipped", "other", "empty", "gone"])
def test_a_file_that_is_none_changes_nothing(harm: str, backup: Path, tmp_path: Path) -> None:
    empty = Remains(tmp_path / "empty", 1, port=940)
    before = files_of(empty.directories[0])
    data = backup.read_bytes()
    spoilt = {"cut": data[:-40], "flipped": data[:200] + bytes([data[200] ^ 1]) + data[201:], "other": b"PK\3\4" * 99}
    if harm == "gone":
        backup.unlink()
    else:
        backup.write_bytes(spoilt.get(harm, b""))
    with pytest.raises((Corrupt, OSError)) as caught:
        restore(backup, empty.directories)
    assert "\n" not in str(caught.value)
    assert files_of(empty.directories[0]) == before


def test_names_that_no_command_would_take_are_refused(tmp_path: Path) -> None:
    """Its checksums are right: somebody made it on purpose."""
    made = Remains(tmp_path / "old", 1)
    made.append([0], [(1, payload) for payload in put("files/one", (made.hold(0, b"x"),))])
    machine, _ = machine_of(made.directories[0])
    for name in ("../../etc/cron.d/one", "files//one", "files/one\n"):
        files = machine.namespace._files
        files[name] = files[files.oldest()]
        files.pop(files.oldest())
        with pytest.raises(Corrupt, match="holds metadata that is none"):
            restore(written(machine, tmp_path / "backup"), [tmp_path / "new"], new=CONFIG)


def test_keys_bring_the_ca_and_its_users(old: Remains, tmp_path: Path) -> None:
    user = UserRecord("alice", "user", b"f" * 32)
    machine, _ = machine_of(old.directories[0])
    token = machine.roster.tokens()[0]
    machine.roster._keep_user(user)
    sealed = written(machine, tmp_path / "sealed", passphrase=PASSPHRASE)

    with pytest.raises(Unauthenticated, match="passphrase"):
        restore(sealed, [tmp_path / "a"], new=CONFIG, passphrase="another passphrase")
    bare = restore(sealed, [tmp_path / "a"], new=CONFIG)
    assert bare["users"] == []
    done = restore(sealed, [tmp_path / "b"], new=CONFIG, passphrase=PASSPHRASE)
    assert done["users"] == ["alice"]
    with_keys, _ = machine_of(tmp_path / "b")
    assert with_keys.roster.user("alice") == user
    assert token in with_keys.roster.tokens()
    assert load_secrets(tmp_path / "b").ca_pem == CA[0] != load_secrets(tmp_path / "a").ca_pem

    keyless = written(machine, tmp_path / "keyless")
    with pytest.raises(InvalidArgument, match="without --with-keys"):
        restore(keyless, [tmp_path / "c"], new=CONFIG, passphrase=PASSPHRASE)


def test_killed_before_any_step_it_is_done_by_running_it_again(backup: Path, tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        directory = tmp_path / str(number)
        try:
            restore(backup, [directory], new=CONFIG, step=CrashAt(number))
        except Crash:
            done = restore(backup, [directory], new=CONFIG)
        else:
            break
        machine, _ = machine_of(directory)
        assert machine.roster.cluster == done["cluster"] == load_identity(directory).cluster
        assert machine.namespace.files == 3
        assert not (directory / DECIDED).exists()
    assert number > 12


def test_every_error_is_one_that_a_caller_knows(backup: Path, tmp_path: Path) -> None:
    with pytest.raises(IdunnoError):
        restore(backup, [tmp_path / "nothing"])

# A cluster that lost its quorum goes on as another: from the newest log, with nothing of the old identity, through every crash.
from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from idunno.base.errors import Conflict, Corrupt, IdunnoError, InvalidArgument
from idunno.base.ids import NodeId
from idunno.coordinator.commands import AddToken, BeginPut, SetPresence
from idunno.coordinator.records import TokenRecord
from idunno.node.identity import DECIDED, DirectoryLock, load_identity, load_peers, load_secrets
from idunno.node.lineage import is_proved, load_succession
from idunno.node.recover import Report, recover
from idunno.node.running import run
from idunno.wire.security import fingerprint, is_key_of, is_signed_by
from tests.unit.node.remains import START_MS, Remains, entry, machine_of, put, put_small, without_waiting


class Crash(Exception):
    pass


class CrashAt:
    """Dies before the step of that number."""

    def __init__(self, number: int) -> None:
        self.number, self.steps = number, list[str]()

    def __call__(self, what: str) -> None:
        self.steps.append(what)
        if len(self.steps) == self.number:
            raise Crash(what)


def yes(_: Report) -> bool:
    return True


def look(directories: list[Path]) -> Report:
    """The report, and nothing done."""
    seen: list[Report] = []

    def no(report: Report) -> bool:
        seen.append(report)
        return False

    assert recover(directories, no)["recovered"] is False
    return seen[0]


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "node.pid"
    }


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    without_waiting(monkeypatch)


@pytest.fixture
def five(tmp_path: Path) -> Remains:
    """Five nodes; n4's log is the longest, n5's of an older term with a tail of its own, both survive."""
    old = Remains(tmp_path, 5)
    block = old.hold(3, b"kept" * 100)
    gone = old.hold(0, b"only on n1")
    old.append(range(5), [(1, payload) for payload in put("a/kept", (block,), at_s=10)])
    old.append(range(5), [(1, payload) for payload in put("a/gone", (gone, block), at_s=11)])
    old.append([4], [(1, payload) for payload in put("never", (block,), at_s=12)])
    old.append([0, 1, 2, 3], [(2, b""), (2, put_small("tiny", b"small content"))])
    old.append([3], [(2, entry(SetPresence(old.ids[0], "failed", 0, "it is silent"), role="node", at_s=60))])
    return old


def test_the_newest_log_counts_and_what_is_lost_is_shown_before_anything_is_done(five: Remains) -> None:
    survivors = five.directories[3:]
    before = [files_of(directory) for directory in survivors]

    report = look(survivors)

    assert [files_of(directory) for directory in survivors] == before
    assert (report.last.index, report.last.term) == (8, 2)
    assert report.last.time.startswith("2096-10-02T")
    assert report.gone == report.logs_not_seen == ["n1", "n2", "n3"]
    assert [(found.name, found.index, found.dropped) for found in report.survivors] == [("n4", 8, 0), ("n5", 7, 2)]
    assert (report.files, report.versions_lost) == (3, 1)
    assert [(row.name, row.version, row.missing, row.blocks) for row in report.lost] == [("a/gone", 1, 1, 2)]
    assert report.acknowledged == "there-unless-cut-off"
    assert "3 logs were not seen, and an acknowledged entry is on 4 nodes" in report.why


def test_what_comes_out_is_another_cluster_with_the_same_files(five: Remains) -> None:
    survivors = five.directories[3:]
    old = [load_secrets(directory) for directory in survivors]

    done = recover(survivors, yes)

    machines = [machine_of(directory) for directory in survivors]
    assert machines[0][0].digest() == machines[1][0].digest()
    machine, term = machines[0]
    assert (machine.index, term) == (9, 3)  # behind all that anybody knew, in a term that nobody knew
    assert sorted(name for name, _ in machine.namespace.each()) == ["a/gone", "a/kept", "tiny"]
    roster = machine.roster
    assert roster.cluster == done["cluster"] == load_identity(survivors[0]).cluster != five.cluster
    assert [(node.name, node.presence) for node in roster.nodes()] == [("n4", "present"), ("n5", "present")]
    assert [node.name for node in roster.nodes() if node.voter] == done["voters"]
    assert (len(done["voters"]), roster.users(), len(roster.tokens())) == (1, [], 1)
    new = [load_secrets(directory) for directory in survivors]
    assert new[0].ca_pem == new[1].ca_pem != old[0].ca_pem
    assert new[0].cluster_key == roster.cluster_key != old[0].cluster_key
    for directory, secrets in zip(survivors, new, strict=True):
        record = roster.node(load_identity(directory).node)
        assert record.fingerprint == fingerprint(secrets.certificate_pem)
        assert is_key_of(secrets.certificate_pem, secrets.key_pem)
        assert (secrets.ca_key_pem is not None) == record.voter
        assert {member.node for member in load_peers(directory).members} == {node.node for node in roster.nodes()}
    assert (survivors[0] / done["aside"] / "log" / "00000001.seg").exists()


def test_small_contents_come_from_whoever_has_them(tmp_path: Path) -> None:
    """One came with an entry of n1's log, one lies in n2's store only: its entry is behind a snapshot."""
    old = Remains(tmp_path, 3)
    old.append(range(3), [(1, put_small("in-a-store", b"kept by n2"))])
    old.keep_small(1, b"kept by n2")
    old.append([0], [(1, put_small("in-the-log", b"came with an entry"))])
    old.cut(1)
    survivors = [old.directories[0], old.directories[1]]
    assert look(survivors).versions_lost == 0
    recover(survivors, yes)
    for directory in survivors:
        stored = b"".join(path.read_bytes() for path in (directory / "small").glob("*.seg"))
        assert b"kept by n2" in stored
        assert b"came with an entry" in stored


def test_an_old_node_believes_the_proof_and_nobody_elses(five: Remains, tmp_path: Path) -> None:
    done = recover(five.directories[3:], yes)
    (proof,) = load_succession(five.directories[3])
    old_ca = load_secrets(five.directories[0]).ca_pem
    assert (proof.cluster, proof.successor) == (five.cluster, done["cluster"])
    assert is_proved(proof, old_ca)
    assert not is_proved(msgspec.structs.replace(proof, successor="f" * 32), old_ca)
    assert not is_proved(msgspec.structs.replace(proof, signature=b""), old_ca)
    stranger = load_secrets(Remains(tmp_path / "other", 1).directories[0]).ca_pem
    assert not is_proved(proof, stranger)
    assert not is_signed_by(old_ca, b"anything", b"no signature")


def test_recovered_twice_both_proofs_stay(five: Remains) -> None:
    survivors = five.directories[3:]
    first = recover(survivors, yes)
    second = recover(survivors[:1], yes)
    assert second["cluster"] != first["cluster"]
    assert [(p.cluster, p.successor) for p in load_succession(survivors[0])] == [
        (five.cluster, first["cluster"]),
        (first["cluster"], second["cluster"]),
    ]
    assert [node.name for node in machine_of(survivors[0])[0].roster.nodes()] == ["n4"]


def test_killed_before_any_step_it_is_finished_by_running_it_again(tmp_path: Path) -> None:
    """Every step of a recovery of two, one after another: nothing is lost, both end in the same cluster."""
    first = Remains(tmp_path / "first", 3)
    block = first.hold(0, b"content")
    first.append(range(3), [(1, payload) for payload in put("file", (block,))] + [(1, put_small("tiny", b"small"))])
    number, steps = 0, [""]
    while True:
        number += 1
        old = first.copied(tmp_path / str(number))
        survivors = old.directories[:2]
        before = files_of(survivors[0])
        crash = CrashAt(number)
        try:
            recover(survivors, yes, step=crash)
        except Crash:
            steps = crash.steps
        else:
            break
        if not any((directory / DECIDED).exists() or switched(directory, old) for directory in survivors):
            now = files_of(survivors[0])
            assert all(now[name] == before[name] for name in before if not name.startswith("small/")), steps[-1]
        for directory in survivors:
            if (directory / DECIDED).exists():
                with pytest.raises(Conflict, match="recover --dir"):
                    run(directory)
        done = recover(survivors, yes)
        machines = [machine_of(directory)[0] for directory in survivors]
        assert {load_identity(directory).cluster for directory in survivors} == {done["cluster"]}, steps[-1]
        assert machines[0].digest() == machines[1].digest(), steps[-1]
        assert machines[0].roster.cluster == done["cluster"]
        assert sorted(name for name, _ in machines[0].namespace.each()) == ["file", "tiny"]
        assert not any((directory / DECIDED).exists() for directory in survivors)
        assert (survivors[0] / "blocks" / block.block[:2] / block.block).read_bytes() == b"content"
        for directory in survivors:
            kept_aside = list(directory.glob("recovered-from-*"))
            assert len(kept_aside) == 1, (steps[-1], kept_aside)
            assert load_identity(kept_aside[0]).cluster == old.cluster
            secrets = load_secrets(directory)
            assert is_key_of(secrets.certificate_pem, secrets.key_pem)
    assert number > 25, "the steps were not counted"


def switched(directory: Path, old: Remains) -> bool:
    return load_identity(directory).cluster != old.cluster


def test_half_of_it_is_not_begun_anew_unless_that_is_asked_for(five: Remains) -> None:
    """n4 was switched when it was killed; n5, given alone, is prepared for that same cluster."""
    four, other = five.directories[3:]
    steps: list[str] = []

    def stop_at_the_second(what: str) -> None:
        steps.append(what)
        if steps.count("decide") == 2:
            raise Crash

    with pytest.raises(Crash):
        recover([four, other], yes, step=stop_at_the_second)
    with pytest.raises(Conflict, match="prepared for a recover with n4") as caught:
        recover([other], yes)
    assert "--anew" in str(caught.value)
    finished = recover([four], yes)
    assert finished["unfinished"] == ["n5"]
    again = recover([four, other], yes)
    assert again["cluster"] == finished["cluster"] == load_identity(other).cluster
    assert again["unfinished"] == []


def test_anew_makes_a_cluster_that_the_first_one_cannot_meet(five: Remains) -> None:
    four, other = five.directories[3:]

    def stop(what: str) -> None:
        if what == "decide":
            raise Crash

    with pytest.raises(Crash):
        recover([four, other], yes, step=stop)
    alone = recover([other], yes, anew=True)
    assert alone["nodes"] == ["n5"]
    recover([four], yes, anew=True)
    assert load_secrets(four).ca_pem != load_secrets(other).ca_pem


def test_refused_with_a_next_step_and_nothing_changed(five: Remains, tmp_path: Path) -> None:
    four, other = five.directories[3:]
    stranger = Remains(tmp_path / "strangers", 1).directories[0]
    copied = tmp_path / "copy"
    shutil.copytree(four, copied)
    before = files_of(four)
    cases: list[tuple[list[Path], type[IdunnoError], str]] = [
        ([four, stranger], InvalidArgument, "nodes of 2 clusters"),
        ([four, copied], Conflict, "of one node"),
        ([four, four], InvalidArgument, "given twice"),
        ([tmp_path / "nothing"], InvalidArgument, "is no directory"),
        ([tmp_path], InvalidArgument, "no node's directory"),
    ]
    for directories, kind, text in cases:
        with pytest.raises(kind, match=text):
            recover(directories, yes)
    lock = DirectoryLock(other)
    lock.take()
    try:
        with pytest.raises(Conflict, match="runs this node already: stop it first"):
            recover([four, other], yes)
    finally:
        lock.release()
    assert files_of(four) == before


def test_a_rotten_log_gives_way_to_its_snapshot_and_then_to_the_others(five: Remains) -> None:
    four, other = five.directories[3:]
    five.cut(3)
    five.append([3], [(2, entry(BeginPut("late", "late"))), (2, entry(BeginPut("later", "later")))])
    segment = sorted((four / "log").glob("*.seg"))[-1]
    data = bytearray(segment.read_bytes())
    data[60] ^= 1  # in a record that a later one proves to have been synced
    segment.write_bytes(data)
    report = look([four, other])
    assert (report.last.index, report.survivors[0].index) == (8, 8)
    assert "damaged" in report.survivors[0].problem
    assert report.acknowledged == "may-be-missing"  # four logs were not seen whole

    (four / "log" / "snapshot").write_bytes(b"nothing")
    report = look([four, other])
    assert report.last.index == 7
    assert report.survivors[1].name == "n5"
    with pytest.raises(Corrupt, match="idunno restore"):
        look([four])
    assert recover([four, other], yes)["nodes"] == ["n4", "n5"]


def test_a_machine_that_differed_from_the_others_is_not_gone_on_with(five: Remains) -> None:
    four, other = five.directories[3:]
    (four / "log" / "quarantine").write_bytes(b"its digest at entry 5 was another")
    report = look([four, other])
    assert (report.last.index, report.survivors[0].index) == (7, 0)
    assert "differed" in report.survivors[0].problem
    assert report.logs_not_seen == ["n1", "n2", "n3", "n4"]
    recover([four, other], yes)
    assert not (four / "log" / "quarantine").exists()
    assert machine_of(four)[0].digest() == machine_of(other)[0].digest()


def test_a_majority_of_the_logs_holds_everything(five: Remains) -> None:
    report = look(five.directories[1:4])
    assert (report.acknowledged, report.logs_not_seen) == ("all-there", ["n1", "n5"])


def test_a_log_that_others_found_to_be_an_old_one_is_used_and_proves_nothing_about_what_was_acknowledged(
    five: Remains,
) -> None:
    for directory in five.directories[1:3]:
        (directory / "log" / "readmission").write_bytes(b"whatever it says")
    report = look(five.directories[1:4])
    assert (report.acknowledged, report.logs_not_seen) == ("may-be-missing", ["n1", "n2", "n3", "n5"])
    assert [found.problem for found in report.survivors] == [
        *["its log is an old one, as the others found: it may lack what it acknowledged"] * 2,
        "",
    ]
    assert look(five.directories[1:3]).last.index == 7
    recover(five.directories[1:4], yes)
    assert not (five.directories[1] / "log" / "readmission").exists()


def test_one_that_is_not_in_the_roster_is_left_out(five: Remains, tmp_path: Path) -> None:
    four = five.directories[3]
    old = load_identity(four)
    (five.directories[4] / "identity.json").write_bytes(
        msgspec.json.encode(msgspec.structs.replace(old, node=NodeId("0" * 16)))
    )
    with pytest.raises(Conflict, match="not in the roster"):
        look(five.directories[3:])


def test_old_tokens_and_users_are_worth_nothing(five: Remains) -> None:
    token = TokenRecord("5f3a9c", "admin", b"h" * 32, START_MS * 2)
    five.append([3], [(2, entry(AddToken(token), role="admin"))])
    recover(five.directories[3:4], yes)
    machine, _ = machine_of(five.directories[3])
    assert [known.token for known in machine.roster.tokens()] != ["5f3a9c"]
    assert all(known.role == "node" for known in machine.roster.tokens())

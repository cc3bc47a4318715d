# What each command prints: JSON fields as in docs/commands.md, and text for people.
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from idunno.client.backups import private
from idunno.grep.messages import Line
from idunno.scheduler.messages import OutputInfo, TaskCounts
from tests.unit.cli.support import Terminal
from tests.unit.client.fake import CREATED, job_info, model
from tests.unit.client.test_models_and_jobs import part


def test_put_and_get_of_a_file(idunno: Terminal, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    put = idunno.ok("put", str(tmp_path / "a"), "x/a", "--json").json
    assert list(put)[:8] == ["name", "version", "size", "blocks", "replicas", "degraded", "copies", "why"]
    assert (put["name"], put["version"], put["size"], put["replicas"]) == ("x/a", 1, 5, ["n1", "n2"])
    assert put["seconds"] >= 0
    got = idunno.ok("--json", "get", "x/a", str(tmp_path / "b")).json
    assert list(got) == ["name", "version", "size", "seconds"]
    assert (tmp_path / "b").read_bytes() == b"hello"
    assert "x/a version 1: 5 B" in idunno.ok("get", "x/a", str(tmp_path / "b")).out


def test_standard_input_and_output_are_files_too(
    idunno: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_bytes(b"piped" * 2000)
    with open(tmp_path / "in", "rb") as source:
        before = os.dup(0)
        os.dup2(source.fileno(), 0)
        try:
            idunno.ok("put", "-", "piped")
        finally:
            os.dup2(before, 0)
            os.close(before)
    assert idunno.fake.world.newest("piped").content == b"piped" * 2000
    assert idunno.ok("get", "piped", "-").out == "piped" * 2000
    assert idunno("get", "piped", "-", "--json").status == 2
    assert idunno("get-versions", "piped", "2", "-", "--json").status == 2
    assert idunno.ok("get-versions", "piped", "2", "-").out.startswith("=== piped version 1 ===\npiped")


def test_a_folder_is_counted_and_listed_when_asked(idunno: Terminal, tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(b"xyz")
    document = idunno.ok("put", str(tmp_path / "f"), "x", "--json").json
    assert list(document) == ["files", "size", "seconds"]
    assert (document["files"], document["size"]) == (2, 6)
    listed = idunno.ok("put", str(tmp_path / "f"), "x", "--json", "--list").json
    assert [file["name"] for file in listed["list"]] == ["x/a", "x/b/c"]
    got = idunno.ok("get", "x/", str(tmp_path / "g"), "--json").json
    assert (got["files"], got["size"]) == (2, 6)
    assert (tmp_path / "g" / "b" / "c").read_bytes() == b"xyz"
    assert idunno("get", "x/", str(tmp_path / "g"), "--version", "1").status == 2
    assert idunno("put", str(tmp_path / "f"), "x", "--if-version", "1").status == 2
    assert idunno("put", str(tmp_path / "f" / "a"), "x", "--list").status == 2


def test_looking_at_files(idunno: Terminal, tmp_path: Path) -> None:
    idunno.fake.world.put("a", b"1")
    idunno.fake.world.put("a", b"22")
    (row,) = idunno.ok("ls", "--json").json
    assert {"name": "a", "version": 2, "size": 2, "created": CREATED}.items() <= row.items()
    assert idunno.ok("ls", "nothing", "--json").json == []
    assert idunno.ok("versions", "a", "--json").json[0] == {
        "version": 2,
        "size": 2,
        "created": CREATED,
        "replicas": ["n1", "n2"],
    }
    where = idunno.ok("where", "a", "--json").json
    assert where["copies"] == {"wanted": 4, "found": 2}
    assert where["blocks"][0]["nodes"] == ["n1", "n2"]
    assert idunno.ok("store", "n2", "--json").json == [{"name": "a", "version": 2, "size": 1}]
    history = idunno.ok("get-versions", "a", "2", str(tmp_path / "h"), "--json").json
    assert history["versions"] == [2, 1]
    assert (tmp_path / "h").read_bytes() == b"=== a version 2 ===\n22\n=== a version 1 ===\n1"
    assert idunno.ok("delete", "a", "--json").json == {"name": "a", "versions": 2}


def test_a_folder_is_not_deleted_and_not_said_to_be_missing(idunno: Terminal) -> None:
    idunno.fake.world.put("fold/a", b"1")
    for name in ("fold", "fold/"):
        refused = idunno("delete", name)
        assert (refused.status, refused.error) == (
            1,
            f"error: {name} is a folder; delete its files one by one: `idunno ls fold/`",
        )
    assert "is a folder" not in idunno("delete", "nothing").error
    assert idunno.ok("delete", "fold/a").out == "fold/a: 1 version deleted\n"


def test_only_a_member_is_said_to_be_leaving(idunno: Terminal) -> None:
    assert "n2 is leaving" in idunno("leave", "n2").err
    assert "is leaving" not in idunno("leave", "nosuch").err


@pytest.mark.parametrize("sizes", [(10,), (10, 1_000_000)])
def test_a_full_disk_is_named(sizes: tuple[int, ...]) -> None:
    """Whether it is found at the end, or before, when closing the file fails as well."""
    with pytest.raises(OSError, match="No space left") as raised, private("/dev/full") as file:
        file.writelines(bytes(size) for size in sizes)
    assert raised.value.filename == "/dev/full"


def test_tables_are_plain_aligned_text_when_nobody_watches(idunno: Terminal) -> None:
    idunno.fake.world.put("a", b"1")
    idunno.fake.world.put("longer/name", b"1" * 12)
    assert idunno.ok("ls").out.splitlines() == [
        "name         version  size  created",
        f"a                  1     1  {CREATED}",
        f"longer/name        1    12  {CREATED}",
    ]


def test_deploy_shows_each_worker_and_ends_with_the_ready_ones(idunno: Terminal, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"model")
    idunno.fake.world.model_story = [model("digits")]
    outcome = idunno.ok("deploy", "digits", str(tmp_path / "m.onnx"), "--json", "--weight", "2", "--workers", "2")
    assert list(outcome.json) == ["model", "version", "state", "workers", "seconds"]
    assert (outcome.json["state"], outcome.json["workers"]) == ("deployed", ["n1", "n2"])
    assert outcome.err.splitlines() == ["n1: assigned", "n1: ready", "n2: ready"]
    assert idunno("deploy", "m", "m.onnx", "--workers", "3", "--max-workers", "2").status == 2


def test_models_and_the_operators_questions(idunno: Terminal) -> None:
    idunno.fake.world.models["digits"] = model("digits")
    (row,) = idunno.ok("models", "--json").json
    assert list(row)[:7] == ["model", "version", "state", "workers", "batch_size", "weight", "runtime"]
    assert row["workers"] == ["n1", "n2"]
    assert idunno.ok("rates", "--json").json == {
        "models": [{"model": "digits", "rate": 12.5, "queries_done": 100, "workers": 2, "waiting": 7}],
        "spread": 0.1,
    }
    times = idunno.ok("times", "digits", "--json").json
    assert {"count", "mean", "std", "median", "p90", "p95", "p99"} <= set(times)
    assert idunno.ok("assignments", "--json").json[0]["task"] == "j/0"
    explained = idunno.ok("explain", "digits", "--json").json
    assert (explained["waits_for"], len(explained["decisions"])) == ("a free worker", 1)
    assert idunno.ok("batch-size", "digits", "64", "--json").json["model"] == "digits"
    assert idunno.fake.world.asked("model.batch-size")[0].batch_size == 64
    assert idunno.ok("undeploy", "digits", "--json").json == {"model": "digits"}
    for command in (["models"], ["rates"], ["times", "digits"], ["assignments"], ["explain", "digits"]):
        assert "digits" in idunno.ok(*command).out


def finishing(idunno: Terminal, state: str, queries: int, done: int, errors: int = 0, **more: Any) -> None:
    world = idunno.fake.world
    world.models["digits"] = model("digits")
    tasks = TaskCounts(success=1, failed=0 if state == "success" else 1)
    world.job_story = [
        job_info("", "running", queries, 0),
        job_info("", state, queries, done, errors, tasks=tasks, **more),
    ]
    world.outputs[""] = [part(idunno.fake, 0, 0, done)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"png")
    return tmp_path / "images"


def test_infer_waits_and_writes_the_results(idunno: Terminal, images: Path, tmp_path: Path) -> None:
    finishing(idunno, "success", 3, 3, errors=1)
    output = tmp_path / "out.jsonl"
    outcome = idunno.ok("infer", "digits", str(images), "--output", str(output), "--json")
    document = outcome.json
    assert list(document)[:8] == ["job", "model", "queries", "tasks", "succeeded", "failed", "seconds", "output"]
    counts = {name: document[name] for name in ("queries", "tasks", "succeeded", "failed", "output")}
    assert counts == {"queries": 3, "tasks": 1, "succeeded": 2, "failed": 1, "output": str(output)}
    assert [json.loads(line)["query"] for line in output.read_text().splitlines()] == [0, 1, 2]
    assert "1 of 3 queries have an error of their own" in outcome.err


def test_a_job_that_failed_still_leaves_what_it_has_and_ends_with_1(
    idunno: Terminal, images: Path, tmp_path: Path
) -> None:
    finishing(idunno, "failed", 5, 3, reason="task 1 failed 3 times: n1: out of memory")
    idunno.fake.world.outputs[""].append(OutputInfo(1, 3, 5, error="out of memory"))
    outcome = idunno("infer", "digits", str(images), "--output", str(tmp_path / "o"), "--json")
    assert outcome.status == 1
    assert (outcome.json["succeeded"], outcome.json["failed"], outcome.json["tasks"]) == (3, 2, 2)
    assert "1 tasks failed, 3 of 5 queries answered): task 1 failed 3 times: n1: out of memory" in outcome.error
    assert len((tmp_path / "o").read_text().splitlines()) == 5


def test_a_job_whose_results_could_not_be_written_is_not_begun(idunno: Terminal, images: Path, tmp_path: Path) -> None:
    for nowhere in (tmp_path / "gone" / "o", tmp_path):
        outcome = idunno("infer", "digits", str(images), "--output", str(nowhere))
        assert outcome.status == 1
        assert outcome.error.startswith(f"error: {nowhere}: ")
    assert idunno.asked == []


def test_a_model_file_that_is_not_there_is_named(idunno: Terminal, tmp_path: Path) -> None:
    outcome = idunno("deploy", "digits", str(tmp_path / "gone"))
    assert outcome.status == 1
    assert outcome.error.startswith(f"error: {tmp_path}/gone: No such file or directory; check the path")


def test_infer_without_waiting_gives_the_job(idunno: Terminal, images: Path) -> None:
    idunno.fake.world.models["digits"] = model("digits")
    document = idunno.ok("infer", "digits", str(images), "--no-wait", "--json", "--batch-size", "8").json
    assert document["job"] == idunno.fake.world.submitted[0].job
    assert document["output"] is None
    assert idunno.fake.world.submitted[0].batch_size == 8
    job = idunno.ok("infer", "digits", str(images), "--no-wait").out.strip()
    assert job == idunno.fake.world.submitted[1].job
    assert idunno("infer", "digits", str(images), "--no-wait", "--output", "x").status == 2


def test_results_print_lines_an_array_or_the_names_of_files(idunno: Terminal, tmp_path: Path) -> None:
    world = idunno.fake.world
    world.jobs["j"] = job_info("j", "success", 4, 4)
    world.outputs["j"] = [part(idunno.fake, 1, 2, 4), part(idunno.fake, 0, 0, 2)]
    assert [json.loads(line)["output"] for line in idunno.ok("results", "j").out.splitlines()] == [0, 10, 20, 30]
    assert [row["query"] for row in idunno.ok("results", "j", "--json").json] == [0, 1, 2, 3]
    names = [".idunno/jobs/j/0", ".idunno/jobs/j/1"]
    assert idunno.ok("results", "j", "--list", "--json").json == names
    assert idunno.ok("results", "j", "--list").out.split() == names
    document = idunno.ok("results", "j", "--output", str(tmp_path / "o"), "--json").json
    assert (document["succeeded"], document["output"]) == (4, str(tmp_path / "o"))
    assert len((tmp_path / "o").read_text().splitlines()) == 4
    world.jobs["empty"], world.outputs["empty"] = job_info("empty", "success"), []
    assert idunno.ok("results", "empty", "--json").json == []


def test_jobs_are_listed_cancelled_and_forgotten(idunno: Terminal) -> None:
    idunno.fake.world.jobs["j"] = job_info("j", "running", 4, 2)
    (row,) = idunno.ok("jobs", "--all", "--json").json
    assert {"job", "client", "model", "state", "queries", "done", "tasks", "submitted", "finished"} <= set(row)
    assert set(row["tasks"]) == {"ready", "waiting", "success", "failed"}
    assert idunno.fake.world.asked("job.ls")[0].all is True
    assert idunno.ok("cancel", "j", "--json").json["state"] == "cancelled"
    assert idunno.ok("forget", "j", "--json").json == {"job": "j"}


def test_members_and_status(idunno: Terminal) -> None:
    rows = idunno.ok("members", "--json").json
    fixed = ["name", "id", "address", "state", "role", "incarnation", "version", "slots", "zone"]
    assert list(rows[0]) == [*fixed, "problem"]
    assert [row["name"] for row in idunno.ok("members", "--self", "--json").json] == ["n1"]
    status = idunno.ok("status", "--json").json
    assert (status["healthy"], status["why"], status["scheduler"]) == (False, "n2 has failed", "n1")
    page = idunno.ok("status").out
    assert "healthy     no: n2 has failed" in page
    assert "members     1 active, 1 failed" in page


def test_an_upgrade_that_not_all_are_ready_for_names_who_is_not(idunno: Terminal) -> None:
    checked = idunno("upgrade", "--check", "--json")
    assert (checked.status, checked.json["ready"], checked.json["version"], checked.json["next"]) == (1, False, 1, 2)
    assert [(row["name"], row["supports"], row["why"]) for row in checked.json["nodes"]] == [
        ("n1", 2, ""),
        ("n2", 1, "upgrade it"),
    ]
    assert "n2: upgrade it" in checked.error
    raised = idunno("upgrade")
    assert (raised.status, raised.out) == (1, "")
    assert "n2: upgrade it" in raised.error


def test_tokens_and_users(idunno: Terminal) -> None:
    token = idunno.ok("token", "new", "--role", "user", "--ttl", "2h", "--json").json
    assert set(token) == {"id", "token", "role", "expires"}
    assert idunno.fake.world.asked("token.new")[0].ttl_s == 7200
    assert idunno.ok("token", "new", "--role", "node").out == "idunno-secret\n"
    assert idunno.ok("token", "ls", "--json").json[0]["state"] == "valid"
    assert idunno.ok("token", "revoke", "5f3a", "--json").json == {"id": "5f3a"}
    assert idunno.ok("users", "--json").json == [{"name": "alice", "role": "admin", "since": CREATED, "state": "valid"}]
    assert idunno.ok("users", "revoke", "alice", "--json").json == {"name": "alice"}
    assert idunno("token", "new", "--role", "king").status == 2


def test_grep_prints_lines_a_summary_and_who_did_not_answer(idunno: Terminal) -> None:
    idunno.fake.world.log_lines = [
        Line("n1", "node.jsonl", 7, "task failed \x1b[31m"),
        Line("n1", "node.jsonl", 8, "after", context=True),
    ]
    outcome = idunno.ok("grep", "-i", "FAILED", "-C", "1", "--since", "10m", "--node", "n1", "--node", "n2")
    assert outcome.out.splitlines() == ["n1:7: task failed \\x1b[31m", "n1-8- after"]
    assert "2 matches (n1 2 in 0.010 s)" in outcome.err
    assert "no answer from n2: no answer within 5 s" in outcome.err
    (query,) = idunno.fake.world.asked("grep.query")
    assert (query.ignore_case, query.before, query.after, query.nodes) == (True, 1, 1, ["n1", "n2"])
    document = idunno.ok("grep", "x", "--json", "-A", "2", "-C", "5").json
    assert list(document) == ["matches", "counts", "unreachable", "seconds", "truncated"]
    assert document["matches"][0] == {"node": "n1", "file": "node.jsonl", "line": 7, "text": "task failed \x1b[31m"}
    assert document["matches"][1]["context"] is True
    assert (document["counts"], document["unreachable"]) == ({"n1": 2}, ["n2"])
    query = idunno.fake.world.asked("grep.query")[1]
    assert (query.before, query.after) == (5, 2)
    assert idunno.ok("grep", "-c", "x").out.splitlines()[-1] == "n1: 2"


def test_a_cluster_on_this_machine(idunno: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from idunno.node import local

    calls: list[Any] = []

    def up(directory: Path, nodes: int | None, port: int | None) -> dict[str, Any]:
        calls.append((directory, nodes, port))
        member = {"name": "n1", "id": "1", "address": "127.0.0.1:7400", "state": "active", "role": "scheduler"}
        return {
            "cluster": "c",
            "scheduler": "n1",
            "members": [member],
            "seconds": 1.0,
            "started": 1,
            "gone": ["n2"],
            "outlived": ["n3"],
        }

    def down(directory: Path, purge: bool) -> dict[str, Any]:
        calls.append((directory, purge))
        return {"stopped": 1, "killed": 0, "purged": purge}

    monkeypatch.setattr(local, "up", up)
    monkeypatch.setattr(local, "down", down)
    monkeypatch.setenv("IDUNNO_HOME", str(tmp_path))
    assert idunno.ok("up", "--json").json["members"][0]["name"] == "n1"
    told = idunno.ok("up", "--nodes", "3", "--dir", str(tmp_path / "d"), "--port", "7500")
    assert f"--adopt --token TOKEN --dir {tmp_path}/d/n3" in told.err
    assert "scheduler" in told.out
    assert "n2 is no member any more" in told.err
    idunno.ok("up", "--cluster", str(tmp_path / "e"))
    assert idunno.ok("down", "--purge", "--json").json == {"stopped": 1, "killed": 0, "purged": True}
    assert calls == [
        (tmp_path / "local", None, None),
        (tmp_path / "d", 3, 7500),
        (tmp_path / "e", None, None),
        (tmp_path / "local", True),
    ]
    assert idunno("down", "--cluster", "127.0.0.1:7400").status == 2


def test_running_a_node_replaces_the_command_line(
    idunno: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: ran.append(arguments))
    idunno.ok("node", "run", "--dir", str(tmp_path), "--seed", "10.0.0.1:7400")
    assert ran[0][1:] == ["-P", "-m", "idunno.node", "--dir", str(tmp_path), "--seed", "10.0.0.1:7400"]


def test_the_bounds_of_grep_are_those_of_the_nodes() -> None:
    from idunno.cli import logs
    from idunno.grep import engine

    assert (logs.CONTEXT_MAX, logs.LIMIT_MAX) == (engine.CONTEXT_LINES_MAX, engine.LIMIT_MAX)


def test_a_folder_that_is_got_as_a_file_is_called_one(idunno: Terminal, tmp_path: Path) -> None:
    idunno.fake.world.put("x/a", b"")
    assert "x is a folder; get all below it: `idunno get x/ DIRECTORY`" in idunno("get", "x", str(tmp_path / "x")).error
    assert "no file y" in idunno("get", "y", str(tmp_path / "y")).error
    assert "is a folder" not in idunno("get", "x/a", str(tmp_path / "x"), "--version", "9").error


def test_usage_errors_are_one_sentence(idunno: Terminal) -> None:
    assert "error: Missing argument 'PREFIX'; see `idunno retain --help`" in idunno("retain").err

# The shell: scripts line by line, and what it offers to complete.
from __future__ import annotations

from pathlib import Path

import click
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from idunno.base.errors import Unavailable
from idunno.cli import running
from idunno.cli.root import cli
from idunno.cli.shell import ClusterNames, Offer, _split, interact, offers, words_of
from tests.unit.cli.support import Terminal
from tests.unit.client.fake import model


def test_a_script_runs_its_lines_with_the_options_the_shell_was_given(idunno: Terminal, tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(b"x")
    script = f"# a comment\n\nput '{tmp_path}/a b' a  # another\nidunno ls\nquit\nnonsense\n"
    outcome = idunno("--cluster", "/c", "--timeout", "9", "shell", stdin=script)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[0] == "a version 1: 1 B on n1, n2"
    assert outcome.out.splitlines()[2].startswith("a ")
    assert idunno.asked == [("/c", 9.0), ("/c", 9.0)]


def test_a_script_stops_at_the_first_error_and_names_its_line(idunno: Terminal) -> None:
    outcome = idunno("shell", stdin="ls\nversions gone\nls\n")
    assert outcome.status == 1
    assert outcome.error.startswith("error: line 2: no file gone")
    assert len(idunno.asked) == 2


def test_a_script_goes_on_when_asked_and_still_ends_with_the_first_error(idunno: Terminal) -> None:
    outcome = idunno("shell", "--keep-going", stdin="nonsense\nversions gone\n'open\nls\n")
    assert outcome.status == 2
    assert len(idunno.asked) == 2
    assert "error: line 3: No closing quotation" in outcome.err


def test_json_of_a_script_is_a_document_a_line(idunno: Terminal) -> None:
    assert idunno("--json", "shell", stdin="ls\nls x\n").out == "[]\n[]\n"


def test_short_names_are_the_long_ones() -> None:
    assert words_of("list_mem --json") == ["members", "--json"]
    assert words_of("list_self") == ["members", "--self"]
    assert [words_of(f"c{i} x")[0] for i in range(1, 6)] == ["rates", "times", "batch-size", "results", "assignments"]
    assert words_of("help put") == ["put", "--help"]
    assert words_of("help") == ["--help"]
    assert words_of("  # nothing") == []


def test_short_names_and_help_run(idunno: Terminal) -> None:
    outcome = idunno("shell", stdin="c1\nlist_mem\nlist_self\nhelp c1\nhelp\nshell\n")
    assert outcome.status == 2
    assert "spread 10.0%" in outcome.out
    assert "error: line 6: this is a shell already" in outcome.err


# -- completion -------------------------------------------------------------------------------------------------------

KNOWN = {"file": ["a/1", "a/2"], "prefix": ["a/"], "model": ["digits"], "job": ["j1"], "node": ["n1"], "any": ["x"]}


def texts(line: str) -> list[str]:
    def names(kind: str, prefix: str) -> list[str]:
        return [name for name in KNOWN[kind] if name.startswith(prefix)]

    before, current = _split(line)
    return [offer.text for offer in offers(cli, before, current, names)]


def test_commands_and_short_names_are_offered_with_what_they_do() -> None:
    assert texts("de") == ["delete", "deploy"]
    assert texts("c") == ["c1", "c2", "c3", "c4", "c5", "cancel"]
    assert texts("token ") == ["ls", "new", "revoke"]
    assert texts("help to") == ["token"]
    assert Offer("delete", "Delete all versions of NAME.") in offers(cli, [], "de", lambda kind, prefix: [])


def test_options_and_their_values_are_offered() -> None:
    assert texts("deploy --w") == ["--workers", "--weight"]
    assert "--json" in texts("ls --")
    assert texts("token new --role ") == ["node", "admin", "user", "reader"]
    assert texts("grep x --level w") == ["warning"]
    assert texts("grep x --node ") == ["n1"]


def test_names_are_offered_where_the_command_takes_them() -> None:
    assert texts("get a") == ["a/1", "a/2"]
    assert texts("get --version 3 a/2") == ["a/2"]
    assert texts("delete ") == ["a/1", "a/2"]
    assert texts("times ") == texts("c2 d") == ["digits"]
    assert texts("c4 ") == ["j1"]
    assert texts("store ") == ["n1"]
    assert texts("get a/1 there and more ") == []
    assert texts("nonsense x") == []
    assert texts("put 'open ") == []


def test_local_paths_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.onnx").touch()
    (tmp_path / ".hidden").touch()
    monkeypatch.chdir(tmp_path)
    assert texts("deploy digits ") == ["models/"]
    assert texts("deploy digits models/") == ["models/m.onnx"]
    assert texts(f"put {tmp_path}/mo") == [f"{tmp_path}/models/"]
    assert texts("put gone/") == []


def test_names_come_from_the_cluster_are_kept_a_while_and_never_break_the_line(idunno: Terminal) -> None:
    idunno.fake.world.put("a", b"1")
    idunno.fake.world.models["digits"] = model("digits")
    names = ClusterNames("/c")
    assert names("model", "d") == names("model", "d") == ["digits"]
    assert len(idunno.asked) == 1
    assert names("file", "") == ["a"]
    assert names("node", "n") == ["n1", "n2"]
    assert names("any", "") == ["digits", "n1", "n2"]

    async def gone(where: str | None, timeout_s: float | None) -> object:
        raise Unavailable("nobody is there")

    running.connect = gone  # type: ignore[assignment] # the fixture puts the real one back
    assert names("job", "") == []


@pytest.mark.parametrize("at_home", ["a file/home", "a file"])
def test_a_shell_whose_history_cannot_be_kept_works_all_the_same(
    at_home: str, idunno: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("IDUNNO_HOME", str(tmp_path / at_home))
    idunno.fake.world.put("notes", b"1")
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()), click.Context(cli):
        typed.send_text("ls\rexit\r")
        assert interact(cli) == 0
    out, err = capfd.readouterr()
    assert "notes" in out
    assert "what you type is not kept for the next time: " in err


def test_a_disk_that_fills_up_does_not_end_the_shell(
    idunno: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(history: FileHistory, string: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("IDUNNO_HOME", str(tmp_path))
    monkeypatch.setattr(FileHistory, "store_string", full)
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()), click.Context(cli):
        typed.send_text("ls\rexit\r")
        assert interact(cli) == 0
    assert "name" in capfd.readouterr().out

# The common options, exit statuses and errors of all commands.
from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from idunno.base import errors
from idunno.cli import running
from idunno.cli.files import QUORUM_MAX
from idunno.cli.options import Command, Group, parse_duration_s, parse_time_ms
from idunno.cli.root import cli
from idunno.cli.running import exit_code_of
from idunno.coordinator.records import COPIES_WANTED
from tests.unit.cli.support import Terminal


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=lambda value: str(value))
def test_every_command_has_the_common_options_and_a_help_with_an_example(
    idunno: Terminal, path: tuple[str, ...], command: click.Command
) -> None:
    assert isinstance(command, (Command, Group))
    text = idunno.ok(*path, "--help").out
    for option in ("--json", "--cluster WHERE", "--timeout SECONDS"):
        assert option in text
    assert f"Example:\n    {command.example}" in text.replace("Example:\n      ", "Example:\n    ")
    assert command.example.startswith(" ".join(["idunno", *path[:1]]))


def test_all_commands_of_this_version_are_there() -> None:
    promised = (
        "up down init join node leave remove recover snapshot restore dump upgrade login token users members status "
        "put get get-versions versions ls where store delete retain trash repair scrub "
        "deploy undeploy models infer jobs cancel forget results rates times batch-size assignments explain grep shell"
    )
    assert sorted(cli.commands) == sorted(promised.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "--cluster", "/c", "--timeout", "7", "ls"],
        ["ls", "--json", "--cluster", "/c", "--timeout", "7s"],
        ["--cluster", "/other", "--timeout", "1", "ls", "--cluster=/c", "--timeout=7", "--json"],
    ],
)
def test_the_common_options_may_stand_anywhere(idunno: Terminal, arguments: list[str]) -> None:
    assert idunno.ok(*arguments).json == []
    assert idunno.asked == [("/c", 7.0)]


def test_they_may_stand_between_a_group_and_its_command_too(idunno: Terminal) -> None:
    assert idunno.ok("token", "--json", "ls").json
    assert idunno.ok("users", "--json").json
    assert idunno.ok("--json", "users").json


@pytest.mark.parametrize("code", sorted(errors.BY_CODE))
def test_every_error_ends_in_one_line_and_its_exit_status(idunno: Terminal, code: str) -> None:
    raised = errors.from_code(code, "what went wrong, 3 of 5,\n  see `idunno status`")

    async def fails(where: str | None, timeout_s: float | None) -> object:
        raise raised

    running.connect = fails  # type: ignore[assignment] # the fixture puts the real one back
    outcome = idunno("ls")
    assert outcome.error == "error: what went wrong, 3 of 5, see `idunno status`"
    assert outcome.out == ""
    unknown = ("may-have-happened", "connection-lost", "deadline-exceeded", "cancelled", "disk-failed", "internal")
    assert outcome.status == (3 if code in unknown else 1)


def test_an_unknown_outcome_of_a_change_is_3_and_of_a_question_is_1(idunno: Terminal, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    idunno.fake.world.trouble = lambda node, method: errors.ConnectionLost("the connection broke")
    changed = idunno("put", str(tmp_path / "a"), "a", "--timeout", "0.3")
    assert changed.status == 3
    asked = idunno("ls", "--timeout", "0.3")
    assert asked.status == 1


def test_a_bug_behind_a_change_may_have_happened_and_behind_a_question_has_failed(
    idunno: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    idunno.fake.world.trouble = lambda node, method: errors.InternalError("internal error 5f3a; see the log of node n1")
    assert idunno("put", str(tmp_path / "a"), "a").status == 3
    assert idunno("ls").status == 1


def test_no_text_from_elsewhere_reaches_the_terminal_with_its_control_characters(idunno: Terminal) -> None:
    reason = "digits failed: node \x1b]0;owned\x07 \x9b2J"
    idunno.fake.world.trouble = lambda node, method: errors.ModelFailed(reason)
    outcome = idunno("ls")
    assert outcome.error == "error: digits failed: node \\x1b]0;owned\\x07 \\x9b2J"


def test_a_refused_change_is_certain(idunno: Terminal, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    idunno.fake.world.trouble = lambda node, method: errors.Conflict("a has version 3, not 2: see `idunno versions a`")
    outcome = idunno("put", str(tmp_path / "a"), "a", "--if-version", "2", "--json")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.error == "error: a has version 3, not 2: see `idunno versions a`"


def test_no_node_answers(idunno: Terminal) -> None:
    idunno.fake.world.down = {"n1", "n2"}
    outcome = idunno("put", __file__, "a")
    assert outcome.status == 1
    assert "none of its 2 nodes answers" in outcome.error
    assert "run `idunno up" in outcome.error


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["ls", "--nonsense"],
        ["put", "only-one"],
        ["get-versions", "a", "0", "x"],
        ["batch-size", "m", "none"],
        ["ls", "--timeout", "0"],
        ["ls", "--timeout", "soon"],
        ["get", "a", "b", "--as-of", "yesterday"],
        ["get", "a", "b", "--as-of", "1h", "--version", "1"],
        ["token"],
        ["trash"],
        ["get-versions", "a", "99999999999999999999", "x"],
        ["get", "a", "b", "--version", "99999999999999999999"],
        ["retain", "a/", "--versions", "99999999999999999999"],
        ["retain", "a/", "--age", "99999999999d"],
        ["batch-size", "m", "99999999999999999999"],
        ["token", "new", "--role", "user", "--ttl", "99999999999999999d"],
        ["get", "no\udcffutf8", "x"],
        ["grep", "no\udcffutf8"],
        ["snapshot", "-"],
        ["dump", "-"],
        ["get", "a", "b", "--as-of", "999999999999999999999d"],
        ["put", "a", "b", "--write-quorum", "0"],
        ["put", "a", "b", "--write-quorum", "5"],
        ["put", "", "a"],
        ["put", "a", ""],
        ["get", "a", ""],
        ["get", "a/", ""],
        ["get-versions", "a", "1", ""],
        ["store", ""],
        ["scrub", ""],
        ["leave", ""],
        ["explain", ""],
        ["deploy", "m", ""],
        ["infer", "m", "x", "--output", ""],
        ["grep", "x", "--node", ""],
        ["snapshot", ""],
        ["dump", ""],
        ["restore", "x", "--dir", ""],
        ["recover", "--dir", ""],
        ["up", "--dir", ""],
        ["down", "--purge", "--dir", ""],
        ["init", "--dir", "d", "--listen", ""],
        ["join", "", "--token", "t", "--dir", "d"],
        ["login", "h:1", "--token", "t", "--name", ""],
        ["token", "revoke", ""],
        ["users", "revoke", ""],
        ["ls", "--cluster", ""],
        [],
    ],
)
def test_wrong_usage_is_2_and_names_the_help(idunno: Terminal, arguments: list[str]) -> None:
    outcome = idunno(*arguments, stdin="") if not arguments else idunno(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert "--help" in outcome.err
    assert idunno.asked == []
    if arguments:
        assert len(outcome.error) < 200


def test_an_empty_prefix_or_pattern_means_everything(idunno: Terminal) -> None:
    for arguments in (["ls", ""], ["retain", ""], ["grep", ""]):
        idunno.ok(*arguments)


def test_a_write_quorum_is_at_most_the_copies_there_are() -> None:
    assert QUORUM_MAX == COPIES_WANTED


def test_a_local_file_that_is_not_there_is_named(idunno: Terminal, tmp_path: Path) -> None:
    outcome = idunno("put", str(tmp_path / "gone"), "a")
    step = "check the path: is it written right, and is its folder there?"
    assert (outcome.status, outcome.error) == (1, f"error: {tmp_path}/gone: No such file or directory; {step}")
    idunno.fake.world.put("a", b"x")
    got = idunno("get", "a", str(tmp_path / "nodir" / "x"))
    assert (got.status, got.error) == (1, f"error: {tmp_path}/nodir/x: No such file or directory; {step}")


def test_a_bug_is_one_line_and_a_story_only_when_asked(idunno: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(where: str | None, timeout_s: float | None) -> object:
        raise AssertionError("n1 holds\nwhat it cannot hold")

    monkeypatch.setattr(running, "connect", broken)
    outcome = idunno("ls")
    assert outcome.status == 1
    assert outcome.error.startswith("error: internal: AssertionError: n1 holds what it cannot hold; set IDUNNO_DEBUG=1")
    assert "Traceback" not in outcome.err
    monkeypatch.setenv("IDUNNO_DEBUG", "1")
    assert "Traceback" in idunno("ls").err


def test_an_interrupt_is_no_error_of_ours(idunno: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(where: str | None, timeout_s: float | None) -> object:
        raise asyncio.CancelledError

    monkeypatch.setattr(running, "connect", interrupted)
    assert idunno("ls").status == 130


def test_exit_codes_of_every_class() -> None:
    for cls in errors.BY_CODE.values():
        assert exit_code_of(cls("x")) == (3 if cls.may_have_happened else 1)
    assert exit_code_of(click.UsageError("x")) == 2
    assert exit_code_of(ValueError("x")) == 1


def test_durations_and_times() -> None:
    assert [parse_duration_s(text) for text in ("90", "45s", "1.5m", "12h", "1d", "250ms", "2w")] == [
        90,
        45,
        90,
        43_200,
        86_400,
        0.25,
        1_209_600,
    ]
    for bad in ("", "h", "-1", "1y", "nan", "inf", "1 h", "1e3"):
        with pytest.raises(ValueError, match="is no duration"):
            parse_duration_s(bad)
    assert parse_time_ms("10m", 1_000_000) == 400_000
    with pytest.raises(ValueError, match="more than 100 years ago"):  # what is taken fits what is sent
        parse_time_ms("9999999999999999d", 0)
    assert parse_time_ms("1970-01-01T00:00:01Z", 0) == parse_time_ms("1970-01-01 00:00:01", 0) == 1000
    assert parse_time_ms("1970-01-01T01:00:00+01:00", 0) == 0
    with pytest.raises(ValueError, match="is no time"):
        parse_time_ms("noon", 0)


def test_help_is_there_at_once_and_loads_nothing_heavy() -> None:
    heavy = ("asyncio", "msgspec", "rich", "prompt_toolkit", "numpy", "cryptography", "blake3", "ssl")
    program = f"import sys, idunno.cli.root; print([m for m in {heavy!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
    took = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "idunno", "--help"], capture_output=True, check=True)
        took.append(time.monotonic() - began)
    assert min(took) < 1.0, took  # on an idle machine it is below 0.25

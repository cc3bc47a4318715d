# The command as a process of its own: what it makes of closed, full and foreign surroundings. No cluster is asked.
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from idunno.cli.nodes import _user_name

CLOSED = (
    "import os, sys; os.close({descriptor}); os.execv(sys.executable, [sys.executable, '-m', 'idunno', *sys.argv[1:]])"
)


def run(*arguments: str, home: Path, closed: int | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    program = ["-m", "idunno"] if closed is None else ["-c", CLOSED.format(descriptor=closed)]
    environ = {"PATH": os.environ["PATH"], "IDUNNO_HOME": str(home), **more}
    environ |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, env=environ, timeout=60
    )


@pytest.mark.parametrize("arguments", [["--help"], ["node", "--help"]])
def test_a_result_that_cannot_be_written_is_one_line_and_a_failure(arguments: list[str], tmp_path: Path) -> None:
    closed = run(*arguments, home=tmp_path, closed=1)
    assert closed.returncode == 1
    assert closed.stderr.splitlines()[-1].startswith("error: ")
    assert "Bad file descriptor" in closed.stderr
    assert "Exception" not in closed.stderr


def test_a_closed_standard_input_is_named(tmp_path: Path) -> None:
    closed = run("shell", home=tmp_path, closed=0)
    assert (closed.returncode, closed.stderr) == (1, "error: standard input: Bad file descriptor\n")


def test_a_closed_standard_error_takes_the_message_and_not_the_status(tmp_path: Path) -> None:
    assert run("nonsense", home=tmp_path, closed=2).returncode == 2
    assert run("--version", home=tmp_path, closed=2).returncode == 0


def test_a_new_descriptor_never_takes_the_place_of_a_closed_standard_one(tmp_path: Path) -> None:
    program = (
        "import os; [os.close(descriptor) for descriptor in (0, 1, 2)]\n"
        "import sys; sys.stdin = sys.stdout = sys.stderr = None\n"
        "from idunno.cli.main import hold_standard_streams; hold_standard_streams()\n"
        f"opened = os.open({str(tmp_path / 'mine')!r}, os.O_RDWR | os.O_CREAT)\n"
        "os.write(opened, str(opened).encode())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert int((tmp_path / "mine").read_text()) > 2


@pytest.mark.parametrize("program", [["-m", "idunno", "status"], ["-m", "idunno.node", "--dir", "/nowhere"]])
def test_ctrl_c_while_it_loads_tells_no_story(program: list[str], tmp_path: Path) -> None:
    """The signal comes with the import of the first module that either loads late."""
    late = "idunno.cli.root" if program[1] == "idunno" else "idunno.node.process"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {late!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": path, "IDUNNO_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, *program], capture_output=True, text=True, env=environ, timeout=60)
    assert "Traceback" not in ended.stderr
    assert ended.returncode in (130, -signal.SIGINT)


@pytest.mark.parametrize("what", ["a file", "no directory"])
def test_a_node_that_cannot_read_its_directory_says_so_in_one_line(what: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    ended = subprocess.run(
        [sys.executable, "-m", "idunno.node", "--dir", str(tmp_path / what)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1
    assert what in ended.stderr


def test_somebody_without_a_name_or_home_is_somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert _user_name() == f"uid{os.getuid()}"
    other = run("status", "--cluster", "~nosuchuser/x", home=tmp_path)
    assert other.returncode == 1
    assert other.stderr == "error: ~nosuchuser/x: there is no such home directory; write the path without ~\n"


def test_what_an_encoding_lacks_is_shown_by_its_number_and_json_is_utf_8(tmp_path: Path) -> None:
    program = (
        "import sys, click\n"
        "from idunno.cli import main, root, running\n"
        "from idunno.cli.options import command\n"
        "@command('say', example='idunno say')\n"
        "def say():\n"
        "    running.result('n\\u00f6\\u7801', lambda: click.echo('n\\u00f6\\u7801 \\udcff'))\n"
        "root.cli.add_command(say)\n"
        "main.main()\n"
    )
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1", "IDUNNO_HOME": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", program, "say"], capture_output=True, env=environ, timeout=60)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert shown.stdout.decode("latin-1") == "nö\\u7801 \\udcff\n"
    document = subprocess.run(
        [sys.executable, "-c", program, "say", "--json"], capture_output=True, env=environ, timeout=60
    )
    assert document.stdout.decode() == '"nö码"\n'

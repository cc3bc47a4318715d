# idunno/cli/shell.py: the commands without `idunno` in front, typed or from a script.
#
# Rule 1: a line is run by the very commands of the command line: nothing works here that does not work there.
# Rule 2: Ctrl-C ends the command that runs, or clears the line that is typed; never the shell.
# Rule 3: what a secret stands in (--token) is not written into the history.
# Rule 4: completion only helps: it asks the cluster with a short time limit, and when that fails it offers nothing.
from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from idunno.base.errors import IdunnoError
from idunno.cli import running
from idunno.cli.options import Named, settings
from idunno.cli.running import DONE, USAGE, note, report, run

if TYPE_CHECKING:
    from prompt_toolkit.history import History

    from idunno.client.api import Cluster

SHORT_NAMES: Final = {
    "list_mem": ["members"],
    "list_self": ["members", "--self"],
    "c1": ["rates"],
    "c2": ["times"],
    "c3": ["batch-size"],
    "c4": ["results"],
    "c5": ["assignments"],
}
ENDINGS: Final = ("exit", "quit")
COMPLETE_S: Final = 2.0
"""A completion that takes longer is no help."""
REMEMBER_S: Final = 5.0
"""How long names are kept for the next completion."""
OFFERED_MAX: Final = 200

Names = Callable[[str, str], list[str]]
"""The names of a kind (file, model, ...) that begin with a prefix."""


def words_of(line: str) -> list[str]:
    """A line's words, short names written out. Raises ValueError for an open quote."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["idunno"]:
        words = words[1:]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    return SHORT_NAMES.get(words[0], [words[0]]) + words[1:] if words else []


def run_line(root: click.Group, common: Sequence[str], line: str, *, where: str = "") -> int:
    """Run one line; its exit status. `common` are the options the shell itself was started with."""
    try:
        words = words_of(line)
    except ValueError as error:
        report(f"{error}: check the quotes of {line.strip()[:80]!r}", where)
        return USAGE
    if not words:
        return DONE
    if words[0] == "shell":
        report("this is a shell already: type a command, or exit", where)
        return USAGE
    return run([*common, *words], root, where=where)


def common_options() -> list[str]:
    """The options this shell was started with, for each of its commands."""
    chosen = settings()
    options = ["--json"] if chosen.json else []
    if chosen.cluster is not None:
        options += ["--cluster", chosen.cluster]
    if chosen.timeout_s is not None:
        options += ["--timeout", str(chosen.timeout_s)]
    return options


def run_script(root: click.Group, lines: Iterable[str], *, keep_going: bool) -> int:
    """Run the lines of a script up to the first error, or all of them; the status of the first error."""
    common = common_options()
    status = DONE
    running.in_shell = True
    for number, line in enumerate(lines, 1):
        if line.strip() in ENDINGS:
            break
        outcome = run_line(root, common, line, where=f"line {number}")
        status = status or outcome
        if status != DONE and not keep_going:
            break
    return status


def interact(root: click.Group) -> int:
    """Read lines from the terminal until its end, `exit` or `quit`."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            if "--token" not in string:
                with contextlib.suppress(OSError):  # a full disk: the line is remembered as long as the shell runs
                    super().store_string(string)

    class Offers(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            before, current = _split(document.text_before_cursor)
            for offer in offers(root, before, current, names):
                yield Completion(offer.text, start_position=-len(current), display_meta=offer.about)

    common = common_options()
    names = ClusterNames(settings().cluster)
    try:
        history: History = Kept(str(_history_file()))
    except (OSError, IdunnoError) as error:
        note(f"what you type is not kept for the next time: {error}")
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=history, completer=Offers(), complete_in_thread=True, complete_while_typing=False
    )
    running.in_shell = True
    note("Type a command, `help` for all of them, `help COMMAND` for one, Tab to complete, `exit` to leave.")
    while True:
        try:
            line = session.prompt("idunno> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return DONE
        if line.strip() in ENDINGS:
            return DONE
        run_line(root, common, line)


def _history_file() -> Path:
    """Made if need be, for this user alone. Raises OSError, InvalidArgument for somebody without a home."""
    from idunno.client.locate import home

    at_home = home(os.environ)
    at_home.mkdir(mode=0o700, parents=True, exist_ok=True)
    history = at_home / "history"
    history.touch(mode=0o600)
    with open(history, "ab"):  # may it be written to?
        return history


@dataclass(frozen=True, slots=True)
class Offer:
    text: str
    about: str = ""


def _split(text: str) -> tuple[list[str], str]:
    """The words before the one the cursor is in, and what is there of that one."""
    head, _, current = text.rpartition(" ")
    try:
        return shlex.split(head), current
    except ValueError:  # inside a quoted word: nothing to offer
        return ["help", "-"], current


def offers(root: click.Group, before: Sequence[str], current: str, names: Names) -> list[Offer]:
    """What could stand at the cursor, in order."""
    words = list(before)
    if words[:1] == ["help"]:
        words = words[1:]
    if words:
        words = SHORT_NAMES.get(words[0], [words[0]]) + words[1:]
    found: click.Command = root
    while isinstance(found, click.Group) and words:
        below = found.commands.get(words.pop(0))
        if below is None:
            return []
        found = below
    if isinstance(found, click.Group):
        known = {name: command.get_short_help_str() for name, command in found.commands.items() if not command.hidden}
        if found is root:
            known |= {short: " ".join(words) for short, words in SHORT_NAMES.items()} | {"help": "", "exit": ""}
        return [Offer(name, about) for name, about in sorted(known.items()) if name.startswith(current)]
    if current.startswith("-"):
        return _options(found, current)
    expected = _expected(found, words)
    return [] if expected is None else _values(expected, current, names)


def _options(command: click.Command, current: str) -> list[Offer]:
    return [
        Offer(text, option.help or "")
        for option in command.params
        if isinstance(option, click.Option)
        for text in option.opts
        if text.startswith(current)
    ]


def _expected(command: click.Command, words: Sequence[str]) -> click.Parameter | None:
    """The option whose value, or the argument, that comes after `words`."""
    options = {text: option for option in command.params if isinstance(option, click.Option) for text in option.opts}
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    place, waiting = 0, None
    for word in words:
        if waiting is not None:
            waiting = None
        elif word in options:
            waiting = None if options[word].is_flag else options[word]
        elif not word.startswith("-") or word == "-":
            place += 1
    if waiting is not None:
        return waiting
    return arguments[place] if place < len(arguments) else None


def _values(param: click.Parameter, current: str, names: Names) -> list[Offer]:
    if isinstance(param.type, click.Choice):
        return [Offer(str(choice)) for choice in param.type.choices if str(choice).startswith(current)]
    if isinstance(param.type, Named):
        return [Offer(name) for name in names(param.type.kind, current)[:OFFERED_MAX]]
    if isinstance(param.type, click.Path):
        return _paths(current)
    return []


def _paths(current: str) -> list[Offer]:
    folder, _, start = current.rpartition("/")
    shown = f"{folder}/" if folder or current.startswith("/") else ""
    try:
        entries = sorted(Path(shown or ".").expanduser().iterdir())
    except OSError:
        return []  # no such folder, or not ours to look into: nothing to offer
    return [
        Offer(shown + entry.name + ("/" if entry.is_dir() else ""))
        for entry in entries
        if entry.name.startswith(start) and (start or not entry.name.startswith("."))
    ][:OFFERED_MAX]


class ClusterNames:
    """Names asked of the cluster, remembered for REMEMBER_S."""

    def __init__(self, where: str | None) -> None:
        self._where = where
        self._known: dict[str, tuple[float, list[str]]] = {}  # by kind; files are asked by prefix, and not kept

    def __call__(self, kind: str, prefix: str) -> list[str]:
        import asyncio

        until, known = self._known.get(kind, (0.0, []))
        if time.monotonic() >= until:
            try:
                known = asyncio.run(self._ask(kind, prefix))
            except (IdunnoError, OSError):
                return []  # rule 4; the command itself will say what is wrong
            if kind not in ("file", "prefix"):
                self._known[kind] = (time.monotonic() + REMEMBER_S, known)
        return sorted({name for name in known if name.startswith(prefix)})

    async def _ask(self, kind: str, prefix: str) -> list[str]:
        async with await running.connect(self._where, COMPLETE_S) as cluster:
            if kind in ("file", "prefix"):
                return await _files(cluster, prefix)
            found: list[str] = []
            if kind in ("model", "any"):
                found += [row.model for row in await cluster.models()]
            if kind in ("job", "any"):
                found += [row.job for row in await cluster.jobs()]
            if kind in ("node", "any"):
                found += [row.name for row in await cluster.members()]
            return found


async def _files(cluster: Cluster, prefix: str) -> list[str]:
    from idunno.sdfs.messages import LIST, List

    answer = await cluster.session.call(LIST, List(prefix, limit=OFFERED_MAX), timeout_s=COMPLETE_S)
    return [row.name for row in answer.files]

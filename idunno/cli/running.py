# idunno/cli/running.py: from a command's body to an exit status, for all commands alike.
#
# Rule 1: exit status: 0 done, 1 failed with one line `error: what, numbers, next step`, 2 wrong usage, 3 the outcome is
#         unknown. `exit_code_of` and `report` are the only places that know.
# Rule 2: a question whose answer was lost changed nothing: it failed (1). 3 is kept for what may have happened.
# Rule 3: results go to standard output, everything else to standard error.
from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from idunno.base.errors import IdunnoError, Unavailable
from idunno.cli import render
from idunno.cli.options import settings

if TYPE_CHECKING:
    from idunno.client.api import Cluster

DONE, FAILED, USAGE, UNKNOWN, INTERRUPTED = 0, 1, 2, 3, 130  # 130: what shells use for Ctrl-C

LOOK_FIRST: Final = "it may have happened: look before trying again"

NEXT_STEPS: Final = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some space there, or choose another place",
    errno.ENOENT: "check the path: is it written right, and is its folder there?",
    errno.EMFILE: "allow more open files: `ulimit -n 4096`",
}
"""After what the system says, where that alone is no help."""

in_shell = False  # set by the interactive shell: a command then shares its process with those that follow

T = TypeVar("T")


async def connect(where: str | None, timeout_s: float | None) -> Cluster:
    from idunno.client.api import connect_async

    return await connect_async(where, timeout_s=timeout_s)


def work(body: Callable[[Cluster], Awaitable[T]]) -> T:
    """Run a command's body on a connection to the cluster that its options name."""
    import asyncio

    try:
        return asyncio.run(_work(body))
    except asyncio.CancelledError:  # by SIGTERM
        raise KeyboardInterrupt from None


async def _work(body: Callable[[Cluster], Awaitable[T]]) -> T:
    import asyncio

    chosen = settings()
    if threading.current_thread() is threading.main_thread():
        task = asyncio.current_task()
        assert task is not None
        # SIGTERM ends like Ctrl-C, so that temporary files go away.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with await connect(chosen.cluster, chosen.timeout_s) as cluster:
        try:
            return await body(cluster)
        except IdunnoError as error:
            if cluster.session.changed or not error.may_have_happened:
                raise
            raise Unavailable(str(error)) from error


def run(arguments: list[str], command: click.Command, *, where: str = "") -> int:
    """Run a command line; its exit status. `where` ("line 3") tells a script's reader which line an error is of."""
    try:
        outcome = command.main(args=arguments, prog_name="idunno", standalone_mode=False)
        with printing():
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has enough; nothing is left to be said to it
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, click.Abort):
        report("interrupted", where)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - every failure ends here, as one line and a status
        return _failed(error, where)
    return outcome if isinstance(outcome, int) else DONE


def _failed(error: Exception, where: str) -> int:
    code = exit_code_of(error)
    if isinstance(error, click.UsageError):
        if error.ctx is not None:
            note(error.ctx.get_usage())
            report(f"{error.format_message().rstrip('.')}; see `{error.ctx.command_path} --help`", where)
        else:
            report(f"{error.format_message().rstrip('.')}; see `idunno --help`", where)
    elif isinstance(error, click.ClickException):
        report(error.format_message(), where)
    elif isinstance(error, IdunnoError):
        text = str(error) or type(error).__name__
        report(f"{text}; {LOOK_FIRST}" if code == UNKNOWN and "see `" not in text else text, where)
    elif isinstance(error, OSError):
        about = f"{error.filename}: " if error.filename is not None else ""
        step = NEXT_STEPS.get(error.errno or 0, "")
        report(f"{about}{error.strerror or error}{step and f'; {step}'}", where)
    else:
        report(f"internal: {type(error).__name__}: {error}; set IDUNNO_DEBUG=1 for the whole story", where)
    if os.environ.get("IDUNNO_DEBUG") == "1" and not isinstance(error, click.ClickException):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    return code


def exit_code_of(error: BaseException) -> int:
    """The exit status that an error ends a command with."""
    if isinstance(error, click.UsageError):
        return USAGE
    if isinstance(error, IdunnoError) and error.may_have_happened:
        return UNKNOWN
    return FAILED


def report(text: str, where: str = "") -> None:
    """The one line of a failure, whatever the text contains."""
    line = render.printable(" ".join(text.split()))
    note(f"error: {where}: {line}" if where else f"error: {line}")


def note(text: str) -> None:
    """A message for the person, beside the results."""
    with contextlib.suppress(
        OSError
    ):  # standard error is full or closed: nobody can be told, and the status still says it
        click.echo(text, err=True)


def result(value: Any, show: Callable[[], None]) -> None:
    """The command's result: as one JSON document with --json, else by `show`."""
    if settings().json:
        json_line(value)
        return
    with printing():
        show()


def json_line(value: Any) -> None:
    import msgspec

    with printing():
        click.echo(msgspec.json.encode(value))  # bytes: JSON is UTF-8, whatever the terminal's encoding is


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Around the writing of a result: an error of that is not one of the command. Raises OSError."""
    try:
        yield
    except BrokenPipeError:  # the reader has enough
        raise
    except OSError as error:
        done = f"{error.strerror}: the command was carried out, its result could not be written"
        raise OSError(error.errno, done, "standard output") from None


def usage(text: str) -> click.UsageError:
    """Wrong usage that click itself cannot see."""
    return click.UsageError(text, click.get_current_context())

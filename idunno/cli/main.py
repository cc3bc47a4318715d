# idunno/cli/main.py: where the command `idunno` begins. Nothing that takes time is loaded before this is in charge.
#
# Rule 1: Ctrl-C ends it in one line from its first moment on, while it still loads as well.
# Rule 2: what a terminal of another encoding, or none, cannot show is shown by its number; it is no reason to fail.
# Rule 3: descriptors 0, 1 and 2 are taken, whatever the caller closed: a file or connection of ours that got one of them
#         would be read as somebody's input, or written over by our messages.
from __future__ import annotations

import io
import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    try:
        hold_standard_streams()
        show_what_can_be_shown()
        from idunno.cli.root import cli
        from idunno.cli.running import run

        status = run(sys.argv[1:], cli)
    except KeyboardInterrupt:
        status = 130  # as in running.py, which may not be loaded yet
    let_go_of_output()
    sys.exit(status)


def hold_standard_streams() -> None:
    """Open what was closed among 0, 1 and 2, so that using it fails with "Bad file descriptor", as it does for `cat`."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        mode = os.O_WRONLY if descriptor == 0 else os.O_RDONLY  # the wrong way round: reading or writing it fails
        opened = os.open(os.devnull, mode)
        if opened != descriptor:
            os.dup2(opened, descriptor, inheritable=False)
            os.close(opened)
        setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115 (until the end)


def show_what_can_be_shown() -> None:
    """Also names that are no UTF-8, which local files may have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def let_go_of_output() -> None:
    """What could not be written was reported already: the interpreter is not to fail over it again, with another status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), stream.fileno())

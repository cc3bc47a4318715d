# idunno/cli/main.py: the command `idunno`.
from __future__ import annotations

import sys
from typing import NoReturn

import click

from idunno import __version__
from idunno.cli import files, logs, models, nodes, recovery
from idunno.cli.options import Group, command, group
from idunno.cli.running import USAGE, run


@group("idunno", example="idunno up", invoke_without_command=True)
@click.version_option(__version__, prog_name="idunno")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """A cluster of equal peers that serves machine-learning models. Without a command on a terminal: the shell."""
    if ctx.invoked_subcommand is not None:
        return
    if sys.stdin.isatty() and sys.stdout.isatty():
        ctx.invoke(shell, keep_going=False)
    click.echo(ctx.get_help(), err=True)
    ctx.exit(USAGE)


@command("shell", example="idunno shell < script")
@click.option("--keep-going", is_flag=True, help="In a script: go on after a line that failed.")
@click.pass_context
def shell(ctx: click.Context, keep_going: bool) -> None:
    """These commands without `idunno` in front: on a terminal with completion and history, or line by line from a file."""
    from idunno.cli.shell import interact, run_script

    ctx.exit(interact(cli) if sys.stdin.isatty() else run_script(cli, sys.stdin, keep_going=keep_going))


def _fill(root: Group) -> None:
    for found in (*nodes.COMMANDS, *files.COMMANDS, *models.COMMANDS, *recovery.COMMANDS, logs.grep, shell):
        root.add_command(found)


_fill(cli)


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:], cli))

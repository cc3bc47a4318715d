# idunno/cli/root.py: all commands in one group. Where they are started is in main.py.
from __future__ import annotations

import sys

import click

from idunno import __version__
from idunno.base.naming import naming
from idunno.cli import files, logs, models, nodes, recovery
from idunno.cli.options import Group, command, group
from idunno.cli.running import USAGE


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

    if sys.stdin.isatty():
        ctx.exit(interact(cli))
    with naming("standard input"):
        status = run_script(cli, sys.stdin, keep_going=keep_going)
    ctx.exit(status)


def _fill(root: Group) -> None:
    for found in (*nodes.COMMANDS, *files.COMMANDS, *models.COMMANDS, *recovery.COMMANDS, logs.grep, shell):
        root.add_command(found)


_fill(cli)

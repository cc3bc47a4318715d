# idunno/cli/recovery.py: a lost quorum, backups, and state for a bug report.
#
# Rule: what is lost or replaced is shown before it is done. With --json or without a terminal nobody can be asked: --yes says it.
from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from idunno.cli import render
from idunno.cli.options import LOCAL, command, settings
from idunno.cli.running import note, result

if TYPE_CHECKING:
    from idunno.node.recover import Report

SHOWN_MAX = 20
"""Lost versions that are shown to a person; all are in --json."""


@command("recover", example="idunno recover --dir /mnt/n4 --dir /mnt/n5")
@click.option("--dir", "directories", type=LOCAL, multiple=True, required=True, metavar="DIR", help="Of a survivor.")
@click.argument("more", type=LOCAL, nargs=-1, metavar="[DIR]...")
@click.option("--yes", is_flag=True, help="Do it without asking.")
@click.option("--dry-run", is_flag=True, help="Only show what would be done, and lost.")
@click.option("--anew", is_flag=True, help="Forget a recovery that was prepared with others and not begun here.")
def recover(directories: tuple[str, ...], more: tuple[str, ...], yes: bool, dry_run: bool, anew: bool) -> None:
    """More than half of the voters are lost for good: make a new cluster of the stopped survivors' directories.

    The newest log counts, blocks stay where they are; who was not part of it comes back by `idunno join --adopt`.
    """
    from idunno.node.recover import recover as work

    paths = [Path(directory).expanduser().absolute() for directory in (*directories, *more)]

    def agree(report: Report) -> bool:
        if not settings().json:
            _show(report)
        return not dry_run and (yes or _asked(f"make a new cluster of {len(report.survivors)} nodes?"))

    answer = work(paths, agree, anew=anew)
    if not answer["recovered"] and not dry_run:
        raise click.Abort
    result(answer, lambda: _done(answer, paths))


def _asked(question: str) -> bool:
    from idunno.base.errors import InvalidArgument

    if settings().json or not sys.stdin.isatty():
        raise InvalidArgument("nobody can be asked here: look with --dry-run, then give --yes")
    return click.confirm(question, err=True)


def _show(report: Report) -> None:
    note(f"cluster {report.cluster}")
    for found in report.survivors:
        said = f"{found.name}: log up to entry {found.index}, term {found.term}; {found.blocks} blocks"
        said += f"; {found.dropped} entries that were never acknowledged are dropped" if found.dropped else ""
        note(said + (f"; {found.problem}" if found.problem else ""))
    last = report.last
    note(f"the newest entry is {last.index}, term {last.term}, of {last.time} ({last.age_s} s ago)")
    words = {
        "all-there": "nothing that was acknowledged is missing",
        "there-unless-cut-off": "nothing that was acknowledged should be missing",
        "may-be-missing": "the last acknowledged entries MAY BE MISSING",
    }
    note(f"{words[report.acknowledged]}: {report.why}")
    if report.gone:
        note(f"out of the cluster: {', '.join(report.gone)}")
    if report.users:
        note(f"must log in again: {', '.join(report.users)}")
    if report.blocks_unnamed:
        note(f"{report.blocks_unnamed} blocks that no file names will be removed")
    note(f"{report.files} files, {report.versions_lost} versions lack blocks on these nodes")
    for row in report.lost[:SHOWN_MAX]:
        note(f"  {render.printable(row.name)} version {row.version}: {row.missing} of {row.blocks} blocks")
    if report.versions_lost > SHOWN_MAX:
        note(f"  and {report.versions_lost - SHOWN_MAX} more; --json --dry-run has them")


def _done(answer: dict[str, Any], paths: list[Path]) -> None:
    if not answer["recovered"]:
        return
    click.echo(f"cluster {answer['cluster']} of {', '.join(answer['nodes'])}")
    if answer["unfinished"]:
        note(f"begun together and perhaps not finished: {', '.join(answer['unfinished'])}; give their directories, too")
    if answer.get("finished"):
        note(f"a {answer['finished']} that was interrupted is finished")
    else:
        click.echo(answer["token"])
        note("the token lets nodes in: `idunno join ADDRESS --token TOKEN --dir DIR --adopt`")
    note(f"start them with `idunno node run --dir DIR`; what was there is in {answer['aside']}, for you to delete")


COMMANDS = [recover]

# idunno/cli/recovery.py: a lost quorum, backups, and state for a bug report.
#
# Rule: what is lost or replaced is shown before it is done. With --json or without a terminal nobody can be asked: --yes says it.
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from idunno.cli import render
from idunno.cli.options import LOCAL, TEXT, command, settings
from idunno.cli.running import note, result, usage, work

if TYPE_CHECKING:
    from idunno.node.config import NodeConfig
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
    from idunno.client.locate import expanded
    from idunno.node.recover import recover as make

    paths = [expanded(directory).absolute() for directory in (*directories, *more)]

    def agree(report: Report) -> bool:
        if not settings().json:
            _show(report)
        return not dry_run and (yes or _asked(f"make a new cluster of {len(report.survivors)} nodes?"))

    answer = make(paths, agree, anew=anew)
    if not answer["recovered"] and not dry_run:
        raise click.Abort
    result(answer, lambda: _done(answer, paths))


def _asked(question: str) -> bool:
    from idunno.base.errors import InvalidArgument

    if settings().json or not sys.stdin.isatty():
        raise InvalidArgument("nobody can be asked here: look with --dry-run, then give --yes")
    return click.confirm(question, err=True)


def _show(report: Report) -> None:
    import msgspec

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
    if report.acknowledged == "all-there":
        note("these nodes are a majority: started, they go on as they are, and nobody has to log in again")
    if report.gone:
        note(f"out of the cluster: {', '.join(report.gone)}")
    if report.users:
        note(f"must log in again: {', '.join(report.users)}")
    if report.blocks_unnamed:
        note(f"{report.blocks_unnamed} blocks that no file names will be removed")
    note(f"{report.files} files")
    _lost(report.versions_lost, [msgspec.to_builtins(row) for row in report.lost])


def _lost(count: int, rows: list[dict[str, Any]]) -> None:
    note(f"{count} versions lack blocks on these nodes")
    for row in rows[:SHOWN_MAX]:
        note(f"  {render.printable(row['name'])} version {row['version']}: {row['missing']} of {row['blocks']} blocks")
    if count > SHOWN_MAX:
        note(f"  and {count - SHOWN_MAX} more; --json has them")


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


@command("snapshot", example="idunno snapshot monday.backup")
@click.argument("file", type=LOCAL)
@click.option("--with-keys", is_flag=True, help="Also who may speak to the cluster, sealed with a passphrase.")
@click.option(
    "--passphrase-file", type=LOCAL, metavar="FILE", help="Its first line. [default: $IDUNNO_PASSPHRASE, or asked]"
)
def snapshot(file: str, with_keys: bool, passphrase_file: str | None) -> None:
    """Write the cluster's metadata, as it is now, into FILE: names, versions, models, jobs, and small files' contents."""
    _refuse_stream(file)
    passphrase = _passphrase(with_keys, passphrase_file, confirm=True)
    answer = work(lambda cluster: cluster.snapshot(file, passphrase=passphrase))

    def show() -> None:
        click.echo(f"{answer.files} files as of entry {answer.index}, {answer.size:,} bytes in {file}")
        if answer.smalls_missing:
            note(f"{answer.smalls_missing} contents of small files are nowhere; see `idunno repair`")

    result(answer, show)


def _refuse_stream(file: str) -> None:
    if file == "-":
        raise usage("FILE is written whole or not at all, so standard output cannot take its place: name a file")


@command("restore", example="idunno restore monday.backup --dir /var/lib/idunno --listen 192.168.1.10:7400")
@click.argument("file", type=LOCAL)
@click.option(
    "--dir", "directories", type=LOCAL, multiple=True, metavar="DIR", help="Of a stopped node. [default: WHERE]"
)
@click.option(
    "--listen", type=TEXT, metavar="HOST:PORT", help="Make DIR the first node of a new cluster, which listens there."
)
@click.option("--name", type=TEXT, metavar="NAME", help="That node's name. [default: host name and port]")
@click.option("--with-keys", is_flag=True, help="Also who may speak to the cluster.")
@click.option(
    "--passphrase-file", type=LOCAL, metavar="FILE", help="Its first line. [default: $IDUNNO_PASSPHRASE, or asked]"
)
def restore(
    file: str,
    directories: tuple[str, ...],
    listen: str | None,
    name: str | None,
    with_keys: bool,
    passphrase_file: str | None,
) -> None:
    """Make FILE the metadata of a cluster that is stopped and empty, or of a new one. Blocks come with nodes that are adopted."""
    from idunno.client.locate import expanded
    from idunno.node.restore import restore as make

    if listen is None and name is not None:
        raise usage("--name goes with --listen: it names a new node")
    paths = [expanded(directory).absolute() for directory in directories] or ([] if listen else _all_nodes())
    if listen is not None and len(paths) != 1:
        raise usage("--listen makes one new node: give its directory with --dir")
    passphrase = _passphrase(with_keys, passphrase_file, confirm=False)
    answer = make(expanded(file), paths, new=_new_node(listen, name), passphrase=passphrase)
    result(answer, lambda: _restored(answer))


def _new_node(listen: str | None, name: str | None) -> NodeConfig | None:
    if listen is None:
        return None
    from idunno.node.config import NodeConfig
    from idunno.node.lifecycle import default_name

    return NodeConfig(name=name or default_name(listen), listen=listen)


def _all_nodes() -> list[Path]:
    """The directories of WHERE."""
    from idunno.client.locate import expanded, home
    from idunno.node.local import existing_nodes

    where = settings().cluster or os.environ.get("IDUNNO_CLUSTER") or str(home(os.environ) / "local")
    path = expanded(where).absolute()
    if not path.is_dir():
        raise usage(f"{where}: restore works on directories of stopped nodes; give them with --dir")
    return [path] if (path / "node.toml").exists() else existing_nodes(path) or [path]


def _passphrase(with_keys: bool, file: str | None, *, confirm: bool) -> str | None:
    if not with_keys:
        if file is not None:
            raise usage("--passphrase-file goes with --with-keys")
        return None
    if file is not None:
        with open(file, "rb") as opened:
            line = opened.readline(4096)
        try:
            return line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise usage(f"the first line of {file} is no text: give the file that holds the passphrase") from None
    if "IDUNNO_PASSPHRASE" in os.environ:
        return os.environ["IDUNNO_PASSPHRASE"]
    if not sys.stdin.isatty():
        raise usage("nobody can be asked for the passphrase: give --passphrase-file or $IDUNNO_PASSPHRASE")
    return str(click.prompt("passphrase", hide_input=True, confirmation_prompt=confirm, err=True))


def _restored(answer: dict[str, Any]) -> None:
    if "from" not in answer:
        note(f"a {answer['finished']} that was interrupted is finished; run this again if another is wanted")
        click.echo(f"cluster {answer['cluster']}")
        return
    was = answer["from"]
    click.echo(
        f"cluster {answer['cluster']} holds {answer['files']} files, as of {was['time']} in {was['cluster'][:8]}"
    )
    click.echo(answer["token"])
    note("the token lets nodes in: `idunno join ADDRESS --token TOKEN --dir DIR --adopt` brings blocks of old nodes")
    if answer["jobs_cancelled"]:
        note(f"{answer['jobs_cancelled']} unfinished jobs are cancelled")
    _lost(answer["versions_lost"], answer["lost"])


@command("dump", example="idunno dump report.zip")
@click.argument("file", type=LOCAL)
def dump(file: str) -> None:
    """Write the state of all nodes that answer into FILE, a zip for a bug report: names are in it, contents and keys are not."""
    _refuse_stream(file)
    answer = work(lambda cluster: cluster.dump(file))

    def show() -> None:
        click.echo(
            f"{len(answer.nodes)} nodes, the machine as of entry {answer.index}, {answer.size:,} bytes in {file}"
        )
        for name, why in answer.missing.items():
            note(f"{name} is not in it: {why}")
        if not answer.complete:
            note("the machine is too large for a report: only its beginning is in it")

    result(answer, show)


COMMANDS = [recover, snapshot, restore, dump]

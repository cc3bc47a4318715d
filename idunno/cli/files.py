# idunno/cli/files.py: put, get and the other commands about files.
from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from idunno.base.memory import give_back_large_blocks
from idunno.base.naming import naming
from idunno.cli import render
from idunno.cli.options import ANY, FILE, LOCAL, NODE, PREFIX, Count, Duration, Moment, command, group, settings
from idunno.cli.running import note, result, usage, work

if TYPE_CHECKING:
    from idunno.client.api import Cluster
    from idunno.sdfs.messages import DeleteAnswer, PutAnswer

STREAM = "-"
QUORUM_MAX = 4
"""COPIES_WANTED, whose module is too heavy to be loaded for each `--help`; a test compares them."""


def _shown(local: str) -> str:
    """What an error calls it that is written to."""
    return "standard output" if local == STREAM else local


def _seconds_since(began: float) -> float:
    return round(time.monotonic() - began, 3)


@command("put", example="idunno put photo.jpg photos/1.jpg")
@click.argument("local", type=LOCAL)
@click.argument("name", type=FILE)
@click.option(
    "--write-quorum", type=Count(min=1, max=QUORUM_MAX), metavar="N", help="Synced copies to wait for. [default: 4]"
)
@click.option("--if-version", type=Count(min=0), metavar="V", help="Only if this is the version now; 0: none.")
@click.option("--list", "listed", is_flag=True, help="Of a folder: name each file.")
def put(local: str, name: str, write_quorum: int | None, if_version: int | None, listed: bool) -> None:
    """Store the file LOCAL as the next version of NAME; a folder with everything below it; - is standard input."""
    give_back_large_blocks()
    if local != STREAM and Path(local).is_dir():
        if if_version is not None:
            raise usage("--if-version is for one file, not for a folder")
        _put_folder(local, name, write_quorum, listed)
        return
    if listed:
        raise usage(f"--list is for a folder, and {local} is none")
    began = time.monotonic()

    async def body(cluster: Cluster) -> PutAnswer:
        with render.bar(name, in_bytes=True) as progress:
            if local != STREAM:
                return await cluster.put(
                    local, name, write_quorum=write_quorum, if_version=if_version, progress=progress
                )
            with _standard_input() as stdin, naming("standard input"):
                return await cluster.put(
                    stdin, name, write_quorum=write_quorum, if_version=if_version, progress=progress
                )

    answer = work(body)
    _warn_degraded(answer)
    result(
        _put_json(answer) | {"seconds": _seconds_since(began)},
        lambda: click.echo(
            f"{answer.name} version {answer.version}: {render.size(answer.size)} on {', '.join(answer.replicas)}"
        ),
    )


def _standard_input() -> IO[bytes]:
    """Unbuffered: a reader in a thread then holds no lock that the end of the program would wait for."""
    with naming("standard input"):
        return open(0, "rb", buffering=0, closefd=False)


def _put_json(answer: PutAnswer) -> dict[str, Any]:
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(answer)
    return fields


def _warn_degraded(answer: PutAnswer) -> None:
    if answer.degraded:
        note(f"degraded: {answer.name} version {answer.version}: {answer.why or f'{answer.copies} copies'}")


def _put_folder(local: str, name: str, write_quorum: int | None, listed: bool) -> None:
    began = time.monotonic()

    async def body(cluster: Cluster) -> Any:
        with render.bar(name, in_bytes=True) as progress:
            return await cluster.put_folder(local, name, write_quorum=write_quorum, progress=progress)

    answer = work(body)
    for degraded in [file for file in answer.files if file.degraded][:5]:
        _warn_degraded(degraded)
    document: dict[str, Any] = {"files": len(answer.files), "size": answer.size, "seconds": _seconds_since(began)}
    if listed:
        document["list"] = [_put_json(file) for file in answer.files]

    def show() -> None:
        if listed:
            for file in answer.files:
                click.echo(f"{file.name} version {file.version}: {render.size(file.size)}")
        click.echo(f"{len(answer.files)} files, {render.size(answer.size)}, below {name.rstrip('/')}/")

    result(document, show)


@command("get", example="idunno get photos/1.jpg photo.jpg")
@click.argument("name", type=FILE)
@click.argument("local", type=LOCAL)
@click.option("--version", type=Count(min=1), metavar="V", help="This version instead of the latest.")
@click.option("--as-of", type=Moment(), metavar="TIME", help="The version of that time: ISO, or how long ago (2h).")
def get(name: str, local: str, version: int | None, as_of: int | None) -> None:
    """Fetch NAME, verified, into the file LOCAL; - is standard output. NAME/ fetches everything below it into a folder."""
    if version is not None and as_of is not None:
        raise usage("--version and --as-of exclude each other")
    give_back_large_blocks()
    if name.endswith("/"):
        if version is not None or as_of is not None or local == STREAM:
            raise usage(f"{name} is a folder: it has no --version or --as-of, and needs a local folder")
        _get_folder(name, local)
        return
    _refuse_json_stream(local)
    began = time.monotonic()
    from idunno.base.errors import NotFound

    async def body(cluster: Cluster) -> Any:
        target = sys.stdout.buffer if local == STREAM else local
        with render.bar(name, in_bytes=True) as progress:
            try:
                with naming(_shown(local)):
                    return await cluster.get(name, target, version=version, as_of_ms=as_of, progress=progress)
            except NotFound:
                if await _is_folder(cluster, name):
                    raise NotFound(f"{name} is a folder; get all below it: `idunno get {name}/ DIRECTORY`") from None
                raise

    info = work(body)
    if local == STREAM:
        return
    document = {"name": info.name, "version": info.version, "size": info.size, "seconds": _seconds_since(began)}
    result(document, lambda: click.echo(f"{info.name} version {info.version}: {render.size(info.size)} in {local}"))


async def _is_folder(cluster: Cluster, name: str) -> bool:
    return bool((await cluster.file_client.ls_page(f"{name.rstrip('/')}/", limit=1)).files)


def _refuse_json_stream(local: str) -> None:
    if local == STREAM and settings().json:
        raise usage("with --json standard output is for the document alone: write the file somewhere else than -")


def _get_folder(name: str, local: str) -> None:
    began = time.monotonic()

    async def body(cluster: Cluster) -> Any:
        with render.bar(name, in_bytes=True) as progress:
            return await cluster.get_folder(name, local, progress=progress)

    got = work(body)
    document = {"files": len(got.files), "size": got.size, "seconds": _seconds_since(began)}
    result(document, lambda: click.echo(f"{len(got.files)} files, {render.size(got.size)}, in {local}"))


@command("get-versions", example="idunno get-versions notes.txt 3 history.txt")
@click.argument("name", type=FILE)
@click.argument("count", type=Count(min=1), metavar="K")
@click.argument("local", type=LOCAL)
def get_versions(name: str, count: int, local: str) -> None:
    """The last K versions of NAME in one file LOCAL, newest first, each behind a line that names it."""
    give_back_large_blocks()
    _refuse_json_stream(local)
    began = time.monotonic()

    async def body(cluster: Cluster) -> Any:
        target = sys.stdout.buffer if local == STREAM else local
        with render.bar(name, in_bytes=True) as progress, naming(_shown(local)):
            return await cluster.get_versions(name, count, target, progress=progress)

    infos = work(body)
    if local == STREAM:
        return
    document = {
        "name": name,
        "versions": [info.version for info in infos],
        "size": sum(info.size for info in infos),
        "seconds": _seconds_since(began),
    }
    result(document, lambda: click.echo(f"{render.counted(len(infos), 'version')} of {name} in {local}"))


@command("versions", example="idunno versions notes.txt")
@click.argument("name", type=FILE)
def versions(name: str) -> None:
    """The versions of NAME, newest first, and the nodes that hold each."""
    rows = work(lambda cluster: cluster.versions(name))
    result(
        rows,
        lambda: render.table(
            ["version", "size", "created", "replicas"],
            [(row.version, row.size, row.created, row.replicas) for row in rows],
        ),
    )


@command("ls", example="idunno ls photos/")
@click.argument("prefix", type=PREFIX, default="")
@click.option("--system", is_flag=True, help="The system's own files below .idunno/ as well.")
@click.option("-l", "--long", "long", is_flag=True, help="All versions' bytes: logical, and stored (of one copy).")
def ls(prefix: str, system: bool, long: bool) -> None:
    """The files whose name begins with PREFIX."""
    rows = work(lambda cluster: cluster.ls(prefix, system=system, long=long))
    if long:
        result(
            rows,
            lambda: render.table(
                ["name", "version", "size", "created", "versions", "logical", "stored"],
                [(r.name, r.version, r.size, r.created, r.versions, r.logical, r.stored) for r in rows],
            ),
        )
        return
    result(
        rows,
        lambda: render.table(
            ["name", "version", "size", "created"], [(row.name, row.version, row.size, row.created) for row in rows]
        ),
    )


@command("where", example="idunno where photos/1.jpg")
@click.argument("name", type=FILE)
def where(name: str) -> None:
    """The nodes that hold each block of NAME, and how many copies are wanted and found."""
    import msgspec

    answer = work(lambda cluster: cluster.where(name))
    document = {
        "name": answer.name,
        "version": answer.version,
        "copies": {"wanted": answer.copies_wanted, "found": answer.copies_found},
        "blocks": msgspec.to_builtins(answer.blocks),
    }

    def show() -> None:
        wanted, found = answer.copies_wanted, answer.copies_found
        click.echo(f"{render.printable(answer.name)} version {answer.version}: {found} of {wanted} copies")
        render.table(
            ["block", "size", "nodes"], [(block.block[:16], block.size, block.nodes) for block in answer.blocks]
        )

    result(document, show)


@command("store", example="idunno store n2")
@click.argument("node", type=NODE, required=False)
def store(node: str | None) -> None:
    """The files that have a block on NODE (the one asked if none is named)."""
    answer = work(lambda cluster: cluster.store(node or ""))
    result(
        answer.files,
        lambda: render.table(
            ["name", "version", "size"], [(file.name, file.version, file.size) for file in answer.files]
        ),
    )


@command("delete", example="idunno delete photos/1.jpg")
@click.argument("name", type=FILE)
def delete(name: str) -> None:
    """Delete all versions of NAME. For a day `idunno trash restore NAME` brings them back."""
    from idunno.base.errors import NotFound

    async def body(cluster: Cluster) -> DeleteAnswer:
        try:
            return await cluster.delete(name)
        except NotFound:
            if await _is_folder(cluster, name):
                files = f"{name.rstrip('/')}/"
                raise NotFound(f"{name} is a folder; delete its files one by one: `idunno ls {files}`") from None
            raise

    answer = work(body)
    result(answer, lambda: click.echo(f"{answer.name}: {render.counted(answer.versions, 'version')} deleted"))


@command("retain", example="idunno retain logs/ --versions 10 --age 7d")
@click.argument("prefix", type=PREFIX)
@click.option("--versions", type=Count(min=1), metavar="N", help="Keep the last N versions of each file.")
@click.option("--age", type=Duration(), metavar="TIME", help="Keep what was replaced less than so long ago, e.g. 7d.")
@click.option("--none", "none", is_flag=True, help="No rule for PREFIX any more: everything is kept.")
def retain(prefix: str, versions: int | None, age: float | None, none: bool) -> None:
    """How many versions of files below PREFIX are kept; one goes when it is beyond each limit given. Shows what holds."""
    if none and (versions is not None or age is not None):
        raise usage("--none goes without --versions and --age")
    show = not none and versions is None and age is None
    rows = work(lambda cluster: cluster.retain(prefix, versions=versions or 0, age_s=age or 0.0, show=show))
    document = [
        {
            "prefix": row.prefix,
            "owner": row.owner or None,
            "versions": row.versions or None,
            "age": row.age_ms / 1000 or None,
        }
        for row in rows
    ]
    shown = [row | {"age": None if row["age"] is None else f"{row['age']:,g} s"} for row in document]
    result(
        document, lambda: render.table(["prefix", "owner", "versions", "age"], [list(row.values()) for row in shown])
    )


@group("trash", example="idunno trash restore notes.txt")
def trash() -> None:
    """What was deleted or has expired, kept for a day."""


@command("ls", example="idunno trash ls logs/")
@click.argument("prefix", type=PREFIX, default="")
def trash_ls(prefix: str) -> None:
    """What can be restored, oldest first."""
    rows = work(lambda cluster: cluster.trash(prefix))
    result(
        rows,
        lambda: render.table(
            ["name", "versions", "size", "deleted", "by", "purged"],
            [
                (row.name, row.versions, row.size, row.deleted, "retention" if row.expired else row.by, row.purged)
                for row in rows
            ],
        ),
    )


@command("restore", example="idunno trash restore notes.txt")
@click.argument("name", type=ANY)
def trash_restore(name: str) -> None:
    """Bring back all versions of NAME."""
    answer = work(lambda cluster: cluster.restore(name))
    result(answer, lambda: click.echo(f"{answer.name}: {render.counted(answer.versions, 'version')} restored"))


@command("empty", example="idunno trash empty logs/")
@click.argument("prefix", type=PREFIX, default="")
def trash_empty(prefix: str) -> None:
    """Free the space of your deleted files below PREFIX now, for good."""
    answer = work(lambda cluster: cluster.empty_trash(prefix))
    document = {"versions": answer.versions, "size": answer.size}
    result(document, lambda: click.echo(f"{answer.versions} versions, {render.size(answer.size)}, are gone for good"))


for _command in (trash_ls, trash_restore, trash_empty):
    trash.add_command(_command)


@command("repair", example="idunno repair")
def repair() -> None:
    """Blocks below their copies, the bytes still to be copied and about how long it takes; and each node's disk."""
    import msgspec

    answer = work(lambda cluster: cluster.repair())

    def show() -> None:
        about = "time unknown" if answer.seconds is None else f"about {answer.seconds:.0f} s"
        if answer.recovering:
            click.echo("recovering: not every present node has reported to this scheduler yet")
        if answer.blocks:
            click.echo(
                f"{answer.blocks} blocks lack {answer.copies} copies; {render.size(answer.bytes)} to be copied, {about}; "
                f"{answer.running} under way"
            )
            if answer.begins_s:
                click.echo(
                    f"the next begin in {answer.begins_s:.0f} s: with 3 copies left a short absence is waited out"
                )
            waits = answer.bytes or answer.running or answer.waiting_for or answer.recovering
            if not waits and answer.blocks > answer.lost_blocks:
                click.echo("no other node can take them now: free some space, or add a node")
        elif not answer.recovering:
            click.echo("every block has its copies")
        if answer.waiting_for:
            click.echo(f"waiting for {', '.join(answer.waiting_for)} to come back")
        if answer.lost_blocks:
            files = ", ".join(render.printable(name) for name in answer.lost_files)
            click.echo(f"{answer.lost_blocks} blocks have no copy on a present node: {files}")
        render.table(
            ["node", "presence", "blocks", "free", "rotten", "problem"],
            [(n.node, n.presence, n.blocks, render.size(n.free_bytes), n.rotten, n.problem) for n in answer.nodes],
        )

    result(msgspec.to_builtins(answer), show)


@command("scrub", example="idunno scrub n2")
@click.argument("node", type=NODE, required=False)
def scrub(node: str | None) -> None:
    """Have NODE (all if none is named) read its blocks again now, at its set rate; what is rotten is replaced."""
    answer = work(lambda cluster: cluster.scrub(node or ""))
    for why in answer.failed:
        note(f"not begun on {why}")
    result(answer, lambda: click.echo(f"begun on {', '.join(answer.nodes) or 'no node'}; see `idunno repair`"))


COMMANDS = [put, get, get_versions, versions, ls, where, store, delete, retain, trash, repair, scrub]

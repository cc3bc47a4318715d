# idunno/cli/nodes.py: clusters, nodes, and who may use them.
from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from idunno.cli import render, running
from idunno.cli.options import LOCAL, NODE, TEXT, Count, Duration, command, group, settings
from idunno.cli.running import note, result, usage, work

if TYPE_CHECKING:
    from idunno.client.api import Cluster
    from idunno.coordinator.messages import GoneNode, Member, StatusAnswer

LOGIN_S = 30.0
"""For `idunno login`, an election included."""
TOKEN_TTL_S = 86_400.0


def _home() -> Path:
    from idunno.client.locate import home

    return home(os.environ)


def _local_directory(given: str | None) -> Path:
    """The directory of an `up` or `down`: --dir, else --cluster if that is written out, else the default."""
    chosen = given or settings().cluster
    if chosen is None:
        return _home() / "local"
    if given is None and re.fullmatch(r"[^/]*:[0-9]+", chosen):
        raise usage(f"--cluster {chosen} is an address; a cluster on this machine is a directory: give --dir")
    from idunno.client.locate import expanded

    return expanded(chosen).absolute()


@command("up", example="idunno up --nodes 5")
@click.option("--nodes", type=Count(min=1), metavar="N", help="How many node processes. [default: 5]")
@click.option("--dir", "directory", type=LOCAL, metavar="DIR", help="Where they live. [default: ~/.idunno/local]")
@click.option("--port", type=click.IntRange(1, 65535), metavar="PORT", help="Of the first node. [default: 7400]")
def up(nodes: int | None, directory: str | None, port: int | None) -> None:
    """Start a cluster on this machine, or what is not running of it, and wait until it is ready."""
    from idunno.node import local

    path = _local_directory(directory)
    answer = local.up(path, nodes, port)

    def show() -> None:
        columns = ["name", "id", "address", "state", "role"]
        render.table(columns, [[member[column] for column in columns] for member in answer["members"]])
        note(f"{answer['started']} nodes started in {answer['seconds']:.1f} s; data in {path}")
        for name in answer["gone"]:
            note(f"{name} is no member any more and was not started; {path / name} may be deleted")
        for name in answer["outlived"]:
            note(
                f"{name} was not started: its cluster was recovered without it; to have it back with its blocks: "
                f"`idunno token new --role node`, then `idunno join {answer['members'][0]['address']} --adopt "
                f"--token TOKEN --dir {shlex.quote(str(path / name))}`"
            )

    result(answer, show)


@command("down", example="idunno down")
@click.option("--dir", "directory", type=LOCAL, metavar="DIR", help="Where it lives. [default: ~/.idunno/local]")
@click.option("--purge", is_flag=True, help="Delete DIR afterwards, with all data of the cluster.")
def down(directory: str | None, purge: bool) -> None:
    """Stop the cluster of this machine. Its data stays, `idunno up` brings it back."""
    from idunno.node import local

    where = _local_directory(directory)
    answer = local.down(where, purge)
    result(
        answer,
        lambda: click.echo(
            f"{answer['stopped']} nodes stopped"
            + (f", {answer['killed']} killed" if answer["killed"] else "")
            + (", data deleted" if answer["purged"] else "")
            + (f"; {where} stays, for other things are in it" if answer["purged"] and where.exists() else "")
        ),
    )


@command("init", example="idunno init --dir /var/lib/idunno --listen 192.168.1.10:7400")
@click.option("--dir", "directory", type=LOCAL, required=True, metavar="DIR", help="The node's directory, made here.")
@click.option("--listen", required=True, type=TEXT, metavar="HOST:PORT", help="Where the node listens, TCP and UDP.")
@click.option("--name", type=TEXT, metavar="NAME", help="The node's name. [default: host name and port]")
@click.option("--advertise", type=TEXT, metavar="HOST:PORT", help="How others reach it, where that differs.")
def init(directory: str, listen: str, name: str | None, advertise: str | None) -> None:
    """Make a new cluster and its first node's directory; prints the token to join it."""
    from idunno.node import lifecycle

    answer = lifecycle.init(Path(directory).absolute(), listen, name, advertise or "")

    def show() -> None:
        click.echo(answer["token"])
        note(f"start it with `idunno node run --dir {shlex.quote(directory)}`; others join with")
        note(f"  idunno join {advertise or listen} --token TOKEN --dir DIR --listen HOST:PORT")

    result(answer, show)


@command("join", example="idunno join 192.168.1.10:7400 --token TOKEN --dir /var/lib/idunno --listen 192.168.1.11:7400")
@click.argument("address", type=TEXT)
@click.option(
    "--token", required=True, type=TEXT, metavar="TOKEN", help="From `idunno init` or `idunno token new --role node`."
)
@click.option("--dir", "directory", type=LOCAL, required=True, metavar="DIR", help="The node's directory, made here.")
@click.option("--listen", type=TEXT, metavar="HOST:PORT", help="Where the node listens, TCP and UDP.")
@click.option("--name", type=TEXT, metavar="NAME", help="The node's name. [default: host name and port]")
@click.option("--advertise", type=TEXT, metavar="HOST:PORT", help="How others reach it, where that differs.")
@click.option("--adopt", is_flag=True, help="DIR is of another cluster's stopped node: keep its blocks and settings.")
def join(
    address: str, token: str, directory: str, listen: str | None, name: str | None, advertise: str | None, adopt: bool
) -> None:
    """Make this machine a member of the cluster behind ADDRESS (any of its nodes)."""
    from idunno.node import lifecycle

    path = Path(directory).absolute()
    if adopt:
        _adopt(address, token, path, listen, name, advertise)
        return
    if listen is None:
        raise usage("--listen HOST:PORT is missing")
    answer = lifecycle.join(address, token, path, listen, name, advertise or "")
    result(
        answer,
        lambda: click.echo(
            f"{answer['name']} has joined; start it with `idunno node run --dir {shlex.quote(directory)}`"
        ),
    )


def _adopt(
    address: str, token: str, directory: Path, listen: str | None, name: str | None, advertise: str | None
) -> None:
    from idunno.node.adopt import adopt

    answer = adopt(address, token, directory, listen=listen, name=name, advertise=advertise)

    def show() -> None:
        click.echo(
            f"{answer['name']} has joined with {answer['blocks']} blocks; "
            f"start it: `idunno node run --dir {shlex.quote(str(directory))}`"
        )
        if answer["quarantined"]:
            note(f"{answer['quarantined']} blocks were not what their names say; they are in {directory}/quarantine")
        note(f"what was there is in {answer['aside']}, for you to delete")

    result(answer, show)


@group("node", example="idunno node run --dir /var/lib/idunno")
def node() -> None:
    """One node of a cluster."""


@command("run", example="idunno node run --dir /var/lib/idunno")
@click.option("--dir", "directory", type=LOCAL, required=True, metavar="DIR", help="From `init` or `join`.")
@click.option("--seed", type=TEXT, metavar="HOST:PORT", help="A member to ask first. [default: those it knows]")
def node_run(directory: str, seed: str | None) -> None:
    """Run a node in the foreground. Ctrl-C stops it: tasks are given back, data and membership stay."""
    path = Path(directory).absolute()
    if running.in_shell:
        from idunno.node.running import run

        run(path, seed)
        return
    # In this process's place: a node that runs for months does not carry the command line with it.
    sys.stdout.flush()
    # -P: nothing is imported from the directory that the operator happens to be in.
    arguments = [sys.executable, "-P", "-m", "idunno.node", "--dir", str(path)]
    os.execv(sys.executable, arguments + (["--seed", seed] if seed is not None else []))


@command("login", example="idunno login 192.168.1.10:7400 --token TOKEN")
@click.argument("address", type=TEXT, metavar="HOST:PORT")
@click.option("--token", required=True, type=TEXT, metavar="TOKEN", help="From `idunno token new --role user`.")
@click.option("--name", type=TEXT, metavar="NAME", help="Your name there. [default: your login name]")
def login(address: str, token: str, name: str | None) -> None:
    """Get a certificate for you from the cluster behind HOST:PORT, kept in ~/.idunno/."""
    import asyncio

    from idunno.client import dial

    about = asyncio.run(dial.login(address, token, name or _user_name(), _home(), settings().timeout_s or LOGIN_S))
    document = {"cluster": about.cluster, "name": about.name, "role": about.role, "address": about.address}
    result(
        document,
        lambda: click.echo(f"{about.name} ({about.role}) is known to {about.address}; use it by --cluster {address}"),
    )


def _user_name() -> str:
    import getpass

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # neither $USER nor an entry for this user id, as in many containers
        name = f"uid{os.getuid()}"
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:63].lstrip("._-") or "user"


@command("members", example="idunno members")
@click.option("--self", "only_self", is_flag=True, help="Only the node that answers.")
@click.option("--events", is_flag=True, help="The last changes of their states, with reason and accuser.")
def members(only_self: bool, events: bool) -> None:
    """The members, as the node that answers sees them."""
    if events:
        if only_self:
            raise usage("--events and --self: give one of them")
        changes = work(lambda cluster: cluster.member_events())
        titles = ["time", "event", "name", "reason", "accuser"]
        result(changes, lambda: render.table(titles, [[getattr(row, title) for title in titles] for row in changes]))
        return

    async def body(cluster: Cluster) -> list[Member]:
        rows = await cluster.members()
        if not only_self:
            return rows
        me = (await cluster.status()).node
        return [row for row in rows if me in (row.name, row.id)]

    rows = work(body)
    columns = ["name", "id", "address", "state", "role", "version", "slots"]  # what fits a terminal; --json has all
    columns += [extra for extra in ("zone", "problem") if any(getattr(row, extra) for row in rows)]
    result(rows, lambda: render.table(columns, [[getattr(row, column) for column in columns] for row in rows]))


@command("status", example="idunno status")
def status() -> None:
    """One page: is it healthy, and if not, why."""
    answer = work(lambda cluster: cluster.status())
    result(answer, lambda: _status_page(answer))


def _status_page(answer: StatusAnswer) -> None:
    def counts(values: dict[str, Any]) -> str:
        return ", ".join(f"{count} {name}" for name, count in values.items() if count) or "none"

    lines: list[tuple[str, Any]] = [
        ("healthy", "yes" if answer.healthy else f"no: {answer.why}"),
        ("cluster", answer.cluster),
        ("asked", answer.node),
        ("scheduler", f"{answer.scheduler or 'none'} (term {answer.term})"),
        ("voters", answer.voters),
        ("learners", answer.learners or "none"),
        ("members", counts(answer.members)),
        ("log", f"{answer.applied} applied, {answer.commit} committed"),
        ("files", f"{answer.files}, {answer.copies_missing} copies missing"),
        ("models", counts(answer.models)),
        ("queue", counts(answer.queue)),
        ("rates", ", ".join(f"{model} {rate:.1f}/s" for model, rate in answer.rates.items()) or "none"),
    ]
    behind = {name: entries for name, entries in answer.lag.items() if entries}
    if behind:
        lines.append(("behind", ", ".join(f"{name} by {entries} entries" for name, entries in behind.items())))
    if answer.degraded:
        lines.append(("degraded", answer.degraded))
    if answer.recovering:
        lines.append(("recovering", "not every present node has reported to this scheduler yet"))
    lines.extend(("warning", warning) for warning in answer.warnings)
    for title, value in lines:
        click.echo(f"{title:<11} {render.cell(value)}")


@command("leave", example="idunno leave n3")
@click.argument("name", type=NODE, metavar="[NODE]", required=False)
def leave(name: str | None) -> None:
    """Have NODE leave for good: its copies are moved, then it is out of the cluster. [default: the node that answers]"""

    async def body(cluster: Cluster) -> GoneNode:
        leaving = name if name is not None else (await cluster.status()).node
        if any(leaving in (row.name, row.id) for row in await cluster.members()):
            note(
                f"{leaving} is leaving: first its copies are moved, then its vote; `idunno repair` shows how far it is"
            )
        return await cluster.leave(leaving)

    answer = work(body)
    result(answer, lambda: click.echo(f"{answer.name} has left: {answer.text}"))


@command("remove", example="idunno remove n3")
@click.argument("name", type=NODE, metavar="NODE")
def remove(name: str) -> None:
    """Take NODE, which is down and does not come back, out of the cluster. Its certificate no longer works."""
    answer = work(lambda cluster: cluster.remove(name))
    result(answer, lambda: click.echo(f"{answer.name} is removed: {answer.text}"))


@command("upgrade", example="idunno upgrade --check")
@click.option(
    "--check", is_flag=True, help="Only say whether all nodes know the next machine version, and who does not."
)
def upgrade(*, check: bool) -> None:
    """Raise the machine version to the newest that all nodes know, after the last of them runs the new release."""
    answer = work(lambda cluster: cluster.upgrade(check=check))

    def show() -> None:
        columns = ["name", "software", "supports", "why"]
        render.table(columns, [[getattr(row, column) for column in columns] for row in answer.nodes])
        click.echo(f"machine version {answer.version}, newest known {answer.next}")
        note(answer.why)

    result(answer, show)
    if not answer.ready:
        from idunno.base.errors import Conflict

        raise Conflict(answer.why)


@group("token", example="idunno token new --role user --ttl 1d")
def token() -> None:
    """Tokens, by which nodes join and users log in."""


@command("new", example="idunno token new --role user --ttl 1d")
@click.option("--role", type=click.Choice(["node", "admin", "user", "reader"]), required=True, help="What it makes.")
@click.option("--ttl", type=Duration(), default=TOKEN_TTL_S, metavar="TIME", help="How long it holds. [default: 1d]")
def token_new(role: str, ttl: float) -> None:
    """A new token. It is shown this once; the cluster keeps only its hash."""
    answer = work(lambda cluster: cluster.new_token(role, ttl_s=max(1, round(ttl))))

    def show() -> None:
        click.echo(answer.token)
        note(f"token {answer.id} for role {answer.role}, holds until {answer.expires}")

    result(answer, show)


@command("ls", example="idunno token ls")
def token_ls() -> None:
    """The tokens, without their secrets."""
    rows = work(lambda cluster: cluster.tokens())
    columns = ["id", "role", "expires", "created_by", "state"]
    result(rows, lambda: render.table(columns, [[getattr(row, column) for column in columns] for row in rows]))


@command("revoke", example="idunno token revoke 5f3a9c")
@click.argument("token_id", type=TEXT, metavar="ID")
def token_revoke(token_id: str) -> None:
    """Make a token worthless. Who has used it already stays."""
    work(lambda cluster: cluster.revoke_token(token_id))
    result({"id": token_id}, lambda: click.echo(f"token {token_id} revoked"))


@group("users", example="idunno users revoke alice", invoke_without_command=True)
@click.pass_context
def users(ctx: click.Context) -> None:
    """Who has a certificate."""
    if ctx.invoked_subcommand is not None:
        return
    rows = work(lambda cluster: cluster.users())
    columns = ["name", "role", "since", "state"]
    result(rows, lambda: render.table(columns, [[getattr(row, column) for column in columns] for row in rows]))


@command("revoke", example="idunno users revoke alice")
@click.argument("name", type=TEXT)
def users_revoke(name: str) -> None:
    """The certificate of the user NAME no longer works. The name stays taken, with what it owns; a second time frees it."""
    work(lambda cluster: cluster.revoke_user(name))
    result({"name": name}, lambda: click.echo(f"{name} revoked"))


node.add_command(node_run)
for _command in (token_new, token_ls, token_revoke):
    token.add_command(_command)
users.add_command(users_revoke)

COMMANDS = [up, down, init, join, node, leave, remove, upgrade, login, members, status, token, users]

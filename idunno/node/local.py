# idunno/node/local.py: `idunno up` and `idunno down`: a cluster of processes on this one machine.
#
# Rule 1: `up` is idempotent: it makes what is not there, starts what is not running, and waits until all is well.
# Rule 2: a process that ends while `up` waits is reported with the last lines it wrote, not as a time-out.
# Rule 3: a node that left or was removed is neither waited for nor left running, once the scheduler's roster is without it.
# Rule 4: a cluster whose making was interrupted is made again from the start: none of its nodes has ever run.
# Rule 5: a node of a cluster that was recovered as that of others here is not started: they would only tell it so, and it ends.
# Rule 6: one `up` at a time works on a directory: a second one would take for interrupted what the first is just making.
from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from idunno.base.errors import Conflict, DeadlineExceeded, DiskFailed, IdunnoError, InvalidArgument, Unavailable
from idunno.base.ids import NodeId
from idunno.coordinator.messages import MEMBERS, STATUS, Member, Members, Status, StatusAnswer
from idunno.node.config import NodeConfig, load_config, parse_address
from idunno.node.disk import replace_file, sync_directory
from idunno.node.identity import BOOT_FILE, IDENTITY_FILE, MADE, UP_FILE, load_identity, running_pid
from idunno.node.lifecycle import make_cluster
from idunno.node.lineage import load_succession
from idunno.node.running import run_async
from idunno.wire.rpc import Connection, connect_unix

NODES_MAX: Final = 64
"""On one machine; each takes about 60 MB."""
READY_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 15.0
"""A node stops within 10 s (commands.md); what is left after this is killed."""
FULL_BYTES: Final = 64 * 1024
"""With less free than this a node does not come to write what it needs to start."""
LOOK_AGAIN_S: Final = 0.1

UNFINISHED_FILE: Final = "up.unfinished"
"""There while a cluster is being made, and gone, durably, before the first of its processes starts."""


class Looked(msgspec.Struct, frozen=True):
    """What a node says of its cluster."""

    members: list[Member]
    status: StatusAnswer


class LocalCluster(msgspec.Struct, frozen=True):
    """`cluster.json`: the addresses, so that a client can tell that HOST:PORT means this directory."""

    cluster: str
    nodes: list[str]
    addresses: list[str]


def up(directory: Path, nodes: int | None = None, port: int | None = None) -> dict[str, Any]:
    """Start the cluster of `directory`, making it with `nodes` (5) nodes from `port` (7400) on if there is none.

    Returns {cluster, scheduler, members: [...], seconds, started, gone, outlived}; `gone`: names of nodes that left or were
    removed, `outlived`: of those whose cluster was recovered without them; both do not run. Raises InvalidArgument, Conflict,
    DeadlineExceeded.
    """
    directory = directory.absolute()
    with _alone(directory):
        return _up(directory, nodes, port)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Rule 6. Raises Conflict, InvalidArgument for what is no directory, OSError."""
    if directory.exists() and not directory.is_dir():
        raise InvalidArgument(f"{directory} is a file: choose another --dir")
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another `idunno up` is at work on {directory}: wait until it is done") from None
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # it holds something already: it stays
                directory.rmdir()
        raise
    finally:
        os.close(held)


def _up(directory: Path, nodes: int | None, port: int | None) -> dict[str, Any]:
    clock = asyncio.new_event_loop()
    began_s = clock.time()
    found = existing_nodes(directory)
    if begun := _begun(directory):
        for node in found:
            if node.name in begun and not any((other / BOOT_FILE).exists() for other in found):
                _empty(node)
        found = existing_nodes(directory)
    if not found:
        found = _make(directory, 5 if nodes is None else nodes, 7400 if port is None else port)
    elif nodes is not None and nodes != len(found):
        raise Conflict(
            f"{directory} holds a cluster of {len(found)} nodes; `idunno join` adds one, another --dir makes another"
        )
    elif port is not None and port != (begins := _first_port(found[0])):
        raise Conflict(
            f"{directory} holds a cluster whose ports begin at {begins}: leave out --port, or choose another --dir"
        )
    outlived = _outlived(found)
    found = [node for node in found if node not in outlived]
    stopped = [node for node in found if running_pid(node) is None]
    for node in stopped:
        _check_port(load_config(node))
    processes = {node: _spawn(node) for node in stopped}
    try:
        members, scheduler, cluster, gone = run_async(_until_ready(found, processes))
    except BaseException:
        for process in processes.values():  # what this call started is not left behind half-way
            process.terminate()
        raise
    finally:
        seconds = clock.time() - began_s
        clock.close()
    return {
        "cluster": cluster,
        "scheduler": scheduler,
        "members": msgspec.to_builtins(members),
        "seconds": round(seconds, 3),
        "started": sum(node.name not in gone for node in stopped),
        "gone": gone,
        "outlived": [node.name for node in outlived],
    }


def _outlived(nodes: list[Path]) -> list[Path]:
    """Rule 5; by what the survivors' directories say, for an outlived majority would elect a scheduler before it is told."""
    past = {succession.cluster for node in nodes for succession in load_succession(node)}
    return [node for node in nodes if load_identity(node).cluster in past]


def _first_port(node: Path) -> int:
    """Of the cluster that the node was made with."""
    return parse_address(load_config(node).listen)[1] - int(node.name[1:]) + 1


def existing_nodes(directory: Path) -> list[Path]:
    """The node directories n1, n2, ... of an `up`, in the order of their numbers."""
    found = [path for path in directory.glob("n*") if path.name[1:].isdigit() and (path / IDENTITY_FILE).exists()]
    return sorted(found, key=lambda path: int(path.name[1:]))


def _begun(directory: Path) -> frozenset[str]:
    """The nodes that an `up` was making when it was interrupted, by their directories' names; but where something else lies, it
    is somebody's who came since."""
    try:
        names = (directory / UNFINISHED_FILE).read_text().split()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return frozenset()
    return frozenset(name for name in names if re.fullmatch("n[0-9]+", name) and _is_ours(directory / name))


def _is_ours(node: Path) -> bool:
    """Whether there is nothing but what `make_cluster` makes, perhaps not all of it."""
    return node.is_dir() and all(path.name.removesuffix(".new") in MADE for path in _content(node))


def _content(directory: Path) -> list[Path]:
    """What lies in it; a file system that begins there has a directory of its own."""
    return [path for path in directory.iterdir() if path.name != "lost+found"]


def _empty(directory: Path) -> None:
    """Remove what lies in it, and leave it itself: a file system may begin there. Who it is goes last: as long as anything is
    left, what was interrupted can be found and done again."""
    for path in sorted(_content(directory), key=lambda path: path.name == IDENTITY_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _make(directory: Path, nodes: int, port: int) -> list[Path]:
    if not 1 <= nodes <= NODES_MAX:
        raise InvalidArgument(f"--nodes {nodes}: one machine runs 1 to {NODES_MAX}")
    if not 1 <= port <= 65535 - nodes:
        raise InvalidArgument(f"--port {port}: {nodes} ports from there must be at most 65535")
    # These nodes share one machine: each computes with its part of the cores, and none keeps a process waiting.
    threads = max(1, (os.cpu_count() or 1) // nodes)
    configs = [
        NodeConfig(name=f"n{i + 1}", listen=f"127.0.0.1:{port + i}", threads=threads, warm_runner=False)
        for i in range(nodes)
    ]
    for config in configs:
        _check_port(config)
    directories = [directory / config.name for config in configs]
    begun = _begun(directory)
    for node in directories:
        if node.name in begun:  # an `up` that did not come to its identities
            _empty(node)
        elif node.exists() and (not node.is_dir() or _content(node)):
            raise Conflict(
                f"{node} is there already, and is no node of a cluster: move it away, or choose another --dir"
            )
    replace_file(str(directory / UNFINISHED_FILE), "\n".join(config.name for config in configs).encode())
    made = make_cluster(directories, configs)
    about = LocalCluster(made["cluster"], [c.name for c in configs], [c.address for c in configs])
    replace_file(str(directory / UP_FILE), msgspec.json.format(msgspec.json.encode(about)))
    (directory / UNFINISHED_FILE).unlink()
    sync_directory(str(directory))
    return directories


def _check_port(config: NodeConfig) -> None:
    host, port = parse_address(config.listen)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise Conflict(
                    f"{config.listen} cannot be used for node {config.name}: {error.strerror}; "
                    "stop what uses it, or choose other ports with --port and another --dir"
                ) from None


def _spawn(node: Path) -> subprocess.Popen[bytes]:
    (node / "logs").mkdir(exist_ok=True)
    with open(node / "logs" / "stderr.log", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "idunno.node", "--dir", str(node)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
        )


async def _until_ready(
    nodes: list[Path], processes: dict[Path, subprocess.Popen[bytes]]
) -> tuple[list[Member], str, str, list[str]]:
    """Wait until every node answers, sees all others active, and knows one and the same scheduler: members, the scheduler's
    name, the cluster's id, and the names of those that are no members any more, ended here if they were started here."""
    ids = {node: load_identity(node).node for node in nodes}
    gone: list[str] = []
    waits_for = "the nodes to answer"
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                for node, process in processes.items():
                    if process.poll() is not None:
                        raise Unavailable(
                            f"node {node.name} ended with status {process.returncode}: {_last_words(node)}"
                        )
                seen = await asyncio.gather(*(look(node) for node in nodes))
                answers = [answer for answer in seen if isinstance(answer, Looked)]
                if left := _left(ids, answers):
                    for node in left:
                        if (started := processes.pop(node, None)) is not None:
                            started.terminate()
                    gone += [node.name for node in left]
                    nodes = [node for node in nodes if node not in left]
                    ids = {node: ids[node] for node in nodes}
                    continue
                waits_for = _missing(nodes, seen)
                if not waits_for:
                    first = answers[0].status
                    assert first.scheduler is not None
                    return answers[0].members, first.scheduler, first.cluster, gone
                await asyncio.sleep(LOOK_AGAIN_S)
    except TimeoutError:
        raise DeadlineExceeded(
            f"the cluster is not ready after {READY_TIMEOUT_S:.0f} s, still waiting for {waits_for}; "
            f"see {nodes[0].parent}/n*/logs/"
        ) from None


def _left(ids: dict[Path, NodeId], answers: list[Looked]) -> list[Path]:
    """Who is no member any more, by the word of a scheduler whose roster is up to date; nobody else's word counts."""
    for answer in answers:
        status = answer.status
        if status.node == status.scheduler and not status.recovering and status.applied == status.commit:
            members = {member.id for member in answer.members}
            if status.node not in {member.name for member in answer.members}:
                continue  # who does not know itself yet knows nobody
            return [node for node, its_id in ids.items() if its_id not in members]
    return []


def _missing(nodes: list[Path], seen: list[Looked | IdunnoError]) -> str:
    """What is not ready yet, "" when all is."""
    schedulers = set()
    for node, answer in zip(nodes, seen, strict=True):
        if isinstance(answer, IdunnoError):
            return f"node {node.name} to answer: {answer}"
        scheduler = answer.status.scheduler
        if scheduler is None:
            return f"node {node.name} to know a scheduler: {answer.status.why}"
        if answer.status.recovering:
            return "the scheduler to hear from all nodes"
        schedulers.add(scheduler)
        active = sum(member.state == "active" for member in answer.members)
        if active < len(nodes):
            return f"node {node.name} to see all members: {active} of {len(nodes)} are active there"
    return "" if len(schedulers) == 1 else f"one scheduler: there are {' and '.join(sorted(schedulers))}"


async def look(node: Path) -> Looked | IdunnoError:
    """What the node of this directory says of the cluster: or why it does not answer."""
    connection: Connection | None = None
    try:
        connection = await connect_unix(str(node / "node.sock"), timeout_s=1.0)
        status = await connection.call(STATUS, Status(), timeout_s=2.0)
        if status.scheduler is None:  # since its start it may have heard of nobody, and then names no members
            return Looked([], status)
        members = await connection.call(MEMBERS, Members(), timeout_s=2.0)
        return Looked(members.members, status)
    except IdunnoError as error:
        return error
    finally:
        if connection is not None:
            await connection.close()


def _last_words(node: Path) -> str:
    """The last line the process wrote to standard error, at most 300 characters."""
    try:
        with open(node / "logs" / "stderr.log", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        lines = []
    if lines:
        return lines[-1][:300]
    free = shutil.disk_usage(node).free
    if free < FULL_BYTES:  # there was no room for its words either
        return f"the disk of {node} is full ({free:,} bytes free); free some space there"
    return f"it wrote nothing; see {node}/logs/"


def down(directory: Path, purge: bool = False) -> dict[str, Any]:
    """Stop every node of `directory`; with `purge` delete what `up` made, and `directory` itself if nothing else is in it.

    Returns {stopped, killed, purged}. Raises InvalidArgument, DiskFailed.
    """
    directory = directory.absolute()
    if not directory.is_dir() or not (
        existing_nodes(directory) or (directory / UNFINISHED_FILE).exists() or (directory / UP_FILE).exists()
    ):
        raise InvalidArgument(f"{directory} holds no cluster of `idunno up`")
    if not purge:
        return _down(directory)
    with _alone(directory):
        done = _down(directory)
        try:
            _purge(directory)
        except OSError as error:
            raise DiskFailed(
                f"{error.filename or directory} cannot be deleted: {error.strerror}; delete it by hand"
            ) from None
    return {**done, "purged": True}


def _down(directory: Path) -> dict[str, Any]:
    nodes = existing_nodes(directory)
    running = {node: pid for node in nodes if (pid := running_pid(node)) is not None}
    for pid in running.values():
        _signal(pid, signal.SIGTERM)
    left = run_async(_until_gone(running, STOP_TIMEOUT_S))
    for node, pid in left.items():
        if running_pid(node) == pid:
            _signal(pid, signal.SIGKILL)
    if left:
        run_async(_until_gone(left, 5.0))
    return {"stopped": len(running) - len(left), "killed": len(left), "purged": False}


def _purge(directory: Path) -> None:
    """`up` takes any directory, a home as well: so only what it made goes. That this was a cluster is forgotten last."""
    begun = [directory / name for name in sorted(_begun(directory))]  # by an `up` that was interrupted
    for node in dict.fromkeys([*existing_nodes(directory), *begun]):
        _empty(node)
        with contextlib.suppress(OSError):  # a file system begins there: empty is all that it can be
            node.rmdir()
    for name in (UNFINISHED_FILE, UP_FILE):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds something else, or is mounted
        directory.rmdir()


def _signal(pid: int, what: signal.Signals) -> None:
    try:
        os.kill(pid, what)
    except ProcessLookupError:
        return  # it ended by itself in between


async def _until_gone(running: dict[Path, int], timeout_s: float) -> dict[Path, int]:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    left = dict(running)
    while left and loop.time() < end_s:
        left = {node: pid for node, pid in left.items() if running_pid(node) == pid}
        if left:
            await asyncio.sleep(0.05)
    return left

# idunno/client/locate.py: from WHERE, as a user writes it, to the doors one may knock at.
#
# Rule 1: WHERE is the directory of an `idunno up` (any node of it), the directory of one node (that node alone), or
#         HOST:PORT after `idunno login`. Nothing given: $IDUNNO_CLUSTER, then HOME/local, where HOME is
#         $IDUNNO_HOME or ~/.idunno.
# Rule 2: only files are looked at here, nobody is talked to: a socket that is there may belong to a node that is not.
# Rule 3: every error names what was looked for, where, and what to type next.
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import msgspec

from idunno.base.errors import Corrupt, InvalidArgument, NotFound, Unauthenticated
from idunno.coordinator.messages import MemberAddress

LOGIN_FILE: Final = "cluster.json"
FILE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of a file read here: 10,000 members' addresses."""

_ADDRESS: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class SocketDoor:
    """A node on this machine, by its Unix socket."""

    path: Path
    label: str


@dataclass(frozen=True, slots=True)
class TcpDoor:
    host: str
    port: int
    label: str


Door: TypeAlias = SocketDoor | TcpDoor


@dataclass(frozen=True, slots=True)
class Place:
    """What WHERE means: doors in the order of their names; `login` holds the certificate for the TCP ones."""

    where: str
    doors: tuple[Door, ...]
    next_step: str  # for the error when no door opens
    login: Path | None = None


class Login(msgspec.Struct, frozen=True):
    """A login's `cluster.json`."""

    cluster: str
    name: str  # of the user, as the certificate says
    role: str
    address: str
    members: list[MemberAddress]


class _LocalCluster(msgspec.Struct, frozen=True):
    """What is read of an `idunno up` directory's `cluster.json`."""

    addresses: list[str]


def home(environ: Mapping[str, str]) -> Path:
    """Where this user's clusters and logins are kept. Raises InvalidArgument for somebody without a home directory."""
    given = environ.get("IDUNNO_HOME")
    if given:
        return Path(given)
    try:
        return Path.home() / ".idunno"
    except RuntimeError:  # no $HOME, and nobody of this user id is known here
        raise InvalidArgument("you have no home directory here: set $IDUNNO_HOME to a directory of yours") from None


def expanded(text: str | Path) -> Path:
    """A path as a user writes it, with ~ written out. Raises InvalidArgument."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InvalidArgument(f"{text}: there is no such home directory; write the path without ~") from None


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT" or "[V6]:PORT". Raises InvalidArgument."""
    match = _ADDRESS.fullmatch(text)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise InvalidArgument(f"{text[:80]!r} is no address: write HOST:PORT, for example 192.168.1.10:7400")
    return match[1] or match[2], int(match[3])


def login_directory(at_home: Path, host: str, port: int) -> Path:
    return at_home / "logins" / f"{host}_{port}"


def locate(where: str | Path | None, environ: Mapping[str, str]) -> Place:
    """The doors of WHERE. Raises NotFound, Unauthenticated (no login for that address), InvalidArgument, Corrupt."""
    text = str(where) if where is not None else environ.get("IDUNNO_CLUSTER", "")
    if not text:
        return _directory(home(environ) / "local")
    path = expanded(text)
    if path.is_dir():
        try:
            return _directory(path)
        except PermissionError:
            raise Unauthenticated(
                f"{path} belongs to another user; ask there for a token, then `idunno login HOST:PORT --token TOKEN` and "
                "give --cluster HOST:PORT"
            ) from None
    if "/" not in text and _ADDRESS.fullmatch(text):
        return _address(text, home(environ))
    raise NotFound(f"no cluster at {text}: run `idunno up` or give --cluster DIRECTORY or HOST:PORT")


def _directory(path: Path) -> Place:
    if (path / "node.toml").exists() or (path / "node.sock").exists():
        step = f"start it with `idunno node run --dir {path}`"
        if not (path / "node.sock").exists():
            raise NotFound(f"the node of {path} does not run: {step}")
        return Place(str(path), (SocketDoor(path / "node.sock", path.name),), step)
    nodes = [node for node in path.glob("n*") if node.name[1:].isdigit() and node.is_dir()]
    if not nodes:
        raise NotFound(f"no cluster at {path}: run `idunno up` or give --cluster DIRECTORY or HOST:PORT")
    nodes.sort(key=lambda node: int(node.name[1:]))
    doors = tuple(SocketDoor(node / "node.sock", node.name) for node in nodes if (node / "node.sock").exists())
    step = f"run `idunno up --dir {path}`"
    if not doors:
        raise NotFound(f"the cluster at {path} does not run (0 of {len(nodes)} nodes): {step}")
    return Place(str(path), doors, step)


def _address(text: str, at_home: Path) -> Place:
    host, port = parse_address(text)
    login = login_directory(at_home, host, port)
    if (login / LOGIN_FILE).exists():
        about = _read(login / LOGIN_FILE, Login)
        others = [member for member in about.members if member.address != text]
        doors = [TcpDoor(host, port, text)]
        for member in others:
            other_host, other_port = parse_address(member.address)
            doors.append(TcpDoor(other_host, other_port, member.name))
        return Place(text, tuple(doors), "check the address and that the nodes run", login)
    local = at_home / "local"
    if host in _LOOPBACK and (local / "cluster.json").exists():
        served = [parse_address(address)[1] for address in _read(local / "cluster.json", _LocalCluster).addresses]
        if port in served:
            return _directory(local)
    raise Unauthenticated(f"no login for {text} in {at_home}: run `idunno login {text} --token TOKEN` first")


def _read(path: Path, kind: type[T]) -> T:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise Corrupt(f"{path} has {size} bytes, at most {FILE_BYTES_MAX} were written: log in again")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path} is damaged ({error}): delete it, then `idunno login` or `idunno up` again") from None

# idunno/node/identity.py: who a data directory belongs to, and its secrets.
#
# Rule 1: a node id is minted once per directory and never reused; an empty directory is a new node.
# Rule 2: `identity.json` is written last: a directory without it is unfinished and may be filled again.
# Rule 3: every start raises the boot number, durably, before the first packet leaves.
from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path
from typing import IO, Final

import msgspec

from idunno.base.errors import Conflict, Corrupt, Incompatible, InvalidArgument
from idunno.base.ids import NodeId
from idunno.base.naming import naming
from idunno.coordinator.messages import MemberAddress
from idunno.node.config import CONFIG_FILE, NodeConfig, save_config
from idunno.node.disk import replace_file

FORMAT: Final = 1
IDENTITY_FILE: Final = "identity.json"
PEERS_FILE: Final = "peers.json"
BOOT_FILE: Final = "boot"
UP_FILE: Final = "cluster.json"
"""Of a directory of `idunno up`, which holds its nodes' directories."""
FOLDERS: Final = ("logs", "blocks", "small", "cache", "models", "tmp")
"""That belong to the directory, whoever its node is."""
KEYS: Final = ("ca.pem", "node.pem", "node.key", "cluster.key", "ca.key")
MADE: Final = frozenset({"log", *FOLDERS, *KEYS, CONFIG_FILE, PEERS_FILE, IDENTITY_FILE})
"""All that lies in a directory before its node's first start."""
DECIDED: Final = "recovering"
"""There while a directory becomes another node's (switch.py)."""


class Identity(msgspec.Struct, frozen=True):
    format: int
    cluster: str
    node: NodeId


class KnownPeers(msgspec.Struct, frozen=True):
    """The last roster this node knew: whom to talk to before the log has been replayed."""

    members: list[MemberAddress]


class Secrets(msgspec.Struct, frozen=True):
    """What a node's directory holds, each in a file of its own, mode 0600."""

    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    cluster_key: bytes  # 32 bytes
    ca_key_pem: bytes | None = None  # voters have it: any of them may become the leader that signs


def new_node_id() -> NodeId:
    return NodeId(secrets.token_hex(8))


def check_empty(directory: Path) -> None:
    """Raises Conflict when the directory belongs to a node already."""
    check_settled(directory)
    if (directory / IDENTITY_FILE).exists():
        found = load_identity(directory)
        raise Conflict(
            f"{directory} belongs to node {found.node} of cluster {found.cluster[:8]} already; "
            "start it with `idunno node run`, or choose another directory"
        )
    if (directory / UP_FILE).exists():
        raise Conflict(
            f"{directory} holds a cluster of `idunno up`, which no command would find any more: choose another directory"
        )


def check_settled(directory: Path) -> None:
    """Raises Conflict while the directory is half one node's and half another's."""
    if (directory / DECIDED).exists():
        raise Conflict(
            f"{directory} was being given another identity when that was interrupted; `idunno recover --dir {directory}` "
            "finishes it"
        )


def make_directory(directory: Path, config: NodeConfig, held: Secrets, peers: KnownPeers) -> None:
    """Everything but the identity, which `write_identity` adds at the very end."""
    for name in ("", "log", *FOLDERS):
        (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    save_config(directory, config)
    files = {"ca.pem": held.ca_pem, "node.pem": held.certificate_pem, "node.key": held.key_pem}
    files["cluster.key"] = held.cluster_key.hex().encode()
    if held.ca_key_pem is not None:
        files["ca.key"] = held.ca_key_pem
    for name, content in files.items():
        replace_file(str(directory / name), content)
    write_peers(directory, peers)


def write_identity(directory: Path, identity: Identity) -> None:
    replace_file(str(directory / IDENTITY_FILE), msgspec.json.format(msgspec.json.encode(identity)))


def write_peers(directory: Path, peers: KnownPeers) -> None:
    replace_file(str(directory / PEERS_FILE), encode_peers(peers))


def encode_peers(peers: KnownPeers) -> bytes:
    return msgspec.json.format(msgspec.json.encode(peers))


def load_identity(directory: Path) -> Identity:
    path = directory / IDENTITY_FILE
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Identity)
    except FileNotFoundError:
        raise InvalidArgument(
            f"{directory} is no node's directory: make one with `idunno init` or `idunno join`"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path} is damaged ({error}): restore it, or join again with an empty directory") from None
    if found.format != FORMAT:
        raise Incompatible(
            f"{path} has format {found.format}, this version reads {FORMAT}: use the idunno that wrote it"
        )
    if not re.fullmatch(r"[0-9a-f]{16}", found.node) or not re.fullmatch(r"[0-9a-f]{32}", found.cluster):
        raise Corrupt(f"{path} holds no node and cluster id: restore it, or join again with an empty directory")
    return found


def load_secrets(directory: Path) -> Secrets:
    def read(name: str) -> bytes:
        try:
            return (directory / name).read_bytes()
        except FileNotFoundError:
            raise Corrupt(f"{directory / name} is missing: restore it, or join again with an empty directory") from None

    try:
        cluster_key = bytes.fromhex(read("cluster.key").decode().strip())
    except ValueError:
        cluster_key = b""
    if len(cluster_key) != 32:
        raise Corrupt(f"{directory / 'cluster.key'} is damaged: restore it, or join again with an empty directory")
    ca_key = read("ca.key") if (directory / "ca.key").exists() else None
    return Secrets(read("ca.pem"), read("node.pem"), read("node.key"), cluster_key, ca_key)


def load_peers(directory: Path) -> KnownPeers:
    path = directory / PEERS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=KnownPeers)
    except FileNotFoundError:
        return KnownPeers([])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Corrupt(
            f"{path} is damaged ({error}): restore it from another node's directory of the same cluster"
        ) from None


def next_boot(directory: Path) -> int:
    """Raise the directory's boot number by one, durably, and return it."""
    path = directory / BOOT_FILE
    try:
        last = int(path.read_text())
    except FileNotFoundError:
        last = 0
    except ValueError:
        raise Corrupt(
            f"{path} holds no number: write one larger than the `boot` that other nodes know of this one"
        ) from None
    replace_file(str(path), str(last + 1).encode())
    return last + 1


class DirectoryLock:
    """At most one process runs on a directory. The lock ends with the process, however it ends."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "node.pid"
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Raises Conflict naming the process that holds it."""
        file = open(self._path, "a+", encoding="ascii")  # noqa: SIM115 - held open for as long as the node runs
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip()
            if holder.isdigit() and _alive(int(holder)):
                file.close()
                raise Conflict(f"process {holder} runs this node already: stop it first ({self._path})") from None
            fcntl.flock(file, fcntl.LOCK_EX)  # only somebody who looks (`running_pid`), for microseconds
        with naming(self._path):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def running_pid(directory: Path) -> int | None:
    """The process that runs the node of this directory, None when none does."""
    path = directory / "node.pid"
    try:
        with open(path, "r+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                text = file.read().strip()
                return int(text) if text.isdigit() else None
            return None  # nobody holds the lock; ours ends with the file
    except (FileNotFoundError, PermissionError):
        return None

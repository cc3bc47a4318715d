# idunno/node/restore.py: `idunno restore`: a backup's metadata becomes the first state of a cluster that is empty and stopped.
#
# Rule 1: the whole file is read and checked before a byte is written anywhere.
# Rule 2: into nothing, or into all directories of a cluster that holds nothing; else Conflict, with what is there. The
#         directories are switched as a recovery switches them: all or none, and again after a crash.
# Rule 3: the cluster that comes out has an identity of its own, also when the backup's users may speak to it.
from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from idunno.base.errors import Conflict, Corrupt, DecodeError, IdunnoError, InvalidArgument
from idunno.base.ids import BlockId, check_file_name, check_label
from idunno.base.version import VERSION
from idunno.coordinator import backup as b
from idunno.coordinator import snapshot as snapshots
from idunno.coordinator.machine import Machine
from idunno.coordinator.records import NodeRecord
from idunno.coordinator.succession import what_is_there
from idunno.coordinator.views import iso_time
from idunno.node import founding, switch
from idunno.node.config import NodeConfig
from idunno.node.founding import Authority, Founder
from idunno.node.identity import FOLDERS, IDENTITY_FILE, UP_FILE, new_node_id
from idunno.node.recover import ROWS_TOLD_MAX, examine, finished, locked, lost_versions
from idunno.node.survivors import add_smalls, blocks_of, small_missing, small_wanted
from idunno.sdfs.hashing import check_block_id


@dataclass(slots=True)
class Backup:
    """A file that was read to its end."""

    head: b.Head
    machine: Machine
    authority: Authority | None
    smalls: set[BlockId] = field(default_factory=set)


def read_backup(path: Path, passphrase: str | None) -> Backup:
    """Raises Corrupt, Incompatible, Unauthenticated (a wrong passphrase), InvalidArgument (no keys in it), OSError."""
    what = str(path)
    head, authority, smalls = None, None, set[BlockId]()
    reader = snapshots.Reader()
    try:
        with open(path, "rb") as file:
            for kind, payload in b.records(file.read, what):
                if kind == b.HEAD:
                    head = b.decode_head(payload, what)
                    if passphrase is not None and not head.keys:
                        raise InvalidArgument(f"{what} holds no keys: restore it without --with-keys")
                elif kind == b.MACHINE:
                    reader.feed(payload)
                elif kind == b.SMALL:
                    smalls.update(small.block for small in b.decode_smalls(payload, what))
                elif passphrase is not None and head is not None:
                    keys = b.open_keys(payload, passphrase, head, what)
                    authority = Authority(keys.ca_pem, keys.ca_key_pem, tuple(keys.users), tuple(keys.tokens))
        machine = Machine.restored(reader)
        _check_names(machine)
    except (DecodeError, LookupError, ValueError) as error:
        if isinstance(error, IdunnoError) and not isinstance(error, DecodeError):
            raise
        raise Corrupt(f"{what} holds metadata that is none: {error}") from None
    if head is None or machine.roster.cluster != head.cluster or machine.index != head.index:
        raise Corrupt(f"{what} holds other metadata than it says")
    if passphrase is not None and authority is None:
        raise Corrupt(f"{what} should hold keys, and does not")
    return Backup(head, machine, authority, smalls)


def _check_names(machine: Machine) -> None:
    """Names become paths somewhere, and were checked by commands: here no command was. Raises DecodeError."""
    names = {name for name, _ in machine.namespace.each()}
    names |= {entry.name for entry in machine.namespace.trash.entries.values()}
    try:
        for name in names:
            check_file_name(name, system=True)
        for block in (*machine.references, *small_wanted(machine)):
            check_block_id(block)
        for model in machine.registry.models():
            check_label("model", model.model)
        for job in machine.ledger.jobs():
            check_label("job", job.job)
    except InvalidArgument as error:
        raise DecodeError(str(error)) from None


def smalls_in(file: IO[bytes], what: str) -> Iterator[list[tuple[BlockId, bytes]]]:
    """The contents, a record at a time."""
    for kind, payload in b.records(file.read, what):
        if kind == b.SMALL:
            yield [(small.block, small.content) for small in b.decode_smalls(payload, what)]


def restore(
    path: Path,
    directories: Sequence[Path],
    *,
    new: NodeConfig | None = None,
    passphrase: str | None = None,
    step: switch.Step = switch.quiet,
) -> dict[str, Any]:
    """Restore the backup at `path` into these stopped nodes, which are all of their cluster; with `new` into the one directory
    given, which is made to be a new cluster's first node. Must not be called in a loop.

    Returns {restored, cluster, nodes, token, from, files, versions_lost, lost, jobs_cancelled, users, aside}.
    Raises Conflict, and what read_backup raises.
    """
    if new is not None:
        (directory,) = directories
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    else:
        _check_given(directories)
    with locked(directories):
        begun = founding.unfinished(directories, anew=False)
        if begun is not None:
            founding.carry_out(begun.directories, step)
            return {"restored": True, **finished(begun)}
        backup = read_backup(path, passphrase)
        founders, term = _founders(directories, new)
        return _carry_out(path, backup, founders, term, step)


def _check_given(directories: Sequence[Path]) -> None:
    """Raises InvalidArgument, with what to give instead of what is no node's directory."""
    for directory in directories:
        if not directory.is_dir():
            raise InvalidArgument(
                f"{directory} is no directory: give those of a stopped cluster, or make a new node there: --listen HOST:PORT"
            )
        if (directory / UP_FILE).exists():
            nodes = " ".join(
                f"--dir {directory / name}" for name in sorted(path.name for path in directory.glob("n[0-9]*"))
            )
            raise InvalidArgument(f"{directory} holds several nodes: give the directory of each, {nodes}")


def _founders(directories: Sequence[Path], new: NodeConfig | None) -> tuple[list[Founder], int]:
    """The nodes to be, and the highest term they know."""
    if new is not None:
        (directory,) = directories
        _check_fresh(directory)
        for name in FOLDERS:
            (directory / name).mkdir(mode=0o700, exist_ok=True)
        return [Founder(directory, _record(new), config=new)], 0
    survey = asyncio.run(examine(directories))
    machine = survey.machine
    missing = [node.name for node in machine.roster.nodes() if node.name in survey.report.gone]
    if missing:
        raise Conflict(
            f"{', '.join(missing)} of this cluster {'is' if len(missing) == 1 else 'are'} not given: restore needs all of its "
            "directories, or a new one (`--dir DIR --listen HOST:PORT`)"
        )
    there = what_is_there(machine)
    if there:
        raise Conflict(
            f"cluster {machine.roster.cluster[:8]} is not empty: it holds {there}; restore into a new one "
            "(`--dir DIR --listen HOST:PORT`)"
        )
    founders = []
    for survivor in survey.survivors:
        old = machine.roster.node(survivor.identity.node)
        record = msgspec.structs.replace(old, address=survivor.address, boot=survivor.boot)
        founders.append(Founder(survivor.directory, record, survivor.identity.cluster))
    return founders, survey.term


def _check_fresh(directory: Path) -> None:
    """What is there may be an interrupted restore's, and blocks of old, and nothing else that is a node's."""
    if (directory / IDENTITY_FILE).exists():
        raise Conflict(
            f"{directory} is a node's directory already: restore into it without --listen, or choose another"
        )


def _record(config: NodeConfig) -> NodeRecord:
    return NodeRecord(
        node=new_node_id(),
        name=config.name,
        address=config.address,
        fingerprint=bytes(32),
        voter=True,
        slots=config.slots,
        zone=config.zone,
        software=VERSION,
    )


def _carry_out(path: Path, backup: Backup, founders: list[Founder], term: int, step: switch.Step) -> dict[str, Any]:
    machine = backup.machine
    directories = [founder.directory for founder in founders]
    held = {block for directory in directories for block, _ in blocks_of(directory)}
    wanted = small_wanted(machine)
    lacking = asyncio.run(small_missing(directories, (block for block in wanted if block not in backup.smalls)))
    lost = list(lost_versions(machine, held, lacking))
    new = founding.conceive("restore", founders, machine, backup.authority, go_on=False)
    step("add small contents")
    for directory in directories:
        with open(path, "rb") as file:
            asyncio.run(add_smalls(directory, smalls_in(file, str(path))))
    plans = founding.prepare(founders, new, machine, term + 1, step)
    founding.carry_out(directories, step)
    return {
        "restored": True,
        "cluster": new.cluster,
        "nodes": [node.name for node in new.nodes],
        "token": new.token,
        "from": {"cluster": backup.head.cluster, "index": backup.head.index, "time": iso_time(backup.head.at_ms)},
        "files": machine.namespace.files,
        "versions_lost": len(lost),
        "lost": msgspec.to_builtins(lost[:ROWS_TOLD_MAX]),
        "jobs_cancelled": new.jobs_cancelled,
        "users": [user.name for user in machine.roster.users()],
        "aside": plans[0].aside,
        "unfinished": [],
    }

# idunno/node/founding.py: directories become the first nodes of a new cluster that begins with a machine that is there.
#
# Rule 1: prepared in all directories before it is decided in the first; decided in all before the first is switched.
# Rule 2: every secret is new, but for a CA and users that a backup brings. All first nodes begin with the same snapshot, byte for
#         byte: the machine one entry further, in a term that nobody has seen.
# Rule 3: what was decided somewhere is finished, not begun again: `unfinished` looks for it first.
from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from idunno.base.errors import Conflict, InvalidArgument
from idunno.base.ids import Index, NodeId, Term
from idunno.base.version import VERSION
from idunno.consensus import snapshot as snapshot_file
from idunno.consensus.log import Log
from idunno.coordinator.electorate import voters_of
from idunno.coordinator.machine import Machine
from idunno.coordinator.messages import MemberAddress, Succession
from idunno.coordinator.records import NodeRecord, TokenRecord, UserRecord
from idunno.coordinator.succession import Founding, found_anew
from idunno.coordinator.views import iso_time
from idunno.node import switch
from idunno.node.config import CONFIG_FILE, NodeConfig, save_config
from idunno.node.disk import RealDisk, ThreadOffload, replace_file
from idunno.node.identity import DECIDED, IDENTITY_FILE, PEERS_FILE, Identity, KnownPeers, encode_peers, load_identity
from idunno.node.lineage import RECOVERED_FILE, encode_succession
from idunno.wire.calls import Role
from idunno.wire.security import fingerprint, make_ca, make_key_and_csr, sign
from idunno.wire.tokens import make_token

TOKEN_S: Final = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Founder:
    """A directory that becomes a first node."""

    directory: Path
    record: NodeRecord  # name, address, boot, ...; fingerprint and voter are decided here
    before: str = ""  # the cluster it belonged to
    config: NodeConfig | None = None  # of one that is made here


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA, and who it let in."""

    ca_pem: bytes
    ca_key_pem: bytes
    users: tuple[UserRecord, ...] = ()
    tokens: tuple[TokenRecord, ...] = ()


@dataclass(slots=True)
class New:
    """The cluster in the making."""

    what: str
    cluster: str
    recovery: str
    at_ms: int
    token: str
    authority: Authority
    cluster_key: bytes
    nodes: list[NodeRecord]
    keys: dict[NodeId, tuple[bytes, bytes]]  # certificate, private key
    jobs_cancelled: int = 0
    past: tuple[Succession, ...] = ()


def now_ms() -> int:
    return int(time.time() * 1000)


def conceive(
    what: str, founders: Sequence[Founder], machine: Machine, authority: Authority | None, *, go_on: bool
) -> New:
    """The identity of the new cluster; `machine` becomes its first state."""
    chosen = authority if authority is not None else Authority(*make_ca())
    text, token_id, secret_hash = make_token(fingerprint(chosen.ca_pem))
    at_ms = now_ms()
    new = New(what, secrets.token_hex(16), secrets.token_hex(8), at_ms, text, chosen, secrets.token_bytes(32), [], {})
    # Those that voted first, so that the fewest certificates of the CA's key go to somebody new.
    ranked = sorted(founders, key=lambda founder: not founder.record.voter)
    voters = {founder.record.node for founder in ranked[: voters_of(len(ranked))]}
    for founder in founders:
        node = founder.record.node
        key_pem, csr_pem = make_key_and_csr(node)
        certificate = sign(chosen.ca_pem, chosen.ca_key_pem, csr_pem, common_name=node, role=Role.NODE)
        new.keys[node] = certificate, key_pem
        record = msgspec.structs.replace(
            founder.record,
            fingerprint=fingerprint(certificate),
            voter=node in voters,
            presence="present",
            software=VERSION,
            since_ms=max(machine.now_ms, 0),
            reason="",
            key=b"",
            certificate=b"",
        )
        new.nodes.append(record)
    token = TokenRecord(token_id, "node", secret_hash, max(at_ms, machine.now_ms) + TOKEN_S * 1000, what)
    founding = Founding(new.cluster, new.cluster_key, tuple(new.nodes), (*chosen.tokens, token), chosen.users)
    new.jobs_cancelled = found_anew(machine, founding, jobs_go_on=go_on)
    return new


def prepare(founders: Sequence[Founder], new: New, machine: Machine, term: int, step: switch.Step) -> list[switch.Plan]:
    """`recovered.new/` in every directory."""
    plans = []
    parties = [switch.Party(founder.record.node, founder.record.name) for founder in founders]
    stamp = iso_time(new.at_ms)[:19].replace(":", "").replace("-", "")
    for founder, record in zip(founders, new.nodes, strict=True):
        names = [IDENTITY_FILE, "log", "ca.pem", "node.pem", "node.key", "cluster.key", PEERS_FILE]
        names += ["ca.key"] if record.voter else []
        names += [RECOVERED_FILE] if new.past else []
        names += [CONFIG_FILE] if founder.config is not None else []
        before = founder.before[:8] or "nothing"
        aside = f"recovered-from-{before}-{stamp}-{new.recovery[:4]}"
        plan = switch.Plan(
            switch.FORMAT,
            new.what,
            new.recovery,
            new.cluster,
            founder.before,
            parties,
            aside,
            names,
            iso_time(new.at_ms),
        )
        switch.prepare(founder.directory, plan, _filler(new, record, machine, term, founder.config), step)
        plans.append(plan)
    return plans


def _filler(
    new: New, record: NodeRecord, machine: Machine, term: int, config: NodeConfig | None
) -> Callable[[Path], None]:
    def fill(place: Path) -> None:
        certificate, key_pem = new.keys[record.node]
        files = {
            "ca.pem": new.authority.ca_pem,
            "node.pem": certificate,
            "node.key": key_pem,
            "cluster.key": new.cluster_key.hex().encode(),
            PEERS_FILE: encode_peers(KnownPeers([_address(node) for node in new.nodes])),
            IDENTITY_FILE: msgspec.json.format(msgspec.json.encode(Identity(1, new.cluster, record.node))),
        }
        if record.voter:
            files["ca.key"] = new.authority.ca_key_pem
        if new.past:
            files[RECOVERED_FILE] = encode_succession(new.past)
        for name, content in files.items():
            replace_file(str(place / name), content)
        if config is not None:
            save_config(place, config)
        voters = tuple(sorted(node.node for node in new.nodes if node.voter))
        head = snapshot_file.Head(Index(machine.index), Term(term), voters, Index(machine.index))
        asyncio.run(write_log(place, head, machine.capture()))

    return fill


def _address(record: NodeRecord) -> MemberAddress:
    return MemberAddress(record.node, record.name, record.address, record.fingerprint, record.voter)


async def write_log(place: Path, head: snapshot_file.Head, content: Iterator[bytes]) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in content:
            yield piece

    offload = ThreadOffload(1, "log")
    try:
        disk = RealDisk(str(place), offload)
        await Log.create(disk, None)
        await snapshot_file.write(disk, snapshot_file.NEW_PATH, head, pieces())
        await snapshot_file.replace(disk, snapshot_file.NEW_PATH)
    finally:
        offload.close()


def carry_out(directories: Sequence[Path], step: switch.Step) -> None:
    """What is prepared in all of them is decided, then done."""
    for directory in directories:
        if switch.decided(directory) is None:
            switch.decide(directory, step)
    for directory in directories:
        switch.finish(directory, step)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A switch that was decided somewhere."""

    plan: switch.Plan
    directories: list[Path]  # in which it has to be finished
    elsewhere: list[str]  # names of those whose directories were not given, and may have to be finished too


def unfinished(directories: Sequence[Path], *, anew: bool) -> Unfinished | None:
    """What has to be finished before anything is begun. Raises Conflict where it may have been decided elsewhere."""
    decided = {directory: plan for directory in directories if (plan := switch.decided(directory)) is not None}
    waiting = {directory: plan for directory in directories if (plan := switch.prepared(directory)) is not None}
    about = {directory: _identity(directory) for directory in directories}
    given = {found.node for found in about.values() if found is not None}
    given |= {found.node for at in waiting if (found := _identity(at / switch.PREPARED)) is not None}
    given |= {found.node for at in decided if (found := _identity(at / DECIDED)) is not None}
    clusters = {found.cluster for found in about.values() if found is not None}
    begun = next(iter(decided.values()), None)
    if begun is None:  # somebody was switched to the end, so all were prepared: it goes on
        begun = next((plan for plan in waiting.values() if plan.cluster in clusters), None)
    if begun is not None:
        todo = [at for at, plan in {**waiting, **decided}.items() if plan.recovery == begun.recovery]
        return Unfinished(begun, todo, [party.name for party in begun.parties if party.node not in given])
    for directory, plan in waiting.items():
        others = [party.name for party in plan.parties if party.node not in given]
        if others and not anew:
            raise Conflict(
                f"{directory} is prepared for a {plan.what} with {', '.join(others)}, begun at {plan.at} and perhaps finished "
                "there: give their directories too, or `--anew` to make another cluster of these alone"
            )
    return None


def _identity(directory: Path) -> Identity | None:
    try:
        return load_identity(directory)
    except InvalidArgument:  # nobody's yet
        return None

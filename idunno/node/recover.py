# idunno/node/recover.py: `idunno recover`: a cluster that lost its quorum goes on as another one, from what its survivors have.
#
# Rule 1: looking writes nothing; what would be lost is shown before anything is done, and somebody says yes (docs/recovery.md).
# Rule 2: who still answers as this cluster is not lost: then nothing is done.
# Rule 3: the directories are locked from the first look to the last rename.
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from idunno.base.errors import Conflict, IdunnoError, InvalidArgument
from idunno.base.ids import BlockId, NodeId
from idunno.consensus.quorum import majority
from idunno.coordinator.machine import Machine
from idunno.coordinator.messages import HELLO, Hello, HelloAnswer, Succession
from idunno.coordinator.records import COPIES_WANTED, NodeRecord, VersionRecord
from idunno.coordinator.views import iso_time
from idunno.node import founding, switch
from idunno.node.config import parse_address
from idunno.node.founding import Founder
from idunno.node.identity import DirectoryLock, load_secrets
from idunno.node.lineage import is_proved, load_succession, signed
from idunno.node.survivors import Survivor, look, newest, share_smalls, small_missing, small_wanted
from idunno.wire.rpc import connect_tcp
from idunno.wire.security import client_context, fingerprint

ROWS_TOLD_MAX: Final = 1_000
CALL_S: Final = 2.0
"""How long a member that was not given has to answer: a living one takes milliseconds."""
CALLS_AT_ONCE: Final = 32


class LostVersion(msgspec.Struct, frozen=True):
    name: str
    version: int
    missing: int  # blocks
    blocks: int


class Looked(msgspec.Struct, frozen=True):
    directory: str
    node: NodeId
    name: str
    term: int
    index: int
    blocks: int
    dropped: int  # entries that were never acknowledged, in a log that others overtook
    problem: str


class Entry(msgspec.Struct, frozen=True):
    index: int
    term: int
    time: str
    age_s: int


class Report(msgspec.Struct, frozen=True):
    """What a recovery would find, and lose."""

    cluster: str
    survivors: list[Looked]
    last: Entry
    gone: list[str]  # names of the nodes that are out afterwards
    logs_not_seen: list[str]
    acknowledged: str  # all-there | there-unless-cut-off | may-be-missing
    why: str
    files: int
    versions_lost: int
    lost: list[LostVersion]  # the first ROWS_TOLD_MAX
    blocks_unnamed: int  # that nothing refers to: deleted, never finished, or of entries that are missing
    users: list[str]  # who must log in again


@dataclass(slots=True)
class Survey:
    report: Report
    survivors: list[Survivor]
    machine: Machine
    smalls: dict[BlockId, bytes]
    term: int  # the highest anybody knows


@contextmanager
def locked(directories: Sequence[Path]) -> Iterator[None]:
    """Nobody runs a node in any of them meanwhile. Raises Conflict, InvalidArgument."""
    if len({directory.resolve() for directory in directories}) != len(directories):
        raise InvalidArgument("a directory is given twice: give each once")
    with ExitStack() as stack:
        for directory in directories:
            if not directory.is_dir():
                raise InvalidArgument(f"{directory} is no directory: give those of the surviving nodes")
            lock = DirectoryLock(directory)
            lock.take()
            stack.callback(lock.release)
        yield


def recover(
    directories: Sequence[Path],
    agree: Callable[[Report], bool],
    *,
    anew: bool = False,
    step: switch.Step = switch.quiet,
) -> dict[str, Any]:
    """Make a new cluster of these directories' nodes, if `agree` says so to the report. Must not be called in a loop.

    Returns {recovered, cluster, nodes, voters, token, aside, report, unfinished}. Raises Conflict, InvalidArgument, Corrupt.
    """
    with locked(directories):
        begun = founding.unfinished(directories, anew=anew)
        if begun is not None:
            founding.carry_out(begun.directories, step)
            return {"recovered": True, **finished(begun)}
        survey = asyncio.run(examine(directories))
        asyncio.run(check_gone(survey))
        if not agree(survey.report):
            return {"recovered": False, "report": msgspec.to_builtins(survey.report)}
        return _carry_out(survey, step)


def finished(begun: founding.Unfinished) -> dict[str, Any]:
    plan = begun.plan
    return {
        "cluster": plan.cluster,
        "nodes": [party.name for party in plan.parties],
        "aside": plan.aside,
        "finished": plan.what,
        "unfinished": begun.elsewhere,
    }


# -- looking ----------------------------------------------------------------------------------------------------------


async def examine(directories: Sequence[Path]) -> Survey:
    survivors = [await look(directory) for directory in directories]
    clusters = {survivor.identity.cluster: survivor for survivor in survivors}
    if len(clusters) > 1:
        shown = ", ".join(f"{found.directory} is of {cluster[:8]}" for cluster, found in clusters.items())
        raise InvalidArgument(f"these are nodes of {len(clusters)} clusters: {shown}; give those of one")
    by_node: dict[NodeId, Survivor] = {}
    for survivor in survivors:
        other = by_node.setdefault(survivor.identity.node, survivor)
        if other is not survivor:
            raise Conflict(f"{other.directory} and {survivor.directory} are of one node: give the newer one only")
    best, machine, smalls = await newest(survivors)
    if machine.roster.cluster != best.identity.cluster:
        raise Conflict(
            f"{best.directory} is of cluster {best.identity.cluster[:8]}, its log of {machine.roster.cluster[:8]}"
        )
    for survivor in survivors:
        if machine.roster.find(survivor.identity.node) is None:
            raise Conflict(
                f"{survivor.name} ({survivor.directory}) is not in the roster as of entry {machine.index}: leave it out, and "
                "`idunno join --adopt` it afterwards"
            )
    report = await _report(survivors, best, machine, smalls)
    return Survey(report, survivors, machine, smalls, max(survivor.term for survivor in survivors))


async def _report(
    survivors: Sequence[Survivor], best: Survivor, machine: Machine, smalls: dict[BlockId, bytes]
) -> Report:
    seen = {survivor.identity.node for survivor in survivors if survivor.use_log and not survivor.is_old}
    given = {survivor.identity.node for survivor in survivors}
    roster = machine.roster.nodes()
    held = {block for survivor in survivors for block in survivor.blocks}
    wanted = small_wanted(machine)
    lost_smalls = await small_missing(
        [found.directory for found in survivors], (block for block in wanted if block not in smalls)
    )
    lost = list(lost_versions(machine, held, lost_smalls))
    age_s = max(0, founding.now_ms() - machine.now_ms) // 1000
    acknowledged, why = judge(roster, seen, best, survivors)
    return Report(
        cluster=machine.roster.cluster,
        survivors=[
            Looked(
                str(found.directory),
                found.identity.node,
                found.name,
                *found.position,
                len(found.blocks),
                _dropped(found, best),
                found.problem,
            )
            for found in survivors
        ],
        last=Entry(int(machine.index), best.position[0], iso_time(machine.now_ms), age_s),
        gone=[node.name for node in roster if node.node not in given],
        logs_not_seen=[node.name for node in roster if node.node not in seen],
        acknowledged=acknowledged,
        why=why,
        files=machine.namespace.files,
        versions_lost=len(lost),
        lost=lost[:ROWS_TOLD_MAX],
        blocks_unnamed=sum(block not in machine.references for block in held),
        users=[user.name for user in machine.roster.users()],
    )


def judge(
    roster: Sequence[NodeRecord], seen: set[NodeId], best: Survivor, survivors: Sequence[Survivor]
) -> tuple[str, str]:
    """Whether an entry that was acknowledged may be in none of the logs, and why."""
    voters = [node.node for node in roster if node.voter]
    unseen_voters = sum(node not in seen for node in voters)
    unseen = sum(node.node not in seen for node in roster)
    present = sum(node.presence == "present" for node in roster)
    copies = max(1, min(COPIES_WANTED, present))
    if unseen_voters < majority(len(voters)):
        return (
            "all-there",
            f"{len(voters) - unseen_voters} of {len(voters)} voters' logs are here: a majority holds every entry",
        )
    newer = max(survivor.term for survivor in survivors)
    about = f"{unseen} logs were not seen, and an acknowledged entry is on {copies} nodes"
    if newer > best.position[0]:
        about += f"; a later term was begun ({newer}, the last entry is of {best.position[0]})"
    if unseen >= copies:
        return "may-be-missing", f"{about}: the last ones may be on lost nodes only"
    return (
        "there-unless-cut-off",
        f"{about}: one of them is here, unless the survivors had been cut off from the others before these were lost",
    )


def _dropped(found: Survivor, best: Survivor) -> int:
    """Entries of this log that the newest one does not have."""
    last = int(found.terms.last)
    agreed = min(last, int(best.terms.last))
    while agreed > 0:
        mine, theirs = found.terms.term(agreed), best.terms.term(agreed)
        if mine is None or theirs is None or mine == theirs:
            break  # a snapshot holds only what was committed
        agreed -= 1
    return last - agreed if found is not best else 0


def lost_versions(machine: Machine, held: set[BlockId], lost_smalls: set[BlockId]) -> Iterator[LostVersion]:
    def missing(record: VersionRecord) -> int:
        if record.small:
            return sum(block.block in lost_smalls for block in record.blocks)
        return sum(block.block not in held for block in record.blocks)

    for name, record in machine.namespace.each():
        count = missing(record)
        if count:
            yield LostVersion(name, record.version, count, len(record.blocks))


async def check_gone(survey: Survey) -> None:
    """Ask all of the roster: a directory that was given may be a copy of a running node's. Raises Conflict when one lives."""
    given = {survivor.identity.node for survivor in survey.survivors}
    others = survey.machine.roster.nodes()
    slots = asyncio.Semaphore(CALLS_AT_ONCE)
    context = client_context(None, None, None)

    async def ask(node: NodeRecord) -> HelloAnswer | None:
        host, port = parse_address(node.address)
        try:
            async with slots:
                connection = await connect_tcp(host, port, context, expect=None, timeout_s=CALL_S)
                try:
                    return await connection.call(HELLO, Hello(), timeout_s=CALL_S)
                finally:
                    await connection.close()
        except IdunnoError:
            return None  # gone, as was said

    cluster = survey.report.cluster
    ca_pem = load_secrets(survey.survivors[0].directory).ca_pem
    for node, answer in zip(others, await asyncio.gather(*(ask(node) for node in others)), strict=True):
        if answer is None:
            continue
        if answer.cluster == cluster and node.node in given:
            raise Conflict(
                f"{node.name} is running at {node.address}, and its directory given here is a copy: stop it, copy it again"
            )
        if answer.cluster == cluster:
            raise Conflict(
                f"{node.name} at {node.address} is running as a node of this cluster: start the others too, or, if too many are "
                "lost, stop it and give its directory as well"
            )
        if any(found.cluster == cluster and is_proved(found, ca_pem) for found in answer.succeeds):
            raise Conflict(
                f"this cluster was recovered already, as {answer.cluster[:8]}: {node.name} at {node.address} is part of it; "
                f"`idunno join {node.address} --adopt --token TOKEN --dir DIR` brings these nodes in"
            )


# -- doing ------------------------------------------------------------------------------------------------------------


def _carry_out(survey: Survey, step: switch.Step) -> dict[str, Any]:
    machine, report = survey.machine, survey.report
    founders = []
    for survivor in survey.survivors:
        old = machine.roster.node(survivor.identity.node)
        record = msgspec.structs.replace(old, address=survivor.address, boot=survivor.boot)
        founders.append(Founder(survivor.directory, record, report.cluster))
    directories = [survivor.directory for survivor in survey.survivors]
    wanted = small_wanted(machine)
    new = founding.conceive("recover", founders, machine, None, go_on=True)
    new.past = _past(survey, new)
    step("share small contents")
    asyncio.run(share_smalls(directories, wanted, survey.smalls, directories))
    plans = founding.prepare(founders, new, machine, survey.term + 1, step)
    founding.carry_out(directories, step)
    return {
        "recovered": True,
        "cluster": new.cluster,
        "nodes": [node.name for node in new.nodes],
        "voters": [node.name for node in new.nodes if node.voter],
        "token": new.token,
        "aside": plans[0].aside,
        "unfinished": [],
        "report": msgspec.to_builtins(report),
    }


def _past(survey: Survey, new: founding.New) -> tuple[Succession, ...]:
    """The proofs, for nodes of the clusters that were."""
    before = {found for survivor in survey.survivors for found in load_succession(survivor.directory)}
    held = [load_secrets(survivor.directory) for survivor in survey.survivors]
    ca_key_pem = next((secrets.ca_key_pem for secrets in held if secrets.ca_key_pem is not None), None)
    latest = Succession(
        survey.report.cluster,
        new.cluster,
        fingerprint(new.authority.ca_pem),
        survey.report.last.index,
        survey.report.last.term,
        new.at_ms,
    )
    return (*sorted(before, key=lambda found: found.at_ms), signed(latest, ca_key_pem))

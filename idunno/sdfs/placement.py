# idunno/sdfs/placement.py: which nodes take the blocks of a put.
#
# Rule 1: weighted rendezvous hashing: each node draws a score from (key, node) and its free space; the highest scores take it.
#         A node that comes, goes or fills up moves only what it wins or loses itself. (Thaler, Ravishankar: A name-based
#         mapping scheme for rendezvous, 1996; the weights as in Schindelhauer, Schomaker: Weighted distributed hash tables,
#         SPAA 2005: -weight / ln(uniform draw).)
# Rule 2: the entry node comes first when it can hold blocks, then distinct zones, then the rest; all by score.
# Rule 3: who is left out is named with the reason and its numbers.
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from idunno.base.disk import Space
from idunno.base.errors import Exhausted
from idunno.base.ids import NodeId
from idunno.coordinator.records import COPIES_WANTED
from idunno.sdfs.config import SdfsConfig

SPARES_MAX: Final = 8
"""Who may stand in for replicas that fail; after that the client asks anew."""


@dataclass(frozen=True, slots=True)
class Candidate:
    node: NodeId
    name: str
    zone: str
    presence: str  # as in the roster
    space: Space | None  # as last reported, None: not reported yet
    problem: str = ""  # why it takes no blocks, as it said itself
    floor_bytes: int | None = None  # it keeps free, None: as this node does


@dataclass(frozen=True, slots=True)
class Placement:
    replicas: tuple[Candidate, ...]  # in chain order
    spares: tuple[Candidate, ...]  # best first
    left_out: dict[str, str]  # name -> why


def place(
    key: str, candidates: Iterable[Candidate], *, config: SdfsConfig, size: int = 0, entry: NodeId | None = None
) -> Placement:
    """The replicas and spares for `key`, which is the put's id.

    `size` is what each replica will have to hold, in bytes, as far as known. Raises Exhausted when nobody can hold it.
    """
    able: list[Candidate] = []
    left_out: dict[str, str] = {}
    for candidate in candidates:
        why = unable(candidate, config, size)
        if why:
            left_out[candidate.name] = why
        else:
            able.append(candidate)
    if not able:
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(left_out.items())[:8])
        raise Exhausted(f"no node can take {size:,} bytes: {reasons or 'there is none'}; free some space or add a node")
    ranked = rank(key, able)
    if entry is not None:
        ranked.sort(key=lambda candidate: candidate.node != entry)  # stable: the others keep their order
    replicas, others = spread(ranked, COPIES_WANTED)
    return Placement(tuple(replicas), tuple(others[:SPARES_MAX]), left_out)


def rank(key: str, candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates, highest score first. Weights are free bytes; who has not reported counts as the mean of the others."""
    among = list(candidates)
    known = [c.space.free_bytes for c in among if c.space is not None]
    mean = sum(known) / len(known) if known else 1.0

    def score(candidate: Candidate) -> tuple[float, str]:
        weight = mean if candidate.space is None else candidate.space.free_bytes
        return -max(weight, 1.0) / math.log(draw(key, candidate.node)), candidate.node

    return sorted(among, key=score, reverse=True)


def draw(key: str, node: NodeId) -> float:
    """A number in (0, 1) that looks random and is the same everywhere."""
    bits = int.from_bytes(blake3(f"{key}\0{node}".encode()).digest(8), "big") >> 11
    return (bits + 0.5) / 2**53


def unable(candidate: Candidate, config: SdfsConfig, size: int) -> str:
    """Why the node cannot take `size` bytes, "" when it can."""
    if candidate.presence != "present":
        return candidate.presence
    if candidate.problem:
        return candidate.problem
    if candidate.space is None:
        return ""  # the node itself refuses when it must
    floor = candidate.floor_bytes if candidate.floor_bytes is not None else config.floor(candidate.space)
    if candidate.space.free_bytes - size < floor:
        return f"{candidate.space.free_bytes:,} bytes free, {size:,} asked for, {floor:,} are kept free"
    return ""


def spread(ranked: list[Candidate], wanted: int) -> tuple[list[Candidate], list[Candidate]]:
    """The first `wanted`, in as many zones as there are; and the others, in order."""
    zones: set[str] = set()
    chosen: list[Candidate] = []
    for candidate in ranked:
        if candidate.zone not in zones and len(chosen) < wanted:
            zones.add(candidate.zone)
            chosen.append(candidate)
    # The rest is filled up in order of score. (A node without a zone counts as in the zone "".)
    chosen += [c for c in ranked if c not in chosen][: wanted - len(chosen)]
    return chosen, [c for c in ranked if c not in chosen]

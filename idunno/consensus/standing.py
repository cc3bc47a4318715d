# idunno/consensus/standing.py: whose word counts: what each node is known to have promised, and whether it still has that.
#
# Raft rests on disks that keep what was synced. One that was replaced by an old image, a copied directory, or a log that lost
# what it had acknowledged breaks that: it could help to elect a leader that lacks committed entries, or vote twice.
#
# Rule 1: a *mark* is what a voter surely had on its disk once: the highest (term, index), by term first, at which it said
#         something that binds it. Its own (term of log/state, last entry) can never again be less: a term is synced before
#         anything is said in it, and within one term a log that was acknowledged is only added to.
# Rule 2: a *run* is one start of one process: boot number and 32 bits by chance. A boot number below one that was seen, or the
#         same one with other bits, is a copy or an old image.
# Rule 3: a node is heard only after it has shown its claim, and the claim is not below the mark. What it shows is what its disk
#         held at its start, whenever it shows it, for by then its disk may hold what others sent it since.
# Rule 4: so a claim is held against what *earlier* runs said. What the run itself said may reach a witness before its claim does,
#         by way of the leader, and proves nothing against it. A leader that names a run as the one that said something has
#         accepted that run's claim, so what it holds of earlier runs under that name is not above the claim.
from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from idunno.base.errors import Corrupt
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus.messages import Append, AppendAnswer, InstallAnswer, RaftMessage, VoteAnswer, VoteRequest

_CRC_BYTES: Final = 4
FORMAT: Final = 1

S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Run:
    """One start of one process."""

    boot: int
    chance: int  # 32 bits

    @property
    def number(self) -> int:
        """As every message of it bears it; never 0, which is what messages of an older release bear."""
        return self.boot << 32 | self.chance

    @classmethod
    def of(cls, number: int) -> Run:
        return cls(number >> 32, number & 0xFFFFFFFF)


class Claim(msgspec.Struct, frozen=True, order=True):
    """What a node's disk holds: the term of its hard state, and the last entry of its log."""

    term: Term
    index: Index


class _Known(msgspec.Struct, frozen=True):
    """Of one node: its mark of all runs but the newest that said something, that of the newest, and the run that is heard."""

    term: Term = Term(0)
    index: Index = Index(0)
    run: int = 0
    newest: int = 0
    newest_term: Term = Term(0)
    newest_index: Index = Index(0)

    def mark(self, but: int = -1) -> Claim:
        """Of all its runs, or of all but one."""
        before = Claim(self.term, self.index)
        return before if but == self.newest else max(before, Claim(self.newest_term, self.newest_index))

    def raised(self, said: Claim, run: int) -> _Known:
        """This, and what another run of it than the newest said."""
        if Run.of(run).boot > Run.of(self.newest).boot:
            before = self.mark()
            return _Known(before.term, before.index, self.run, run, said.term, said.index)
        before = max(said, Claim(self.term, self.index))
        return _Known(before.term, before.index, self.run, self.newest, self.newest_term, self.newest_index)


_NOTHING_KNOWN: Final = _Known()


class _Saved(msgspec.Struct, frozen=True):
    format: int
    cluster: str
    known: dict[NodeId, _Known]


class Witness:
    """What one node knows of the others' standing. `changed` says that it differs from what was last saved."""

    def __init__(self) -> None:
        self.changed = False
        self._known: dict[NodeId, _Known] = {}

    # -- learning -----------------------------------------------------------------------------------------------------

    def heard(self, node: NodeId, message: RaftMessage) -> None:
        """It said this, and so had it on its disk."""
        match message:
            case AppendAnswer(term=term, ok=True, index=index) | InstallAnswer(term=term, index=index, done=True):
                self.learn(node, term, index)
            case VoteAnswer(term=term, granted=True, pre=False) | VoteRequest(term=term, pre=False) | Append(term=term):
                self.learn(node, term, Index(0))

    def learn(self, node: NodeId, term: Term, index: Index, run: int | None = None) -> None:
        """`run` of it said so; None: the one that is heard."""
        known = self._known.get(node, _NOTHING_KNOWN)
        run = known.run if run is None else run
        if run == known.newest:
            if (term, index) > (known.newest_term, known.newest_index):
                self._known[node] = _Known(known.term, known.index, known.run, run, term, index)
                self.changed = True
            return
        raised = known.raised(Claim(term, index), run)
        if raised != known:
            self._known[node], self.changed = raised, True

    def mark(self, node: NodeId) -> Claim:
        return self._known.get(node, _NOTHING_KNOWN).mark()

    # -- judging ------------------------------------------------------------------------------------------------------

    def accepted(self, node: NodeId) -> int:
        """The number of the run of that node that is heard; 0: none yet."""
        known = self._known.get(node)
        return known.run if known is not None else 0

    def judge(self, node: NodeId, run: Run, claim: Claim, boot_seen: int = 0) -> str:
        """Accept this run (""), or say in one line why not. `boot_seen`: the node's boot number in the roster."""
        known = self._known.get(node, _NOTHING_KNOWN)
        last = Run.of(known.run)
        if run.number == known.run:
            return ""  # accepted before; what it said since may have raised its mark
        newest = max(last.boot, boot_seen)
        if run.boot < newest:
            return (
                f"it says boot {run.boot}, but boot {newest} of it was seen: its data directory is a copy, or was restored "
                f"from an old image"
            )
        if run.boot == last.boot:
            return (
                f"boot {run.boot} of it was seen as another process: its data directory is a copy, or was restored from an "
                f"old image"
            )
        mark = known.mark(but=run.number)
        if claim < mark:
            return (
                f"its log ends at entry {claim.index} in term {claim.term}, but it had acknowledged entry {mark.index} in "
                f"term {mark.term}: it was restored from an old image, or lost what it had synced"
            )
        return self.believe(node, run)

    def believe(self, node: NodeId, run: Run) -> str:
        """From now on this run of it is heard, and no other."""
        known = self._known.get(node, _NOTHING_KNOWN)
        self._known[node] = msgspec.structs.replace(known, run=run.number)
        self.changed = True
        return ""

    def keep(self, nodes: Collection[NodeId]) -> None:
        """Forget all others."""
        if gone := self._known.keys() - nodes:
            for node in gone:
                del self._known[node]
            self.changed = True

    # -- saving -------------------------------------------------------------------------------------------------------

    def encode(self, cluster: str) -> bytes:
        self.changed = False
        return sealed(_Saved(FORMAT, cluster, dict(sorted(self._known.items()))))

    def load(self, data: bytes, cluster: str, path: str) -> None:
        """Marks of another cluster (the nodes were recovered into a new one) count no more. Raises Corrupt."""
        saved = unsealed(data, _Saved, path)
        if saved.cluster == cluster:
            self._known = {**saved.known, **self._known}


def sealed(value: msgspec.Struct) -> bytes:
    """MessagePack, behind a checksum of it."""
    data = msgspec.msgpack.encode(value)
    return zlib.crc32(data).to_bytes(_CRC_BYTES, "little") + data


def unsealed(data: bytes, kind: type[S], path: str) -> S:
    """Raises Corrupt."""
    body = data[_CRC_BYTES:]
    if zlib.crc32(body).to_bytes(_CRC_BYTES, "little") != data[:_CRC_BYTES]:
        raise Corrupt(f"{path}: wrong checksum over {len(data)} bytes")
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{path} holds what this version does not know: {error}") from error

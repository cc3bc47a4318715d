# idunno/coordinator/keeper.py: the machine as consensus sees it: what its snapshots are made of, and how one becomes it.
#
# Rule 1: contents of small files are not in a snapshot. Before the log that brought them is cut, and before a received snapshot
#         counts, all that it refers to are in this node's own store, synced (docs/consensus.md). What neither the newest snapshot
#         nor anything since refers to, the store lets go of when that snapshot counts.
#         What the store could not take when an entry brought it is kept anew from the log before that is cut; only what is
#         not there either, and no other node has, is lost.
# Rule 2: whoever holds the machine goes on holding it: a restored one takes its place within. Followers are told what may be
#         different, as if it had just been changed.
# Rule 3: a machine of a million files is made, and the one before it is taken apart, in a thread, in steps that leave the others
#         their turn (steps.py). Neither is searched for garbage: what it holds is no garbage.
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from itertools import chain
from typing import Any, Protocol, TypeVar

from idunno.base.errors import Unavailable
from idunno.base.ids import BlockId, NodeId
from idunno.consensus.voters import names_voters
from idunno.coordinator import snapshot as snapshots
from idunno.coordinator.applier import Applier
from idunno.coordinator.commands import CompleteTask, PutSmall, decode_entry
from idunno.coordinator.machine import Machine
from idunno.coordinator.namespace import small_block
from idunno.coordinator.records import SMALL_BYTES_MAX, Block

Fetch = Callable[[Sequence[BlockId], Sequence[NodeId]], Awaitable[None]]
"""Have these small contents here, synced, from these nodes. Raises IdunnoError when that cannot be done now."""


class Smalls(Protocol):
    """The node's store of small contents."""

    losses: int
    """How often something that was held is found unreadable, and is held no more."""

    def mark(self) -> None:
        """What is held from now on is what the next sweep leaves."""
        ...

    def hold(self, block: BlockId) -> bool:
        """Whether it is here, and so stays."""
        ...

    async def room(self) -> None:
        """Wait, for a bounded time, until there is room for what a slice of entries brings. Raises nothing."""
        ...

    async def keep_surely(self, block: BlockId, content: bytes) -> None:
        """Raises IdunnoError when there is no room."""
        ...

    async def flush(self) -> None: ...

    async def sweep(self) -> None:
        """Let go of what was not held since `mark`. Raises nothing: what cannot go yet stays."""
        ...


T = TypeVar("T")


class Offload(Protocol):
    async def __call__(self, work: Callable[[], T], /) -> T: ...


class Keeper:
    """consensus.install.StateMachine."""

    def __init__(
        self,
        applier: Applier,
        smalls: Smalls,
        fetch: Fetch,
        offload: Offload,
        *,
        lasting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`lasting`: around the making of what stays."""
        self.applier, self.smalls, self.fetch, self.offload, self.lasting = applier, smalls, fetch, offload, lasting
        self._freeing: set[asyncio.Task[None]] = set()
        self._lacking: dict[BlockId, None] = {}
        self._losses = 0  # of the store, when it was asked what it holds

    def capture(self) -> Iterator[bytes]:
        lacking: dict[BlockId, None] = {}
        self._lacking, self._losses = lacking, self.smalls.losses
        self.smalls.mark()
        return self.applier.machine.capture(lambda kind, record: note_lacking(kind, record, self.smalls, lacking))

    async def room(self) -> None:
        await self.smalls.room()

    async def secure(self, payloads: AsyncGenerator[bytes]) -> None:
        async with aclosing(payloads):
            if self._lacking:
                await self._keep_anew(self._lacking, payloads)
        await self.smalls.flush()
        if self._lacking:
            await self.fetch(list(self._lacking), holders(self.applier.machine))
        if self.smalls.losses != self._losses:
            raise Unavailable(
                "small contents were found unreadable since the snapshot was begun: the next one has them fetched"
            )

    async def _keep_anew(self, lacking: dict[BlockId, None], payloads: AsyncGenerator[bytes]) -> None:
        """Take out of `lacking` what entries of the log brought."""
        async for payload in payloads:
            content = small_content(payload)
            if content is not None and (block := small_block(content).block) in lacking:
                await self.smalls.keep_surely(block, content)
                del lacking[block]
                if not lacking:
                    return

    async def settled(self) -> None:
        await self.smalls.sweep()

    def restore(self) -> Restoring:
        return Restoring(self)

    def install(self, machine: Machine) -> None:
        was = self.applier.replace(machine)
        task = asyncio.get_running_loop().create_task(self._free(was), name="free the old machine")
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)

    async def _free(self, was: Machine) -> None:
        await self.offload(was.free)


class Restoring:
    """consensus.install.Restore."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._reader = snapshots.Reader()
        self._lacking: dict[BlockId, None] = {}
        self._losses = keeper.smalls.losses  # before it is asked what it holds
        self._machine: Machine | None = None

    def feed(self, piece: bytes) -> None:
        for kind, rows in self._reader.feed(piece):
            for record in rows:
                note_lacking(kind, record, self._keeper.smalls, self._lacking)

    async def finish(self) -> None:
        self._machine = await self._keeper.offload(self._make)

    def _make(self) -> Machine:
        with self._keeper.lasting():
            machine = Machine.restored(self._reader, self._keeper.applier.machine.supports)
            self._reader.free()
        return machine

    async def complete(self, leader: NodeId) -> None:
        assert self._machine is not None
        if self._losses != self._keeper.smalls.losses:
            await self._ask_anew(self._machine)
        await self._keeper.fetch(list(self._lacking), [leader, *holders(self._machine)])
        if self._losses != self._keeper.smalls.losses:
            raise Unavailable("small contents were found unreadable meanwhile: they are fetched at the next attempt")

    async def _ask_anew(self, machine: Machine) -> None:
        """What the store lacks of all that the machine refers to."""
        self._losses = self._keeper.smalls.losses
        self._lacking.clear()
        for _ in machine.capture(lambda kind, record: note_lacking(kind, record, self._keeper.smalls, self._lacking)):
            await asyncio.sleep(0)

    def install(self) -> None:
        assert self._machine is not None
        self._keeper.install(self._machine)


def holders(machine: Machine) -> list[NodeId]:
    """Every node may hold every small content."""
    return [record.node for record in machine.roster.nodes() if record.presence == "present"]


def note_lacking(kind: str, record: Any, smalls: Smalls, lacking: dict[BlockId, None]) -> None:
    for block in small_blocks(kind, record):
        if not smalls.hold(block.block):
            lacking[block.block] = None


def small_content(payload: bytes) -> bytes | None:
    """Of a small file that an entry of the log may have brought; it may also have been refused."""
    if not payload or names_voters(payload):
        return None
    command = decode_entry(payload).command
    if isinstance(command, PutSmall | CompleteTask) and len(command.content) <= SMALL_BYTES_MAX:
        return command.content
    return None


def small_blocks(kind: str, record: Any) -> Iterator[Block]:
    """The small contents that a row of a snapshot refers to."""
    if kind in ("file", "trash"):
        yield from chain.from_iterable(version.blocks for version in record.versions if version.small)
    elif kind == "job":
        yield from record.record.input_blocks if record.record.input_small else ()
        for task in record.tasks:
            yield from task.output.blocks if task.output is not None and task.output.small else ()
    elif kind == "model" and record.record is not None:
        for file in record.record.files:
            yield from file.blocks if file.size <= SMALL_BYTES_MAX else ()

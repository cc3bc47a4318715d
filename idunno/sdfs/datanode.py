# idunno/sdfs/datanode.py: takes blocks in, passes them on, hands them out.
#
# Rule 1: a block streams through: a node holds the stream's credit and a write buffer of it, never the block.
# Rule 2: "stored" is said only of a copy that is verified and synced (blocks.py).
# Rule 3: a chain never waits for a place: what comes from another node is taken or refused at once. Only clients queue, and
#         only so many.
# Rule 4: orders carry the leader's term; one of an older term is refused.
# Rule 5: a reader gets the block's bytes in order from whoever has them, going on at the offset reached when one fails. The
#         reader checks them against the block's name: a whole block read from one disk is checked there as well.
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec

from idunno.base.errors import (
    Corrupt,
    DeadlineExceeded,
    Exhausted,
    IdunnoError,
    InvalidArgument,
    NotFound,
    StaleTerm,
    Unavailable,
)
from idunno.base.ids import BlockId, NodeId, Term
from idunno.coordinator.records import BLOCK_BYTES_MAX
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.chain import Copy, LocalCopy, RemoteCopies
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.hashing import check_block_id
from idunno.sdfs.inventory import Report, Reporter
from idunno.sdfs.messages import (
    READ_BLOCK,
    WRITE_BLOCK,
    CopyFailure,
    ReadBlock,
    WriteBlock,
    WriteBlockAnswer,
)
from idunno.sdfs.small import SmallStore
from idunno.wire.calls import BODY_BYTES_MAX, Actor, Call, Empty, Lane, Peers, Registrar, Role

T = TypeVar("T")

CHAIN_MAX: Final = 8
RELAY_MAX: Final = 16


class _SourceFailed(Exception):
    """One source of a read failed; `error` says how. Never leaves this file."""

    def __init__(self, error: IdunnoError) -> None:
        super().__init__(str(error))
        self.error = error


class DataNode:
    """This node's part in moving blocks for clients: `block.write`, `block.read`; and its reports to the leader.

    `may_write(put, actor)` raises PermissionDenied or Conflict when a client may not write for that put, `may_read`
    when a user may not look at that block; `locate(block)`
    names nodes that hold a block, or may, best first; `report` sends an inventory page to the leader; `heard(put, block, size,
    nodes)` is told who said to have stored a client's block.
    """

    def __init__(
        self,
        me: NodeId,
        blocks: BlockStore,
        small: SmallStore,
        peers: Peers,
        *,
        config: SdfsConfig,
        may_write: Callable[[str, Actor], Awaitable[None]],
        may_read: Callable[[BlockId, Actor], Awaitable[None]],
        locate: Callable[[BlockId], Awaitable[list[NodeId]]],
        report: Report,
        heard: Callable[[str, BlockId, int, Sequence[NodeId]], None] = lambda put, block, size, stored: None,
        must_show: Callable[[BlockId, Actor], bool] = lambda block, actor: False,
    ) -> None:
        self._me, self._blocks, self._small, self._peers, self._config = me, blocks, small, peers, config
        self._may_write, self._may_read, self._locate, self._heard = may_write, may_read, locate, heard
        self._must_show = must_show
        self._reporter = Reporter(me, blocks, report, config)
        self._term = Term(0)
        self._writes = asyncio.Semaphore(config.writes_max)
        self._writing = self._writes_waiting = self._forwards = self._reads = 0

    @property
    def busy(self) -> bool:
        """Whether blocks are under way here."""
        return self._writing > 0 or self._forwards > 0 or self._reads > 0

    def register(self, registrar: Registrar) -> None:
        registrar.register(WRITE_BLOCK, self.write)
        registrar.register(READ_BLOCK, self.read)

    def start(self) -> None:
        """After the block store is open."""
        self._blocks.on_change = self._reporter.changed
        self._reporter.start()

    async def stop(self) -> None:
        self._blocks.on_change = None
        await self._reporter.stop()

    def leader_changed(self, leader: NodeId | None, term: Term) -> None:
        """The node tells of each change of leader or term it hears of."""
        self._term = max(self._term, term)
        self._reporter.leader_changed(leader, term)

    # -- writing ------------------------------------------------------------------------------------------------------

    async def write(self, call: Call[WriteBlock]) -> WriteBlockAnswer:
        request = call.request
        from_node = call.peer.node is not None and call.peer.node != self._me
        self._check_write(request, from_node=from_node)
        if call.actor.role is not Role.NODE and not from_node:
            await self._may_write(request.put, call.actor)
        async with self._place(from_node=from_node):
            try:
                async with asyncio.timeout(self._config.block_s):
                    return await self._take(call)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"block {request.block[:16]} was not here after {self._config.block_s:.0f} s, the longest for one block"
                ) from None

    def _check_write(self, request: WriteBlock, *, from_node: bool) -> None:
        check_block_id(request.block)
        chain = request.chain
        if not 0 < request.size <= BLOCK_BYTES_MAX:
            raise InvalidArgument(f"a block has 1 to {BLOCK_BYTES_MAX} bytes, not {request.size}")
        if not 1 <= len(chain) <= CHAIN_MAX or len(set(chain)) != len(chain):
            raise InvalidArgument(f"a chain has 1 to {CHAIN_MAX} different nodes, not {len(chain)}")
        if from_node and self._me not in chain:
            raise InvalidArgument(f"node {self._me} is not in the chain it was sent: only entry nodes pass on")
        if request.term < self._term:
            raise StaleTerm(f"placement of term {request.term}, this is term {self._term}: begin the put again")

    @asynccontextmanager
    async def _place(self, *, from_node: bool) -> AsyncIterator[None]:
        """One of the places for blocks under way. Raises Exhausted."""
        if from_node:
            if self._forwards >= self._config.forwards_max:
                raise Exhausted(f"{self._forwards} blocks from other nodes are under way here, the most at once")
            self._forwards += 1
            try:
                yield
            finally:
                self._forwards -= 1
            return
        if self._writes_waiting >= self._config.writes_waiting_max:
            raise Exhausted(
                f"{self._config.writes_max} blocks are under way and {self._writes_waiting} wait, the most at once; "
                "try again, or through another node"
            )
        self._writes_waiting += 1
        try:
            await self._writes.acquire()
        finally:
            self._writes_waiting -= 1
        self._writing += 1
        try:
            yield
        finally:
            self._writing -= 1
            self._writes.release()

    async def _take(self, call: Call[WriteBlock]) -> WriteBlockAnswer:
        """Receive the block into every copy at once; the answer is the sum of theirs."""
        request = call.request
        if call.peer.node is None or call.peer.node == self._me:
            request = msgspec.structs.replace(request, whole=self._must_show(request.block, call.actor))
        copies: list[Copy] = []
        if self._me in request.chain:
            copies.append(LocalCopy(self._me, self._blocks, request))
        if rest := [node for node in request.chain if node != self._me]:
            onward = msgspec.structs.replace(request, chain=rest)
            # A second less than we have ourselves, so that the answer about them still gets back.
            timeout_s = max(0.1, call.remaining_s() - 1.0)
            copies.append(RemoteCopies(self._peers, onward, self._config, timeout_s))
        try:
            await asyncio.gather(*(copy.begin() for copy in copies))
            await self._receive(call, copies)
            answers = await asyncio.gather(*(copy.finish() for copy in copies))
        finally:
            for copy in reversed(copies):  # the wire's first: a disk may be slow, and who waits for it be cancelled
                await copy.close()
        stored: list[NodeId] = [node for answer in answers for node in answer.stored]
        failed: list[CopyFailure] = [failure for answer in answers for failure in answer.failed]
        if request.put and (call.peer.node is None or call.peer.node == self._me):
            self._heard(request.put, request.block, request.size, stored)
        return WriteBlockAnswer(stored, failed)

    async def _receive(self, call: Call[WriteBlock], copies: list[Copy]) -> None:
        """Items until the stream's end, each to all copies. Returns early when none needs more."""
        received, size = 0, call.request.size
        while any(copy.wants for copy in copies):
            item = await self._in_time(call.receive(), f"nothing came of block {call.request.block[:16]}")
            if item is None:
                if received != size:
                    raise InvalidArgument(f"block {call.request.block[:16]} ended after {received} of {size} bytes")
                return
            received += len(item.body)
            if received > size:
                raise InvalidArgument(f"block {call.request.block[:16]} was announced with {size} bytes, more came")
            if item.body:
                # The chain first: what it was sent is under way while the disk here is waited for.
                for copy in reversed(copies):
                    await copy.append(item.body)

    async def _in_time(self, step: Coroutine[Any, Any, T], late: str) -> T:
        """A step of the caller's stream; a caller that stands still must not keep a place that others wait for."""
        try:
            async with asyncio.timeout(self._config.idle_s):
                return await step
        except TimeoutError:
            raise DeadlineExceeded(f"{late} for {self._config.idle_s:.0f} s") from None

    # -- reading ------------------------------------------------------------------------------------------------------

    async def read(self, call: Call[ReadBlock]) -> Empty:
        request = call.request
        check_block_id(request.block)
        at, end = request.offset, request.offset + request.length
        if not 0 <= at <= end <= BLOCK_BYTES_MAX or len(request.relay) > RELAY_MAX or len(request.exclude) > RELAY_MAX:
            raise InvalidArgument(
                f"cannot read {request.length} bytes from {at} of a block, by {len(request.relay)} nodes"
            )
        if call.actor.role is Role.USER:  # nodes ask for whoever asked them
            await self._may_read(request.block, call.actor)
        if self._reads >= self._config.reads_max:
            raise Exhausted(f"{self._reads} blocks are being read through this node, the most at once; try another")
        self._reads += 1
        try:
            await self._send_from_any(call, at, end)
        finally:
            self._reads -= 1
        return Empty()

    async def _send_from_any(self, call: Call[ReadBlock], at: int, end: int) -> None:
        request = call.request
        problems: list[tuple[NodeId, IdunnoError]] = []
        async for node in self._sources(request):
            note = node.encode()
            try:
                async with aclosing(self._pull(node, call, at, end)) as pieces:
                    async for piece in pieces:
                        await self._in_time(call.send(piece, note), f"nothing was taken of block {request.block[:16]}")
                        note = b""
                        at += len(piece)
                return
            except _SourceFailed as failed:
                problems.append((node, failed.error))
                if at == end and (isinstance(failed.error, Corrupt) or request.local_only):
                    raise failed.error from failed  # all is sent, and the source says that it was wrong
        if request.local_only:
            raise problems[0][1] if problems else NotFound(f"block {request.block[:16]} is not on this node")
        told = "; ".join(f"{node}: {error}" for node, error in problems) or "no node is known to hold it"
        raise Unavailable(f"block {request.block[:16]} cannot be read: {told}")

    async def _sources(self, request: ReadBlock) -> AsyncIterator[NodeId]:
        """Whom to try, this node first when it has the block."""
        if self._me not in request.exclude and (request.block in self._blocks or request.block in self._small):
            yield self._me
        if request.local_only:
            return
        for node in request.relay or await self._locate(request.block):
            if node != self._me and node not in request.exclude:
                yield node

    async def _pull(self, node: NodeId, call: Call[ReadBlock], at: int, end: int) -> AsyncGenerator[memoryview, None]:
        """The bytes [at, end) from one node, in items' sizes. Raises _SourceFailed."""
        try:
            if node == self._me:
                async with aclosing(self._pull_own(call.request.block, at, end)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            async with aclosing(self._pull_remote(node, call, at, end)) as pieces:
                async for piece in pieces:
                    yield piece
        except IdunnoError as error:
            raise _SourceFailed(error) from error

    async def _pull_own(self, block: BlockId, at: int, end: int) -> AsyncGenerator[memoryview, None]:
        if block not in self._blocks:
            content = await self._small.get(block)
            if content is None:
                raise NotFound(f"block {block[:16]} is not on this node")
            if end > len(content):
                raise InvalidArgument(f"block {block[:16]} has {len(content)} bytes, not {end}")
            yield memoryview(content)[at:end]
            return
        async with aclosing(self._blocks.read(block, at, end - at)) as pieces:
            async for piece in pieces:
                view = memoryview(piece)
                for start in range(0, len(view), BODY_BYTES_MAX):
                    yield view[start : start + BODY_BYTES_MAX]

    async def _pull_remote(
        self, node: NodeId, call: Call[ReadBlock], at: int, end: int
    ) -> AsyncGenerator[memoryview, None]:
        request = ReadBlock(call.request.block, at, end - at, local_only=True)
        timeout_s = max(0.1, call.remaining_s() - 1.0)
        async with self._peers.to(node, Lane.BULK).open(READ_BLOCK, request, timeout_s=timeout_s) as stream:
            while True:
                try:
                    async with asyncio.timeout(self._config.stall_s):
                        item = await stream.receive()
                except TimeoutError:
                    raise DeadlineExceeded(f"node {node} sent nothing for {self._config.stall_s:.0f} s") from None
                if item is None:
                    break
                at += len(item.body)
                if at > end:
                    raise Corrupt(f"node {node} sent more of block {request.block[:16]} than it was asked for")
                yield memoryview(item.body)
            try:
                async with asyncio.timeout(self._config.stall_s):
                    await stream.answer()  # says Corrupt when the whole block was not what its name says
            except TimeoutError:
                raise DeadlineExceeded(f"node {node} gave no answer for {self._config.stall_s:.0f} s") from None
            if at != end:
                raise Corrupt(f"node {node} ended block {request.block[:16]} {end - at} bytes early")

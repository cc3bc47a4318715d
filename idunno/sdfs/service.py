# idunno/sdfs/service.py: what clients ask any node for: begin, commit, put-small, abort, delete. (Looking is in views.py.)
#
# Rule 1: any node serves any client: it proposes through the coordinator, and asks the leader for what only that one knows.
# Rule 2: a version is committed only when each of its blocks has a quorum of synced copies on nodes of the roster, as these say
#         themselves (witness.py); a client's word counts for nothing.
# Rule 3: everything carries the put's or request's id: asked again, here or at another node, it gives the same answer.
from __future__ import annotations

import logging
import random

from idunno.base.errors import Conflict, IdunnoError, InvalidArgument, NotReady, PermissionDenied
from idunno.base.ids import BlockId, Index, NodeId, Term, check_file_name
from idunno.coordinator import permissions
from idunno.coordinator.commands import AbortPut, BeginPut, CommitPut, DeleteFile, PutSmall
from idunno.coordinator.effects import BlocksFreed, Effect
from idunno.coordinator.records import SMALL_BYTES_MAX, Block, VersionRecord
from idunno.coordinator.results import FileGone, PutDone, PutOpen
from idunno.coordinator.roster import Roster
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.config import FILE_BLOCKS_MAX, SdfsConfig
from idunno.sdfs.hashing import block_id, check_block_id
from idunno.sdfs.keeping import Keeping
from idunno.sdfs.leading import Leading
from idunno.sdfs.messages import (
    ABORT,
    BEGIN,
    COMMIT,
    DELETE,
    PUT_SMALL,
    Abort,
    Begin,
    BeginAnswer,
    BlockCopies,
    Commit,
    Delete,
    DeleteAnswer,
    FileInfo,
    Inventory,
    PutAnswer,
    PutSmallFile,
)
from idunno.sdfs.orders import Orders
from idunno.sdfs.ports import Coordination
from idunno.sdfs.rules import check_reachable, iso, put_answer, quorum
from idunno.sdfs.scrub import Scrubber
from idunno.sdfs.small import SmallStore
from idunno.sdfs.sweep import Sweeper
from idunno.sdfs.views import Views
from idunno.sdfs.where import Where
from idunno.sdfs.witness import Witness
from idunno.wire.answering import left_s
from idunno.wire.calls import Actor, Call, Empty, Peers, Registrar, Role

log = logging.getLogger("idunno.sdfs")


class FileService:
    """This node's `file.*` handlers; with `leading` those of the leader, and what the data node needs to know."""

    def __init__(
        self,
        me: NodeId,
        coordinator: Coordination,
        blocks: BlockStore,
        small: SmallStore,
        peers: Peers,
        *,
        config: SdfsConfig,
        rng: random.Random,
    ) -> None:
        self._me, self._coordinator, self._small = me, coordinator, small
        self._where = Where(me, coordinator, peers)
        self._views = Views(me, coordinator, blocks, small, peers, self._where)
        self.witness = Witness(me, blocks, peers)
        self.leading = Leading(me, coordinator, peers, config=config, is_small=small.__contains__)
        self.orders = Orders(me, coordinator, blocks, peers, config=config)
        self.sweeper = Sweeper(coordinator, blocks, config=config)
        self.scrubber = Scrubber(blocks, rng, config=config)
        self._keeping = Keeping(me, coordinator, peers, self.scrubber.begin, config=config)

    def register(self, registrar: Registrar) -> None:
        registrar.register(BEGIN, self.begin)
        registrar.register(COMMIT, self.commit)
        registrar.register(PUT_SMALL, self.put_small)
        registrar.register(ABORT, self.abort)
        registrar.register(DELETE, self.delete)
        self._views.register(registrar)
        self.leading.register(registrar)
        self.orders.register(registrar)
        self.witness.register(registrar)
        self._keeping.register(registrar)

    def start(self) -> None:
        """After the block store is open."""
        self.leading.start()
        self.sweeper.start()
        self.scrubber.start()

    async def stop(self) -> None:
        await self.scrubber.stop()
        await self.sweeper.stop()
        await self.leading.stop()

    def follow(self, index: Index, effect: Effect) -> None:
        """For Applier.subscribe."""
        if isinstance(effect, BlocksFreed):
            self.sweeper.freed(effect.blocks)
        self.leading.follow(effect)

    def role_changed(self, is_leader: bool, term: Term) -> None:
        """For RaftDriver.on_role."""
        self.leading.role_changed(is_leader, term)

    # -- for DataNode -------------------------------------------------------------------------------------------------

    async def may_write(self, put: str, actor: Actor) -> None:
        """Raises Conflict when the put is not open, PermissionDenied when it is somebody else's."""
        open_put = self._coordinator.machine.namespace.open_put(put)
        if open_put is None:  # this node's machine may be behind the one that answered `begin`
            open_put = (await self._coordinator.read(5.0)).namespace.open_put(put)
        if open_put is None:
            raise Conflict(f"put {put[:80]} is not open: it was aborted, committed, or never begun")
        if open_put.owner != actor.name and not actor.may(Role.ADMIN):
            raise PermissionDenied(f"put {put} belongs to {open_put.owner}")

    async def may_read(self, block: BlockId, user: Actor) -> None:
        """Raises PermissionDenied for what is mentioned by other people's jobs alone, or by nothing."""
        if self._coordinator.machine.references.is_for(block, user.name):
            return
        machine = await self._coordinator.read(5.0)  # this node may be behind the one that named the block
        if machine.references.is_for(block, user.name):
            return
        # Read back before a commit that needs more copies: he has sent it, or nobody else knows its name yet.
        mine = [put.put for put in machine.namespace.open_puts() if put.owner == user.name]
        unknown = block not in machine.references and block not in self._small  # small ones come with `stat`
        if (mine and unknown) or any(self.witness.knows(put, block) for put in mine):
            return
        raise PermissionDenied(f"block {block[:16]} is of no file that {user.name} may look at; see `idunno ls`")

    def must_show(self, block: BlockId, actor: Actor) -> bool:
        """Whether the name of a block is not enough to make it part of a file of this actor: it is not for his eyes."""
        references = self._coordinator.machine.references
        return actor.role is Role.USER and block in references and not references.is_for(block, actor.name)

    async def locate(self, block: BlockId) -> list[NodeId]:
        return await self._where.locate(block)

    async def report(self, leader: NodeId, page: Inventory) -> None:
        await self._where.report(leader, page)

    # -- writing ------------------------------------------------------------------------------------------------------

    async def begin(self, call: Call[Begin]) -> BeginAnswer:
        request = call.request
        check_file_name(request.name, system=request.system)
        check_count(request.claimed)
        node = self._me if call.actor.role is Role.NODE else None
        command = BeginPut(request.put, request.name, request.if_version, node)
        opened, _ = await self._coordinator.propose(
            command, actor=call.actor, request=request.put, timeout_s=left_s(call)
        )
        assert isinstance(opened, PutOpen)
        if (record := opened.committed) is not None:
            committed = FileInfo(
                request.name, record.version, record.size, iso(record.created_ms), record.owner, _uncounted(record)
            )
            return BeginAnswer(0, [], [], self._coordinator.driver.term, committed)
        placed = await self._where.place(request.put, request.size, left_s(call))
        proven: list[BlockCopies] = []
        if request.claimed:
            roster = self._coordinator.machine.roster
            found = await self.witness.proven(
                request.put,
                request.claimed,
                roster,
                len(roster.nodes()),
                left_s(call) / 2,
                heard_only={b.block for b in request.claimed if self.must_show(b.block, call.actor)},
            )
            proven = [BlockCopies(b.block, b.size, found[b.block]) for b in request.claimed]
        return BeginAnswer(
            placed.quorum, placed.replicas, placed.spares, placed.term, left_out=placed.left_out, proven=proven
        )

    async def commit(self, call: Call[Commit]) -> PutAnswer:
        request = call.request
        check_count(request.blocks)
        machine = await self._coordinator.read(left_s(call))
        made_before = machine.namespace.made(request.put) is not None
        needed = quorum(machine.roster, request.write_quorum)
        blocks = tuple(Block(block.block, block.size) for block in request.blocks)
        command = CommitPut(request.put, request.name, request.size, blocks)
        permissions.check(command, call.actor, machine)  # before anybody is asked anything
        if machine.namespace.open_put(request.put) is None and not made_before:
            raise Conflict(f"put {request.put[:80]} is not open: it was aborted, or never begun")
        if not made_before:
            copies = await self.witness.proven(
                request.put,
                request.blocks,
                machine.roster,
                needed,
                left_s(call) / 2,  # the command needs some of it, and the refusal its way back
                heard_only={b.block for b in request.blocks if self.must_show(b.block, call.actor)},
            )
            fewest = _fewest(copies)
            if fewest < needed:
                raise NotReady(f"{request.name}: a block has {fewest} copies, {needed} are needed: begin the put again")
        done, _ = await self._coordinator.propose(
            command, actor=call.actor, request=request.put, timeout_s=left_s(call)
        )
        assert isinstance(done, PutDone)
        if made_before:  # proven then; what is told of copies now changes nothing
            copies = _claimed(request.blocks, machine.roster)
            if _fewest(copies) == 0:  # who asks knows no holders: he asks for a put that an earlier process made
                copies, _ = await self._where.known(list(copies), left_s(call))
        else:
            self.witness.forget(request.put)
            await self._tell_leader([BlockCopies(b.block, b.size, copies[b.block]) for b in request.blocks], call)
        holders = [machine.roster.name(node) for node in _by_share(copies)]
        return put_answer(machine.roster, done.name, done.version, done.size, len(blocks), holders, _fewest(copies))

    async def _tell_leader(self, blocks: list[BlockCopies], call: Call[Commit]) -> None:
        try:
            await self._where.copied(blocks, min(1.0, left_s(call)))
        except IdunnoError as error:  # a hint; the nodes report for themselves within moments
            log.info("leader not told of copies", extra={"put": call.request.put, "error": str(error)})

    async def put_small(self, call: Call[PutSmallFile]) -> PutAnswer:
        request, content = call.request, bytes(call.body)
        check_file_name(request.name, system=request.system)
        if len(content) > SMALL_BYTES_MAX:
            raise InvalidArgument(
                f"{len(content)} bytes are no small file, at most {SMALL_BYTES_MAX}; put them as blocks"
            )
        self._small.check_room()
        roster = self._coordinator.machine.roster
        if quorum(roster, request.write_quorum) > roster.present:
            # A node that has just started has yet to learn who is there: refuse only by what is certainly true.
            roster = (await self._coordinator.read(left_s(call))).roster
            check_reachable(roster, quorum(roster, request.write_quorum))
        command = PutSmall(request.put, request.name, block_id(content), content, request.if_version)
        done, copies = await self._coordinator.propose(
            command, actor=call.actor, request=request.put, timeout_s=left_s(call)
        )
        assert isinstance(done, PutDone)
        roster = self._coordinator.machine.roster
        # Every node gets the entry; `copies` of them had synced it when this left. Which ones is not told: present ones.
        present = [n for n in roster.nodes() if n.presence == "present"]
        mine = [n.name for n in present if n.node == self._me]
        others = [n.name for n in present if n.node != self._me]
        return put_answer(roster, done.name, done.version, done.size, 1, (mine + others)[:copies], copies)

    async def abort(self, call: Call[Abort]) -> Empty:
        command = AbortPut(call.request.put, call.request.reason)
        await self._coordinator.propose(
            command, actor=call.actor, request=f"{call.request.put}-abort", timeout_s=left_s(call)
        )
        return Empty()

    async def delete(self, call: Call[Delete]) -> DeleteAnswer:
        command = DeleteFile(call.request.name)
        gone, _ = await self._coordinator.propose(
            command, actor=call.actor, request=call.request.request, timeout_s=left_s(call)
        )
        assert isinstance(gone, FileGone)
        return DeleteAnswer(gone.name, gone.versions)


def check_count(blocks: list[BlockCopies]) -> None:
    """Raises InvalidArgument."""
    if len(blocks) > FILE_BLOCKS_MAX:
        raise InvalidArgument(f"{len(blocks)} blocks, at most {FILE_BLOCKS_MAX} in a file; put it in parts")


def _claimed(blocks: list[BlockCopies], roster: Roster) -> dict[BlockId, list[NodeId]]:
    return {
        check_block_id(block.block): [node for node in dict.fromkeys(block.nodes) if roster.find(node) is not None]
        for block in blocks
    }


def _fewest(copies: dict[BlockId, list[NodeId]]) -> int:
    return min((len(nodes) for nodes in copies.values()), default=0)


def _uncounted(record: VersionRecord) -> list[BlockCopies]:
    """A version's blocks, nothing said of where they are."""
    return [BlockCopies(block.block, block.size, []) for block in record.blocks]


def _by_share(copies: dict[BlockId, list[NodeId]]) -> list[NodeId]:
    """The nodes that hold any of the blocks, those with most of them first."""
    share: dict[NodeId, int] = {}
    for nodes in copies.values():
        for node in nodes:
            share[node] = share.get(node, 0) + 1
    return sorted(share, key=lambda node: (-share[node], node))

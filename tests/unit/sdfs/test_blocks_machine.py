# The block store against a model: whatever is written, broken off, lost to power, flipped and removed, in whatever order.
from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from idunno.base.errors import Corrupt, DecodeError, DiskFailed, Exhausted, IdunnoError, NotFound
from idunno.base.ids import BlockId
from idunno.sdfs.blocks import BlockStore
from idunno.sdfs.hashing import block_id
from tests.unit.fakes import MemoryDisk
from tests.unit.sdfs.world import CONFIG, VirtualLoop

CONTENTS = [random.Random(n).randbytes(size) for n, size in enumerate((1, 700, 5_000, 9_000))]
number = st.integers(0, len(CONTENTS) - 1)
REFUSED = ["open", "write", "sync", "rename", "sync_directory", "make_directory", "remove", "read"]


class Blocks(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.disk = MemoryDisk()
        self.said: set[BlockId] = set()  # held, as the store says, and by what happened it has to be
        self.spoilt: set[BlockId] = set()  # of these: flipped by the world
        self.flipped: set[bytes] = set()  # every content the world has made by flipping: a removed file may come back
        self.told: dict[BlockId, bool] = {}
        self._open()

    def teardown(self) -> None:
        self.runner.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def _open(self) -> None:
        self.store = BlockStore(self.disk, CONFIG)
        self._run(self.store.open())
        self.told = dict.fromkeys(self.store.held(), True)
        self.store.on_change = self.told.__setitem__

    # -- what happens -------------------------------------------------------------------------------------------------

    async def _write(self, content: bytes, *, send: int) -> None:
        writer = await self.store.begin(block_id(content), len(content), "p1")
        try:
            for at in range(0, send, 1_000):
                await writer.append(content[at : min(send, at + 1_000)])
            await writer.finish()
        finally:
            await writer.close()

    @rule(n=number)
    def write(self, n: int) -> None:
        block = block_id(CONTENTS[n])
        try:
            self._run(self._write(CONTENTS[n], send=len(CONTENTS[n])))
        except Exhausted:
            assert self.store.problem
            return
        self.said.add(block)
        self.spoilt.discard(block)

    @rule(n=number, share=st.floats(0, 0.99))
    def write_in_part(self, n: int, share: float) -> None:
        try:
            self._run(self._write(CONTENTS[n], send=int(len(CONTENTS[n]) * share)))
        except (DecodeError, Exhausted):
            return
        raise AssertionError("a part was taken for the block")

    @rule(n=number, doing=st.sampled_from(REFUSED))
    def write_to_a_disk_that_refuses(self, n: int, doing: str) -> None:
        block = block_id(CONTENTS[n])
        self.disk.faults = {doing: "input/output error"}
        try:
            self._run(self._write(CONTENTS[n], send=len(CONTENTS[n])))
        except (DiskFailed, Exhausted):
            if block in self.said and block not in self.store.held():  # renamed, and the name not synced: in doubt
                assert doing == "sync_directory"
                self.disk.faults = {}
                assert self._run(self.store.verify(block)), "it lies there whole"
                self.spoilt.discard(block)
        else:
            self.said.add(block)
            self.spoilt.discard(block)
        finally:
            self.disk.faults = {}

    @rule()
    def probe(self) -> None:
        self._run(self.store.probe())
        assert self.store.problem == ""

    @rule(seed=st.integers(0, 99))
    def power_fails(self, seed: int) -> None:
        self.disk.crash(random.Random(seed))
        self._open()
        for block in self.said:
            assert block in self.store, "it was said to be held"
        self.said = set(self.store.held())
        for block in self.said:
            content = self.disk.content(f"blocks/{block[:2]}/{block}")
            if content in self.flipped:
                self.spoilt.add(block)  # perhaps one that was removed, or replaced without a synced name
            else:
                assert block_id(content) == block, "nothing partial bears a block's name"
                self.spoilt.discard(block)

    @rule()
    def a_new_process(self) -> None:
        self._open()
        assert self.said <= set(self.store.held())
        self.said = set(self.store.held())

    @rule(n=number, at=st.floats(0, 0.99))
    def a_byte_flips(self, n: int, at: float) -> None:
        block = block_id(CONTENTS[n])
        if block in self.said and block not in self.spoilt:
            path = f"blocks/{block[:2]}/{block}"
            self.disk.flip(path, int(len(CONTENTS[n]) * at))
            self.spoilt.add(block)
            self.flipped.add(self.disk.content(path))

    @rule(n=number)
    def verify(self, n: int) -> None:
        block = block_id(CONTENTS[n])
        good = block in self.said and block not in self.spoilt
        assert self._run(self.store.verify(block)) == good
        if not good:
            self._gone(block)

    @rule(n=number)
    def read(self, n: int) -> None:
        block, content = block_id(CONTENTS[n]), CONTENTS[n]

        async def read() -> bytes:
            return b"".join([piece async for piece in self.store.read(block, 0, len(content))])

        try:
            assert self._run(read()) == content
            assert block in self.said
            return
        except (NotFound, Corrupt) as refused:
            error = refused
        assert isinstance(error, Corrupt) == (block in self.said)
        assert block not in self.said or block in self.spoilt
        self._gone(block)

    @rule(n=number)
    def read_from_a_disk_that_refuses(self, n: int) -> None:
        block = block_id(CONTENTS[n])
        self.disk.faults = {"read": "input/output error"}
        try:
            assert not self._run(self.store.verify(block))
        finally:
            self.disk.faults = {}
        if block in self.said:
            assert block in self.store, "it may be the last copy"
            assert block not in self.store.held(), "nobody counts on it"
            assert self._run(self.store.verify(block)) == (block not in self.spoilt)  # and then it works again
            if block in self.spoilt:
                self._gone(block)

    @rule(n=number, refuses=st.booleans())
    def remove(self, n: int, refuses: bool) -> None:
        block = block_id(CONTENTS[n])
        if block not in self.store:
            return
        self.store.take_out(block)
        assert block not in self.store
        self.said.discard(block)
        self.disk.faults = {"remove": "input/output error"} if refuses else {}
        try:
            self._run(self.store.erase(block))
        except IdunnoError:
            assert refuses
        else:
            self.spoilt.discard(block)
            assert not refuses
        finally:
            self.disk.faults = {}

    def _gone(self, block: BlockId) -> None:
        self.said.discard(block)
        self.spoilt.discard(block)
        assert block not in self.store

    # -- what holds -----------------------------------------------------------------------------------------------------

    @invariant()
    def what_it_says_is_what_it_has(self) -> None:
        held = set(self.store.held())
        assert held == self.said
        assert {block for block, there in self.told.items() if there} == held, "who is told of changes knows as much"
        assert self.store._reserved_bytes == 0
        assert not self.store._writing
        for block in held - self.spoilt:
            inode = self.disk._durable_names[f"blocks/{block[:2]}/{block}"]
            assert block_id(bytes(inode.synced)) == block, "held means synced"


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

# The shell of coming back: when a leader hears a node with an old log, and what such a node does with the answers.
from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from idunno.base.errors import NotLeader, Unavailable
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import readmission
from idunno.consensus.messages import Readmit, ReadmitAnswer
from idunno.consensus.readmission import CLAIM_PATH, PATH, QUIET_MS, Readmission
from idunno.consensus.standing import Claim, Run, Witness
from tests.unit.consensus.test_driver import until
from tests.unit.fakes import MemoryDisk

ME, LEADER, OLD = NodeId("me"), NodeId("leader"), NodeId("old")


class Driver:
    """What Readmission asks of a RaftDriver."""

    def __init__(self, leads: bool = False, silent_ms: int = 0) -> None:
        self.is_leader, self.silent_ms, self.marked = leads, silent_ms, 0
        self.leader: NodeId | None = LEADER
        self.term, self.commit, self.durable = Term(4), Index(90), (Term(4), Index(50))
        self.held, self.waits_for = False, list[str]()

    def followers(self) -> dict[NodeId, Any]:
        return {OLD: SimpleNamespace(silent_ms=self.silent_ms)} if self.is_leader else {}

    async def mark_end(self, timeout_s: float) -> tuple[Term, Index]:
        self.marked += 1
        return Term(4), Index(91)

    def copy(self, term: Term) -> None:
        self.term = max(self.term, term)

    def unproved(self, why: str) -> None:
        self.waits_for.append(why)

    def holds(self, term: Term, index: Index) -> bool:
        return self.held and (term, index) == (4, 91)


class Shell:
    def __init__(self, driver: Driver, answers: Callable[[int], ReadmitAnswer] | None = None) -> None:
        self.driver, self.disk, self.witness = driver, MemoryDisk(), Witness()
        self.asked, self.boots, self.copies = 0, list[int](), list[str]()
        server: Any = SimpleNamespace(register=lambda method, handler: setattr(self, "handler", handler))

        async def call(method: Any, request: Readmit, *, timeout_s: float) -> ReadmitAnswer:
            self.asked += 1
            if answers is None:
                raise Unavailable("nobody there")
            return answers(self.asked)

        peers: Any = SimpleNamespace(to=lambda node, lane: SimpleNamespace(call=call))
        core: Any = driver
        self.it = Readmission(
            ME,
            core,
            peers,
            server,
            self.disk,
            self.witness,
            run=Run(7, 1).number,
            boot_seen=lambda node: 3,
            name=str,
            begin_again=self.boots.append,
            is_copy=self.copies.append,
        )

    async def asks(self, run: Run) -> ReadmitAnswer:
        call = SimpleNamespace(peer=SimpleNamespace(node=OLD), request=Readmit(run.number))
        answer: ReadmitAnswer = await self.handler(call)  # type: ignore[attr-defined]
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readmission, "ASK_AGAIN_S", 0.002)
    monkeypatch.setattr(readmission, "COPY_S", 0.05)
    monkeypatch.setattr(readmission, "STANDS_STILL_S", 0.5)


def test_a_leader_hears_it_when_no_other_process_of_it_answers_and_its_boot_is_above_all() -> None:
    async def run() -> None:
        shell = Shell(Driver(leads=True, silent_ms=QUIET_MS - 1))
        shell.witness.judge(OLD, Run(5, 1), Claim(Term(3), Index(9)))
        answer = await shell.asks(Run(9, 2))
        assert (answer.alive, answer.index, answer.boot) == (True, 0, 0)
        assert "boot 5 of it answered me, which leads, within 3.0 s" in answer.why

        shell.driver.silent_ms = QUIET_MS
        for boot in (4, 5):
            assert (await shell.asks(Run(boot, 2))).boot == 5
        assert shell.witness.accepted(OLD) == Run(5, 1).number
        assert await shell.asks(Run(6, 2)) == ReadmitAnswer(Term(4), Index(91))
        assert (shell.witness.accepted(OLD), shell.driver.marked) == (Run(6, 2).number, 1)

        shell.driver.silent_ms = 0  # it is this process that answers now
        assert await shell.asks(Run(6, 2)) == ReadmitAnswer(Term(4), Index(91))
        assert (await shell.asks(Run(7, 3))).alive

        shell.driver.is_leader = False
        with pytest.raises(NotLeader):
            await shell.asks(Run(6, 2))

    asyncio.run(run())


def test_the_boot_in_the_roster_counts_too() -> None:
    async def run() -> None:
        shell = Shell(Driver(leads=True, silent_ms=QUIET_MS))
        assert (await shell.asks(Run(3, 2))).boot == 3
        assert (await shell.asks(Run(4, 2))).index == 91

    asyncio.run(run())


async def marked_old(shell: Shell) -> None:
    await shell.it.open()
    assert shell.it.why == ""
    await shell.disk.make_directory("log")
    await shell.disk.replace(CLAIM_PATH, b"the claim of the old log")
    await shell.it.found_old("its log ends too early", Term(7))
    assert shell.boots == [0]
    shell.boots.clear()
    shell.it.why = ""
    await shell.it.open()
    assert shell.it.why == "its log ends too early"


def test_it_counts_again_when_it_has_the_entry_and_not_before() -> None:
    async def run() -> None:
        shell = Shell(Driver(), lambda asked: ReadmitAnswer(Term(4), Index(91)))
        await marked_old(shell)
        work = asyncio.create_task(shell.it.become_whole(lambda: [ME, LEADER]))
        await asyncio.sleep(0.05)
        assert not work.done()
        assert shell.asked == 1
        assert "its log was an old one (its log ends too early); it comes back by itself" in shell.driver.waits_for[-1]
        assert "it copies the log, up to entry 91: it has 50 entries of 90" in shell.driver.waits_for[-1]
        assert PATH in shell.disk.paths()
        shell.driver.held = True
        await asyncio.wait_for(work, 5)
        assert shell.it.why == ""
        shell.disk.crash(random.Random(1))
        assert not {PATH, CLAIM_PATH} & set(shell.disk.paths())

    asyncio.run(run())


def test_the_term_that_it_was_in_as_others_know_is_remembered_for_the_next_process() -> None:
    async def run() -> None:
        shell = Shell(Driver(), lambda asked: ReadmitAnswer(Term(4), Index(91)))
        await marked_old(shell)
        shell.driver.held = True
        await shell.it.become_whole(lambda: [ME, LEADER])
        assert shell.driver.term == 7

    asyncio.run(run())


def test_when_the_leader_changes_it_asks_anew_for_what_that_one_gave_may_be_cut_away() -> None:
    async def run() -> None:
        shell = Shell(Driver(), lambda asked: ReadmitAnswer(Term(4), Index(91 if asked > 3 else 80)))
        work = asyncio.create_task(shell.it.become_whole(lambda: [ME, LEADER]))
        shell.driver.held = True
        for number in range(3):
            await until(lambda: shell.asked > number)  # noqa: B023 - waited for at once
            shell.driver.leader = NodeId(f"leader {number}")
        await asyncio.wait_for(work, 5)
        assert shell.asked == 4

    asyncio.run(run())


def test_when_nothing_comes_it_asks_anew_for_the_leader_may_hear_another_process_by_now() -> None:
    async def run() -> None:
        shell = Shell(Driver(), lambda asked: ReadmitAnswer(Term(4), Index(91)))
        work = asyncio.create_task(shell.it.become_whole(lambda: [ME, LEADER]))
        for index in range(51, 71):  # it takes longer, and it goes on
            await asyncio.sleep(0.04)
            shell.driver.durable = Term(4), Index(index)
        assert shell.asked == 1
        await until(lambda: shell.asked == 2)
        work.cancel()

    asyncio.run(run())


def test_a_copy_of_a_node_that_runs_is_told_so() -> None:
    async def run() -> None:
        shell = Shell(Driver(), lambda asked: ReadmitAnswer(why="boot 5 of it answered", alive=True))
        work = asyncio.create_task(shell.it.become_whole(lambda: [ME, LEADER]))
        await until(lambda: shell.copies)
        work.cancel()
        assert shell.copies[0] == "boot 5 of it answered"
        assert shell.boots == []

    asyncio.run(run())


def test_one_whose_boot_number_is_too_low_begins_again() -> None:
    async def run() -> None:
        shell = Shell(Driver(), lambda asked: ReadmitAnswer(why="boot 9 of it was seen", boot=9))
        work = asyncio.create_task(shell.it.become_whole(lambda: [ME, LEADER]))
        await until(lambda: shell.boots)
        work.cancel()
        assert shell.boots[0] == 9

    asyncio.run(run())


def test_without_a_leader_it_waits_and_says_for_what() -> None:
    async def run() -> None:
        shell = Shell(Driver())
        shell.driver.leader = None
        work = asyncio.create_task(shell.it.become_whole(lambda: [ME, LEADER]))
        await until(lambda: len(shell.driver.waits_for) >= 3)
        work.cancel()
        assert "it waits for a leader, elected by a majority of the voters without it" in shell.driver.waits_for[-1]
        assert "idunno recover" in shell.driver.waits_for[-1]

    asyncio.run(run())

# One caller that stays connected to a living node.
from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest

from idunno.base.errors import (
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    Exhausted,
    IdunnoError,
    NoQuorum,
    NotFound,
    NotLeader,
    Unauthenticated,
    Unavailable,
)
from idunno.client import session
from idunno.sdfs.messages import BEGIN, DELETE, LIST, PUT_SMALL, RETAIN, Begin, Delete, List, PutSmallFile, Retain
from idunno.wire.calls import Method
from tests.unit.client.fake import FakeCluster


def test_a_node_that_is_down_is_passed_over() -> None:
    async def story() -> None:
        fake = FakeCluster(3)
        fake.world.down = {"n1", "n2"}
        async with await fake.connect() as cluster:
            assert await cluster.ls() == []
        assert fake.dialled[-1] == "n3"

    asyncio.run(story())


def test_when_no_node_answers_the_error_comes_at_once_and_says_what_to_do() -> None:
    async def story() -> None:
        fake = FakeCluster(3)
        fake.world.down = {"n1", "n2", "n3"}
        with pytest.raises(Unavailable, match=r"/fake: none of its 3 nodes answers .*run `idunno up --dir /fake`"):
            await fake.connect()
        assert len(fake.dialled) == 3

    asyncio.run(story())


def test_a_question_goes_on_at_the_next_node_while_a_scheduler_is_elected() -> None:
    async def story() -> None:
        fake = FakeCluster(2)
        errors = [NotLeader("n2"), NoQuorum("an election is under way"), Unavailable("n2 is gone")]
        fake.world.trouble = lambda node, method: errors.pop() if errors else None
        async with await fake.connect() as cluster:
            assert await cluster.ls() == []
            assert not cluster.session.changed
        assert len({node for node, _, _ in fake.world.requests}) == 2

    asyncio.run(story())


def test_an_error_that_asking_again_cannot_help_is_raised_at_once() -> None:
    async def story() -> None:
        fake = FakeCluster()
        fake.world.trouble = lambda node, method: Conflict("version 3 is there, not 2")
        async with await fake.connect() as cluster:
            with pytest.raises(Conflict):
                await cluster.session.call(DELETE, Delete("a", "r1"), timeout_s=5)
        assert len(fake.world.requests) == 1

    asyncio.run(story())


def test_a_change_whose_answer_was_lost_is_sent_again_under_the_same_id() -> None:
    async def story() -> None:
        fake = FakeCluster()
        fake.world.lost = {"n1", "n2"}
        async with await fake.connect() as cluster:
            answer = await cluster.session.call(PUT_SMALL, PutSmallFile("p1", "a"), timeout_s=5, body=b"x")
            assert cluster.session.changed
        assert answer.name == "a"
        assert [request.put for request in fake.world.asked("file.put-small")] == ["p1"] * 3

    asyncio.run(story())


@pytest.mark.parametrize(
    ("method", "request_"),
    [(PUT_SMALL, PutSmallFile("p1", "a")), (RETAIN, Retain("a/", "r1", versions=2))],  # readers may call the second
)
def test_giving_up_after_an_unconfirmed_attempt_says_that_it_may_have_happened(
    method: Method[Any, Any], request_: Any
) -> None:
    async def story() -> None:
        fake = FakeCluster()
        fake.world.lost = {"n1", "n2"}
        fake.world.trouble = lambda node, name: None if fake.world.lost else NoQuorum("2 of 5 nodes answer")
        async with await fake.connect() as cluster:
            with pytest.raises(
                DeadlineExceeded, match=rf"{method.name} was sent, no answer within 0.5 s \(2 of 5"
            ) as told:
                await cluster.session.call(method, request_, timeout_s=0.5)
            assert told.value.may_have_happened
            assert cluster.session.changed

    asyncio.run(story())


def test_giving_up_when_nothing_was_ever_sent_is_certain() -> None:
    async def story() -> None:
        fake = FakeCluster()
        fake.world.trouble = lambda node, method: NoQuorum("2 of 5 nodes answer")
        async with await fake.connect() as cluster:
            with pytest.raises(NoQuorum, match="2 of 5"):
                await cluster.session.call(DELETE, Delete("a", "r1"), timeout_s=0.4)

    asyncio.run(story())


def test_all_nodes_dying_later_is_waited_out_until_the_deadline() -> None:
    async def story() -> None:
        fake = FakeCluster()
        async with await fake.connect() as cluster:
            await cluster.ls()
            fake.world.down = {"n1", "n2"}
            await cluster.session.close()
            loop = asyncio.get_running_loop()
            loop.call_later(0.2, fake.world.down.clear)
            assert (await cluster.session.call(LIST, List(), timeout_s=5)).files == []

    asyncio.run(story())


@pytest.mark.parametrize("lost", [False, True])
def test_nodes_that_refuse_for_long_are_not_waited_for_to_the_end(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    monkeypatch.setattr(session, "PATIENCE_S", 0.3)

    async def story() -> None:
        fake = FakeCluster()
        async with await fake.connect() as cluster:
            refusal = Unavailable("cannot reach it: Connection refused")
            refusal.__cause__ = ConnectionRefusedError()

            def die(node: str, method: str) -> IdunnoError:
                fake.world.closed = {"n1": refusal, "n2": refusal}
                cluster.session._links.clear()
                return ConnectionLost("the connection broke") if lost else Unavailable("the node stops")

            fake.world.trouble = die
            told = DeadlineExceeded if lost else Unavailable
            async with asyncio.timeout(20):
                with pytest.raises(told, match=r"none of its 2 nodes answers for .*run `idunno up --dir /fake`"):
                    await cluster.put(io.BytesIO(b"x"), "a")

    asyncio.run(story())


def test_nodes_that_are_silent_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PATIENCE_S", 0.1)

    async def story() -> None:
        fake = FakeCluster()
        async with await fake.connect() as cluster:
            await cluster.session.close()
            fake.world.down = {"n1", "n2"}  # no ConnectionRefusedError behind it
            asyncio.get_running_loop().call_later(0.8, fake.world.down.clear)
            assert (await cluster.session.call(LIST, List(), timeout_s=5)).files == []

    asyncio.run(story())


def test_a_stream_finds_a_living_connection_and_leaves_a_node_that_failed_it() -> None:
    async def story() -> None:
        fake = FakeCluster()
        content = bytes(range(256)) * 64  # larger than a small file: it is read by a stream
        fake.world.put("big", content)
        fake.world.trouble = lambda node, method: (
            Unavailable("its disk is gone") if method == "block.read" and node == "n1" else None
        )
        async with await fake.connect() as cluster:
            target = io.BytesIO()
            await cluster.get("big", target)
            assert target.getvalue() == content

    asyncio.run(story())


def test_a_request_without_an_id_is_not_repeated() -> None:
    async def story() -> None:
        fake = FakeCluster()
        fake.world.trouble = lambda node, method: NoQuorum("no leader")
        async with await fake.connect() as cluster:
            with pytest.raises(NoQuorum):
                await cluster.session.call(BEGIN, Begin("", "a"), timeout_s=5)
        assert len(fake.world.requests) == 1

    asyncio.run(story())


def test_what_is_not_found_is_said_by_the_node_not_by_the_session() -> None:
    async def story() -> None:
        async with await FakeCluster().connect() as cluster:
            with pytest.raises(NotFound, match="no file gone"):
                await cluster.versions("gone")

    asyncio.run(story())


@pytest.mark.parametrize(
    "then", [Exhausted("1024 requests are under way"), Unauthenticated("was revoked"), NotFound("no file a")]
)
def test_a_refusal_after_a_lost_answer_does_not_say_that_nothing_happened(then: IdunnoError) -> None:
    async def story() -> None:
        fake = FakeCluster()
        errors = [then, ConnectionLost("the connection broke")]
        fake.world.trouble = lambda node, method: errors.pop()
        async with await fake.connect() as cluster:
            with pytest.raises(DeadlineExceeded, match=str(then)):
                await cluster.session.call(DELETE, Delete("a", "r1"), timeout_s=5)

    asyncio.run(story())


@pytest.mark.parametrize("refusal", [Exhausted("node n1 has 1024 connections"), Unauthenticated("n1 knows nobody")])
def test_a_door_that_lets_nobody_in_is_passed_over_but_all_of_them_say_why(refusal: IdunnoError) -> None:
    async def story() -> None:
        fake = FakeCluster(3)
        fake.world.closed = {"n1": refusal, "n2": refusal}
        async with await fake.connect() as cluster:
            assert await cluster.ls() == []
        fake.world.closed["n3"] = Unavailable("n3 is down")
        with pytest.raises(type(refusal), match=str(refusal)):
            await fake.connect()

    asyncio.run(story())

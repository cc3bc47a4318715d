# Streams: items both ways, a slow reader bounds the sender, and every end reaches the other side.
from __future__ import annotations

import asyncio
import contextlib

import pytest

from idunno.base.errors import (
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    Exhausted,
    NotFound,
    PermissionDenied,
)
from idunno.wire.calls import BODY_BYTES_MAX, HEADER_BYTES_MAX, STREAM_CREDIT_BYTES, Empty, Item
from idunno.wire.handling import HELD_BYTES_MAX
from idunno.wire.streams import Inbox, Outbox, cost
from tests.unit.wire.support import ECHO, FLOOD, HANG, LOOPS, MISSING, NODES_ONLY, REPEAT, UNREAD, Text, run, until
from tests.unit.wire.test_calls import WAYS, calling


@WAYS
def test_items_travel_both_ways_in_order_and_the_answer_comes_last(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _), caller.open(REPEAT, Text(), timeout_s=20) as stream:
            sent = [(bytes([i % 256]) * (i * 997 % BODY_BYTES_MAX), str(i).encode()) for i in range(200)]

            async def send() -> None:
                for body, note in sent:
                    await stream.send(body, note)
                await stream.end()

            sending = asyncio.create_task(send())
            got: list[tuple[bytes, bytes]] = []
            while (item := await stream.receive()) is not None:
                got.append((bytes(item.body), item.note))
            await sending
            assert got == sent
            assert (await stream.answer()).text == str(sum(len(body) for body, _ in sent))
            assert await stream.receive() is None

    run(loop, main)


@WAYS
def test_a_slow_reader_holds_the_sender_and_memory_is_bounded(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, story), caller.open(FLOOD, Text("1600"), timeout_s=20) as stream:
            taken = 0
            while (item := await stream.receive()) is not None:
                taken += len(item.body)
                for _ in range(20):  # more than enough turns for the sender to run ahead
                    await asyncio.sleep(0)
                assert story.sent - taken <= STREAM_CREDIT_BYTES
                if taken == 20 * 64 * 1024:  # a longer pause
                    await until(lambda: story.sent - 20 * 64 * 1024 > STREAM_CREDIT_BYTES - 700_000)
            assert taken == 1600 * 64 * 1024
            assert await stream.answer() == Text("done")

    run(loop, main)


@WAYS
def test_the_answer_can_be_had_without_reading_the_items(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, story):
            async with caller.open(FLOOD, Text("300"), timeout_s=20) as stream:
                assert await stream.answer() == Text("done")
            assert await caller.call(FLOOD, Text("300"), timeout_s=20) == Text("done")
            assert story.sent == 600 * 64 * 1024

    run(loop, main)


@WAYS
def test_leaving_early_cancels_the_handler(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, story):
            async with caller.open(FLOOD, Text("100000"), timeout_s=20) as stream:
                assert await stream.receive() is not None
            await until(lambda: story.cancelled == 1)
            assert story.sent < 2 * STREAM_CREDIT_BYTES

    run(loop, main)


@WAYS
def test_a_handler_that_answers_early_does_not_block_the_sender(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _), caller.open(UNREAD, Empty(), timeout_s=20) as stream:
            for _ in range(100):
                await stream.send(bytes(BODY_BYTES_MAX))
            await stream.end()
            assert (await stream.answer()).text == "not a word of it"

    run(loop, main)


@WAYS
def test_what_the_handler_raises_ends_every_side_of_the_stream(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, _), caller.open(MISSING, Text("cat"), timeout_s=20) as stream:
            with pytest.raises(NotFound):
                await stream.receive()
            with pytest.raises(NotFound):
                await stream.answer()
            with pytest.raises(NotFound):
                await stream.send(b"x")
        async with calling(way) as (caller, _, _):
            with pytest.raises(PermissionDenied):
                async with caller.open(NODES_ONLY, Empty(), timeout_s=20) as refused:
                    await refused.answer()

    run(loop, main)


@WAYS
def test_a_streams_deadline_wakes_whoever_waits(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, _, story):
            async with caller.open(HANG, Empty(), timeout_s=0.1) as stream:

                async def send_for_ever() -> None:
                    while True:
                        await stream.send(bytes(BODY_BYTES_MAX))  # HANG takes nothing: credit runs out

                with pytest.raises(DeadlineExceeded):
                    await send_for_ever()
                with pytest.raises(DeadlineExceeded):
                    await stream.receive()
                with pytest.raises(DeadlineExceeded):
                    await stream.answer()
            await until(lambda: story.cancelled == 1)
            assert await caller.call(ECHO, Text("fine"), timeout_s=5) == Text("fine")

    run(loop, main)


def test_an_item_without_credit_and_credit_out_of_nothing_break_the_protocol() -> None:
    async def main() -> None:
        inbox = Inbox(lambda _: None)
        largest = b"b" * BODY_BYTES_MAX
        for _ in range(STREAM_CREDIT_BYTES // cost(b"", largest)):
            inbox.put(b"", largest)
        with pytest.raises(DecodeError, match="without credit"):
            inbox.put(b"", largest)
        ended = Inbox(lambda _: None)
        ended.end()
        with pytest.raises(DecodeError, match="after the end"):
            ended.put(b"", b"")
        for size in (1, -1):
            with pytest.raises(DecodeError, match="credit"):
                Outbox().grant(size)

    run("asyncio", main)


def test_the_largest_item_always_gets_its_credit_in_the_end() -> None:
    async def main() -> None:
        outbox = Outbox()
        inbox = Inbox(outbox.grant)
        note, body = b"n" * HEADER_BYTES_MAX, b"b" * BODY_BYTES_MAX
        for _ in range(10):
            for small in (100_000, 1, 7_777):  # leave the window in odd states
                assert await outbox.reserve(cost(b"", bytes(small)))
                inbox.put(b"", bytes(small))
                assert await inbox.receive() == Item(b"", bytes(small))
            assert await outbox.reserve(cost(note, body))
            inbox.put(note, body)
            assert await inbox.receive() == Item(note, body)

    run("asyncio", main)


@WAYS
def test_a_long_stream_leaves_nothing_held(loop: str, way: str) -> None:
    async def main() -> None:
        async with calling(way) as (caller, server, _):
            async with caller.open(REPEAT, Text(), timeout_s=20) as stream:

                async def send() -> None:
                    for _ in range(HELD_BYTES_MAX // BODY_BYTES_MAX + 20):  # more in all than may be held at once
                        await stream.send(bytes(BODY_BYTES_MAX))
                    await stream.end()

                sending = asyncio.create_task(send())
                while await stream.receive() is not None:
                    pass
                await sending
                await stream.answer()
            served = [door.serving for door in server._doors if door.serving is not None] + server._local
            await until(lambda: [one.held for one in served] == [0])

    run(loop, main)


def test_streams_that_all_stand_still_are_refused_at_the_bound_of_their_connection() -> None:
    items = STREAM_CREDIT_BYTES // cost(b"", bytes(BODY_BYTES_MAX))
    count = HELD_BYTES_MAX // (items * BODY_BYTES_MAX) + 5

    async def main() -> None:
        async with calling("unix") as (caller, server, story), contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(caller.open(HANG, Empty(), timeout_s=20)) for _ in range(count)]
            for stream in streams:
                with contextlib.suppress(Exhausted):
                    for _ in range(items):
                        await stream.send(bytes(BODY_BYTES_MAX))
            served = next(iter(server._doors)).serving
            assert served is not None
            await until(lambda: story.cancelled > 0)
            assert served.held <= HELD_BYTES_MAX
            assert story.started == count
            assert await caller.call(ECHO, Text("x"), timeout_s=5) == Text("x")

    run("asyncio", main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stream_that_is_cut_while_it_waits_to_send_may_have_happened(loop: str) -> None:
    async def main() -> None:
        async with calling("unix") as (caller, _, _), caller.open(REPEAT, Text(), timeout_s=5) as stream:
            link = caller._link
            assert link is not None
            await stream.send(b"first")
            link.pause_writing()  # type: ignore[attr-defined]
            sending = asyncio.create_task(stream.send(b"second"))
            await asyncio.sleep(0)
            link.abort()  # type: ignore[attr-defined]
            with pytest.raises(ConnectionLost):
                await sending

    run(loop, main)

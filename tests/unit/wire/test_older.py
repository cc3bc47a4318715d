# A peer of an earlier release, whose greeting does not say how much it takes: it gets no more than it takes.
from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from idunno.base.errors import DecodeError
from idunno.wire.calls import BODY_BYTES_ASSUMED, BODY_BYTES_MAX, Empty, Method, Role
from idunno.wire.codec import Greeting, decode, encode
from idunno.wire.frames import Frame, FrameDecoder, Kind, encode_frame
from idunno.wire.rpc import connect_unix
from idunno.wire.streams import parts

TAKE = Method("test.take", Empty, Empty, Role.ANYONE)


def test_an_older_node_gets_a_large_item_in_parts(tmp_path: Path) -> None:
    got: list[bytes] = []

    async def older(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_frame(Frame(Kind.NOTIFY, 0, encode({"name": "n1", "wire": 1}))))
        decoder = FrameDecoder(body_bytes_max=BODY_BYTES_ASSUMED)
        while data := await reader.read(len(decoder.buffer())):
            decoder.buffer()[: len(data)] = data
            decoder.received(len(data))
            while (frame := decoder.next()) is not None:
                if frame.kind is Kind.ITEM:
                    got.append(bytes(frame.body))
                elif frame.kind is Kind.END:
                    writer.write(encode_frame(Frame(Kind.ANSWER, frame.request, encode(Empty()))))
        writer.close()

    async def work() -> None:
        path = str(tmp_path / "older.sock")
        async with await asyncio.start_unix_server(older, path):
            connection = await connect_unix(path, timeout_s=5.0)
            async with connection.open(TAKE, Empty(), timeout_s=5.0) as stream:
                await stream.send(bytes(BODY_BYTES_MAX), b"note")
                await stream.send(b"end")
                await stream.end()
                await stream.answer()
            await connection.close()

    asyncio.run(work())
    assert [len(part) for part in got] == [BODY_BYTES_ASSUMED] * (BODY_BYTES_MAX // BODY_BYTES_ASSUMED) + [3]


@pytest.mark.parametrize("said", [-1, 0, 1, BODY_BYTES_MAX * 1000])
def test_a_greeting_that_says_nonsense_makes_items_neither_tiny_nor_too_large(said: int) -> None:
    greeting = decode(encode({"name": "n1", "wire": 1, "body_bytes_max": said}), Greeting)
    assert BODY_BYTES_ASSUMED <= greeting.takes_bytes() <= BODY_BYTES_MAX
    with pytest.raises(DecodeError):
        decode(encode({"body_bytes_max": "much"}), Greeting)


def test_an_empty_item_is_one_part() -> None:
    assert parts(b"", 10) == [b""]
    assert parts(b"0123456789", 10) == [b"0123456789"]
    assert parts(b"0123456789a", 10) == [b"0123456789", b"a"]

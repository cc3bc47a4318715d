# Rooms: memory is lent again when nobody has a view of it any more, never before, and there is a bound to what is kept.
from __future__ import annotations

import mmap
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest

from idunno.wire import rooms
from idunno.wire.calls import BODY_BYTES_MAX
from idunno.wire.frames import FrameDecoder, Kind, frame_head
from idunno.wire.rooms import ROOM_BYTES, ROOMS_MAX, room


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> deque[mmap.mmap]:
    """The rooms of this test alone."""
    held = deque[mmap.mmap]()
    monkeypatch.setattr(rooms, "_rooms", held)
    return held


def test_a_room_is_lent_again_once_its_last_view_is_gone(kept: deque[mmap.mmap]) -> None:
    first = room(ROOM_BYTES)
    first[:3] = b"abc"
    part = first.toreadonly()[:2]
    assert room(ROOM_BYTES).obj is not first.obj
    held = first.obj
    del first
    assert all(room(ROOM_BYTES).obj is not held for _ in range(3))
    assert bytes(part) == b"ab"
    del part
    assert any(room(ROOM_BYTES - 1).obj is held for _ in range(3))
    assert len(kept) == 2


def test_a_connection_that_ends_in_the_middle_of_a_frame_gives_its_room_back(kept: deque[mmap.mmap]) -> None:
    decoder = FrameDecoder()
    begun = frame_head(Kind.ITEM, 1, 0, ROOM_BYTES - 100) + bytes(100)
    decoder.buffer()[: len(begun)] = begun
    decoder.received(len(begun))
    assert decoder.next() is None
    assert room(ROOM_BYTES).obj is not kept[0]
    decoder.drop()
    for _ in range(4):
        room(ROOM_BYTES)
    assert len(kept) == 2


def test_what_is_kept_is_bounded_and_what_is_small_does_not_take_a_room(kept: deque[mmap.mmap]) -> None:
    lent = [room(ROOM_BYTES) for _ in range(ROOMS_MAX + 3)]
    assert len(kept) == ROOMS_MAX
    assert len({id(view.obj) for view in lent}) == len(lent)
    lent.clear()
    small = room(ROOM_BYTES // 2)
    assert isinstance(small.obj, bytearray)
    assert len(small) == ROOM_BYTES // 2
    assert isinstance(room(ROOM_BYTES + 1).obj, bytearray)


def test_a_frame_keeps_its_bytes_while_others_come_and_go() -> None:
    def send(decoder: FrameDecoder, filling: bytes) -> memoryview:
        head = frame_head(Kind.ITEM, 1, 0, BODY_BYTES_MAX)
        decoder.buffer()[: len(head)] = head
        decoder.received(len(head))
        assert decoder.next() is None
        decoder.buffer()[:] = filling * BODY_BYTES_MAX
        decoder.received(BODY_BYTES_MAX)
        frame = decoder.next()
        assert frame is not None
        assert isinstance(frame.body, memoryview)
        assert frame.body.readonly
        return frame.body

    one, two = FrameDecoder(), FrameDecoder()
    kept = send(one, b"k")
    again = [id(send(decoder, b"x").obj) for decoder in (one, two) * 5]
    assert len(set(again)) == 1
    assert again[0] != id(kept.obj)
    assert kept == b"k" * BODY_BYTES_MAX


def test_threads_that_ask_at_once_get_different_rooms() -> None:
    def ask(number: int) -> bool:
        view = room(ROOM_BYTES)
        mine = number.to_bytes(8, "big")
        for at in range(0, ROOM_BYTES, 64 * 1024):
            view[at : at + 8] = mine
        return all(view[at : at + 8] == mine for at in range(0, ROOM_BYTES, 64 * 1024))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(2_000)))

# Frames: whatever arrives, however it is cut, is a frame or one clear error, and never more memory than allowed.
from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.errors import DecodeError
from idunno.wire.calls import BODY_BYTES_MAX, HEADER_BYTES_MAX
from idunno.wire.frames import HEAD_BYTES, RECEIVE_BYTES, Frame, FrameDecoder, Kind, encode_frame, frozen


def feed(decoder: FrameDecoder, data: bytes) -> list[Frame]:
    """Give `data` to the decoder as a socket would, and take every frame."""
    frames: list[Frame] = []
    while data:
        room = decoder.buffer()
        assert len(room) > 0
        count = min(len(room), len(data))
        room[:count] = data[:count]
        data = data[count:]
        decoder.received(count)
        while (frame := decoder.next()) is not None:
            frames.append(Frame(frame.kind, frame.request, frame.header, bytes(frame.body)))
    return frames


SIZES = st.sampled_from([0, 1, 15, 16, 17, 8_175, 8_176, 8_177, RECEIVE_BYTES - 16, RECEIVE_BYTES, RECEIVE_BYTES + 1])
FRAMES = st.builds(
    lambda kind, request, header, body: Frame(kind, request, b"h" * header, b"b" * body),
    st.sampled_from(Kind),
    st.integers(0, 2**32 - 1),
    SIZES,
    st.one_of(SIZES, st.sampled_from([100_000, BODY_BYTES_MAX])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(FRAMES, max_size=4), st.lists(st.integers(1, 70_000), max_size=12))
def test_frames_arrive_as_they_were_sent_however_the_bytes_are_cut(frames: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(frame) for frame in frames)
    decoder, got = FrameDecoder(), list[Frame]()
    for cut in cuts:
        got += feed(decoder, stream[:cut])
        stream = stream[cut:]
    got += feed(decoder, stream)
    assert got == frames


def test_one_byte_at_a_time_is_enough() -> None:
    frames = [Frame(Kind.REQUEST, 7, b"abc", b"x" * 300), Frame(Kind.CANCEL, 7), Frame(Kind.ITEM, 8, b"", b"y" * 9_000)]
    decoder, got = FrameDecoder(), list[Frame]()
    for byte in b"".join(encode_frame(frame) for frame in frames):
        got += feed(decoder, bytes([byte]))
    assert got == frames


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 40))
def test_any_bytes_give_frames_or_a_decode_error(garbage: bytes, good: int) -> None:
    decoder = FrameDecoder()
    start = encode_frame(Frame(Kind.NOTIFY, 1, b"h", b"b"))[:good]  # so that the fields behind the magic are tried too
    try:
        feed(decoder, start + garbage)
    except DecodeError:
        with pytest.raises(DecodeError):
            decoder.next()  # it stays failed


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (struct.pack(">2sBBIII", b"GE", 1, 1, 1, 0, 0), "no idunno"),
        (struct.pack(">2sBBIII", b"iD", 2, 1, 1, 0, 0), "version 2"),
        (struct.pack(">2sBBIII", b"iD", 1, 9, 1, 0, 0), "kind 9"),
        (struct.pack(">2sBBIII", b"iD", 1, 0, 1, 0, 0), "kind 0"),
        (struct.pack(">2sBBIII", b"iD", 1, 1, 1, HEADER_BYTES_MAX + 1, 0), "at most"),
        (struct.pack(">2sBBIII", b"iD", 1, 1, 1, 0, BODY_BYTES_MAX + 1), "at most"),
        (struct.pack(">2sBBIII", b"iD", 1, 1, 1, 2**32 - 1, 2**32 - 1), "at most"),
    ],
)
def test_a_bad_head_is_refused_before_its_content_is_awaited(head: bytes, says: str) -> None:
    assert len(head) == HEAD_BYTES
    with pytest.raises(DecodeError, match=says):
        feed(FrameDecoder(), head)


def test_the_largest_frame_is_taken_and_read_in_place() -> None:
    decoder = FrameDecoder()
    largest = Frame(Kind.ITEM, 1, b"h" * HEADER_BYTES_MAX, b"b" * BODY_BYTES_MAX)
    stream = encode_frame(largest)
    assert feed(decoder, stream[:-1]) == []
    assert len(decoder.buffer()) == 1  # the rest goes straight to its place
    assert feed(decoder, stream[-1:]) == [largest]


def test_a_received_view_cannot_be_written_to() -> None:
    decoder = FrameDecoder()
    data = encode_frame(Frame(Kind.ITEM, 1, b"", b"b" * 100_000))
    while data:
        room = decoder.buffer()
        count = min(len(room), len(data))
        room[:count], data = data[:count], data[count:]
        decoder.received(count)
        frame = decoder.next()
    assert frame is not None
    assert isinstance(frame.body, memoryview)
    assert frame.body.readonly


def test_what_may_change_is_copied_and_what_may_not_is_not() -> None:
    fixed, changing = b"abcd", bytearray(b"abcd")
    assert frozen(fixed) is fixed
    view = frozen(memoryview(fixed))
    assert isinstance(view, memoryview)
    assert view.obj is fixed
    for copied in (frozen(changing), frozen(memoryview(changing))):
        changing[0:1] = b"X"
        assert copied == b"abcd"
        changing[0:1] = b"a"
    assert len(frozen(memoryview(fixed).cast("H"))) == 4  # lengths are bytes, whatever the view counts in

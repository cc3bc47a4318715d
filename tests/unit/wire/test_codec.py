# Codec: any bytes are a message or a DecodeError; errors keep their class.
from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.errors import BY_CODE, DecodeError, InternalError, NotFound
from idunno.coordinator.messages import EnrollAnswer, Proposed, StatusAnswer
from idunno.scheduler.messages import PollAnswer
from idunno.sdfs.messages import BeginAnswer
from idunno.wire.calls import Role
from idunno.wire.codec import (
    ErrorHead,
    Greeting,
    RequestHead,
    decode,
    decode_error,
    encode,
    encode_error,
    encode_request,
)

KINDS: list[type[Any]] = [
    RequestHead, ErrorHead, Greeting, Proposed, EnrollAnswer, StatusAnswer, BeginAnswer, PollAnswer, int
]  # fmt: skip

SIMPLE = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary(max_size=40)
)
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=9), inner, max_size=5)),
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(KINDS))
def test_any_bytes_give_a_message_or_a_decode_error(data: bytes, kind: type[Any]) -> None:
    with contextlib.suppress(DecodeError):
        assert isinstance(decode(data, kind), kind)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.sampled_from(KINDS))
def test_any_messagepack_gives_a_message_or_a_decode_error(value: Any, kind: type[Any]) -> None:
    with contextlib.suppress(DecodeError):
        assert isinstance(decode(encode(value), kind), kind)


@pytest.mark.parametrize("deep", [b"\x91" * 100_000, b"\x81\xa1x" * 100_000, b"\xdd\xff\xff\xff\xff" * 10])
def test_nesting_and_huge_counts_are_refused(deep: bytes) -> None:
    for kind in (Proposed, RequestHead):
        with pytest.raises(DecodeError):
            decode(b"\x82\xa5index\x01\xa6copies\x01\xa6result" + deep, kind)
        with pytest.raises(DecodeError):
            decode(b"\x93\xa1m\x01" + deep, kind)


def test_unknown_fields_of_a_newer_peer_are_ignored() -> None:
    assert decode(encode({"name": "n1", "wire": 1, "colour": "blue"}), Greeting) == Greeting("n1", 1)
    newer = encode(["m", 5, {}, False, ["ann", "user"], "something new"])
    assert decode(newer, RequestHead).actor == ("ann", Role.USER)


def test_a_request_is_written_in_its_place_in_the_head() -> None:
    greeting = Greeting("n1")
    for request in (greeting, msgspec.Raw(encode(greeting))):
        head = RequestHead("m", 5, msgspec.Raw(encode(greeting)), True, ("ann", Role.USER))
        assert encode_request("m", 5, request, True, ("ann", Role.USER)) == encode(head)
        assert decode(decode(encode_request("m", 5, request), RequestHead).request, Greeting) == greeting


@pytest.mark.parametrize("left_ms", [-1, 8 * 24 * 3600 * 1000, 1.5])
def test_a_deadline_out_of_bounds_is_refused(left_ms: object) -> None:
    with pytest.raises(DecodeError):
        decode(encode(["m", left_ms, {}]), RequestHead)


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_an_error_arrives_as_the_class_that_was_raised(code: str) -> None:
    error = decode_error(encode_error(BY_CODE[code]("what, 3 of 4, do this")))
    assert (type(error), str(error)) == (BY_CODE[code], "what, 3 of 4, do this")


def test_an_error_of_a_newer_peer_keeps_its_name_and_no_error_is_too_long_to_send() -> None:
    newer = decode_error(msgspec.msgpack.encode(["quota-exceeded", "too much"]))
    assert (type(newer), str(newer)) == (InternalError, "quota-exceeded: too much")
    assert len(encode_error(NotFound("\udc80" * 100_000))) < 5_000

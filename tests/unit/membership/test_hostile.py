# tests/unit/membership/test_hostile.py: whatever a packet holds, it decodes or is refused, and the core stays within its bounds.
from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.errors import DecodeError
from idunno.membership.config import SwimConfig
from idunno.membership.events import (
    Announce,
    Doubt,
    Forget,
    Input,
    NotExchanged,
    Received,
    Seeds,
    Self,
    Send,
    TcpProbed,
    Tick,
)
from idunno.membership.messages import (
    LIST_BYTES_MAX,
    LIST_MAX,
    NUMBER_MAX,
    Ack,
    Gossip,
    Message,
    Ping,
    PingReq,
    Relayed,
    Rumor,
    State,
    WholeList,
    decode,
    decode_list,
    encode,
)
from idunno.membership.records import mark_of
from idunno.membership.states import STEP_MAX
from idunno.membership.swim import LISTED_MAX, Swim
from idunno.wire.sealed import PAYLOAD_BYTES_MAX
from tests.unit.membership.lone import ORDER, address, rumor
from tests.unit.membership.net import node_id, seed_of

names = st.integers(1, 30).map(lambda number: f"n{number}")
numbers = st.one_of(st.integers(0, 5), st.integers(0, NUMBER_MAX - 1))
rumors = st.lists(
    st.builds(
        Rumor,
        st.integers(1, 30).map(node_id),
        numbers,
        numbers,
        st.sampled_from(ORDER),
        names,
        st.integers(1, 30).map(address),
        st.lists(st.integers(1, 30).map(node_id), max_size=2).map(tuple),
    ),
    max_size=5,
).map(tuple)
messages = st.one_of(
    st.builds(Ping, numbers, names, st.integers(1, 30).map(address), numbers, st.booleans(), rumors),
    st.builds(Ack, numbers, names, st.integers(1, 30).map(address), numbers, rumors, numbers, numbers),
    st.builds(PingReq, numbers, st.integers(1, 30).map(node_id), names, st.integers(1, 30).map(address)),
    st.builds(
        Relayed,
        numbers,
        st.integers(1, 30).map(node_id),
        names,
        st.integers(1, 30).map(address),
        numbers,
        st.booleans(),
    ),
    st.builds(Gossip, names, st.integers(1, 30).map(address), numbers, rumors),
)
lists = st.builds(WholeList, names, st.integers(1, 30).map(address), numbers, numbers, rumors)
events = st.one_of(
    st.builds(Received, st.integers(1, 30).map(node_id), numbers, st.integers(1, 30).map(address), messages),
    st.just(Tick()),
    st.builds(Doubt, st.integers(1, 30).map(node_id)),
    st.builds(NotExchanged, st.integers(1, 30).map(node_id)),
    st.builds(TcpProbed, st.integers(1, 30).map(node_id), numbers),
    st.builds(Received, st.integers(1, 30).map(node_id), numbers, st.integers(1, 30).map(address), lists),
    st.lists(st.integers(1, 30).map(seed_of), max_size=3).map(lambda seeds: Seeds(tuple(seeds))),
    st.builds(Forget, st.integers(1, 30).map(node_id)),
    st.builds(Announce, st.sampled_from([State.STOPPED, State.LEFT])),
)


@pytest.mark.parametrize("read", [decode, decode_list])
@given(payload=st.binary(max_size=1_500))
def test_arbitrary_bytes_are_a_message_or_a_list_or_a_decode_error(
    read: Callable[[bytes], Message | WholeList], payload: bytes
) -> None:
    try:
        found = read(payload)
    except DecodeError:
        return
    assert read(encode(found)) == found


def test_lists_survive_the_wire_within_their_bounds() -> None:
    whole = WholeList("n1", address(1), 3, 4, tuple(rumor(number, State.ACTIVE) for number in range(2_000)))
    assert decode_list(encode(whole)) == whole
    with pytest.raises(DecodeError):
        decode_list(encode(WholeList("n1", address(1), 3, 4, (rumor(2, State.ACTIVE),) * (LIST_MAX + 1))))
    with pytest.raises(DecodeError):
        decode_list(bytes(LIST_BYTES_MAX + 1))


@given(messages)
def test_every_message_survives_the_wire(message: Message) -> None:
    if len(encode(message)) <= PAYLOAD_BYTES_MAX:
        assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "payload",
    [
        encode(Gossip("n1", address(1))) + b"\x00",
        encode(Gossip("", address(1))),
        encode(Gossip("n\x1b[2J", address(1))),
        encode(Gossip("n1", "h" * 129)),
        encode(Gossip("n1", address(1), -1)),
        encode(Gossip("n1", address(1), NUMBER_MAX)),
        encode(Gossip("n1", address(1), 0, (rumor(1, State.ACTIVE),) * 33)),
        encode(Gossip("n1", address(1), 0, (rumor(1, State.ACTIVE, accusers=(1, 2, 3, 4)),))),
        encode(Gossip("n1", address(1))).replace(b"\xa1g", b"\xa1x"),
        b"\x91" * 1_300,
    ],
)
def test_what_is_out_of_bounds_does_not_decode(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(payload)


def test_a_state_nobody_may_speak_of_does_not_decode() -> None:
    with pytest.raises(ValueError):
        rumor(2, State.DELETED)
    good = encode(Gossip("n1", address(1), 0, (rumor(2, State.FAILED),)))
    assert decode(good)
    with pytest.raises(DecodeError):
        decode(good.replace(b"\xa6failed", b"\xa7deleted"))


def test_a_newer_versions_fields_are_ignored() -> None:
    plain = encode(Gossip("n1", address(1)))
    assert decode(bytes([plain[0] + 1]) + plain[1:] + b"\xa3new\x07") == Gossip("n1", address(1))


def whole_digest(core: Swim) -> int:
    """What the digest must be, worked out from the whole list."""
    digest = mark_of(core.me.node, (core.me.boot, core.incarnation), State.ACTIVE)
    for member in core.members.values():
        digest ^= mark_of(member.node, member.version, member.state)
    return digest


@settings(max_examples=300)
@given(st.lists(st.tuples(st.one_of(st.integers(0, 400), st.integers(0, 5_000)), events), max_size=40))
def test_no_sequence_of_events_raises_or_grows_beyond_the_bounds(story: list[tuple[int, Input]]) -> None:
    core = Swim(Self(node_id(1), "n1", address(1), 1), SwimConfig(members_max=8), random.Random(1))
    now_ms = 0
    for after_ms, event in story:
        now_ms += after_ms
        for output in core.handle(event, now_ms):
            if isinstance(output, Send):
                assert len(encode(output.message)) <= PAYLOAD_BYTES_MAX
        assert len(core.members) <= 8
        assert len(core.view()) == len(core.members) + 1
        book, known = core.book, core.members.keys()
        assert len(book.news) <= 9
        assert core._prober.open.keys() | core._farewell.told.keys() | book.unknown.keys() <= known
        assert len(book.alive) + len(book.away) <= 8
        assert len(core._listed) <= LISTED_MAX
        assert len(book._deadlines) <= 2 * 8 + 64
        assert book.digest == whole_digest(core)
        assert core.incarnation <= STEP_MAX * len(story) * 5 + 1
        due = core.due_ms()
        assert due is None or due <= now_ms + 5_000  # and it never waits for more than it may

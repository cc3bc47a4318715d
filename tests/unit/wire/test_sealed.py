# Sealed datagrams: what a member sealed opens once; nothing else opens at all.
from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idunno.base.errors import DecodeError, InvalidArgument
from idunno.base.ids import NodeId
from idunno.wire.sealed import (
    DATAGRAM_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    SENDERS_MAX,
    VERSION,
    WINDOW,
    Opener,
    Sealer,
    _mark,
)

ME = NodeId("0123456789abcdef")
OLD, NEW = b"k" * 32, b"n" * 32


def sealer(boot: int = 1, salt: int = 0, me: NodeId = ME, keys: tuple[bytes, ...] = (OLD,)) -> Sealer:
    return Sealer(keys, me, boot, bytes([salt]) * 16)


@pytest.mark.parametrize("payload", [b"", b"x", b"p" * PAYLOAD_BYTES_MAX])
def test_what_a_member_sealed_opens_with_its_name_and_boot(payload: bytes) -> None:
    datagram = sealer(boot=7).seal(payload)
    assert len(datagram) <= DATAGRAM_BYTES_MAX
    assert Opener([OLD]).open(datagram) == (ME, 7, payload)
    assert payload not in datagram or len(payload) < 2


def test_too_large_a_payload_and_a_senseless_sender_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=str(PAYLOAD_BYTES_MAX)):
        sealer().seal(b"p" * (PAYLOAD_BYTES_MAX + 1))
    for me, boot, salt in (("n1", 1, bytes(16)), (ME, -1, bytes(16)), (ME, 2**32, bytes(16)), (ME, 1, b"short")):
        with pytest.raises(InvalidArgument):
            Sealer([OLD], NodeId(me), boot, salt)
    for keys in ([], [b"short"]):
        with pytest.raises(InvalidArgument):
            Opener(keys)


def test_every_single_flipped_bit_is_noticed() -> None:
    datagram = sealer().seal(b"payload")
    opener = Opener([OLD])
    for bit in range(len(datagram) * 8):
        tampered = bytearray(datagram)
        tampered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DecodeError):
            opener.open(bytes(tampered))
    assert opener.open(datagram)[2] == b"payload"  # and tampering changed nothing here


def test_a_datagram_opens_once() -> None:
    opener, sender = Opener([OLD]), sealer()
    first, second = sender.seal(b"1"), sender.seal(b"2")
    for datagram in (first, second):
        opener.open(datagram)
        with pytest.raises(DecodeError, match="seen before"):
            opener.open(datagram)
    with pytest.raises(DecodeError):
        opener.open(first)


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_order_within_the_window_opens_each_once(rng: random.Random) -> None:
    sender, opener = sealer(), Opener([OLD])
    datagrams = [sender.seal(str(i).encode()) for i in range(60)]
    arrivals = datagrams + rng.choices(datagrams, k=30)
    rng.shuffle(arrivals)
    opened = []
    for datagram in arrivals:
        try:
            opened.append(opener.open(datagram)[2])
        except DecodeError:
            continue
    assert sorted(opened) == sorted(str(i).encode() for i in range(60))


def test_the_window_ends_where_it_says() -> None:
    sender, opener = sealer(), Opener([OLD])
    datagrams = [sender.seal(str(i).encode()) for i in range(WINDOW + 1)]
    opener.open(datagrams[WINDOW])
    with pytest.raises(DecodeError, match="too late"):
        opener.open(datagrams[0])
    assert opener.open(datagrams[1])[2] == b"1"
    far = [sender.seal(b"") for _ in range(3 * WINDOW)][-1]
    opener.open(far)  # a leap over the whole window
    with pytest.raises(DecodeError):
        opener.open(datagrams[2])


def test_a_recording_of_an_older_boot_is_worthless_once_a_newer_was_seen() -> None:
    opener = Opener([OLD])
    before, after = sealer(boot=1), sealer(boot=2, salt=1)
    recorded = [before.seal(b"old") for _ in range(3)]
    opener.open(recorded[0])
    opener.open(after.seal(b"new"))
    for datagram in recorded[1:]:
        with pytest.raises(DecodeError, match="boot 2 of that sender was seen"):
            opener.open(datagram)
    with pytest.raises(DecodeError):  # nor does a second process under the same boot get in
        opener.open(sealer(boot=2, salt=9).seal(b"copy"))
    assert opener.open(after.seal(b"still"))[2] == b"still"


def test_a_forged_newer_boot_shuts_nobody_out() -> None:
    opener, sender = Opener([OLD]), sealer(boot=1)
    opener.open(sender.seal(b"1"))
    forged = sealer(boot=99, keys=(NEW,)).seal(b"forged")
    forged = forged[:1] + bytes([_mark(OLD)]) + forged[2:]  # past the cheap check
    with pytest.raises(DecodeError, match="not sealed under"):
        opener.open(forged)
    assert opener.open(sender.seal(b"2"))[2] == b"2"


def test_old_and_new_cluster_key_hold_until_the_old_is_dropped() -> None:
    opener, sender = Opener([OLD]), sealer()
    recorded = sender.seal(b"recorded")
    opener.open(recorded)
    opener.rekey([NEW, OLD])
    with pytest.raises(DecodeError):
        opener.open(recorded)
    assert opener.open(sender.seal(b"late"))[2] == b"late"
    sender.rekey([NEW, OLD])
    kept = sender.seal(b"new")
    assert opener.open(kept)[2] == b"new"
    opener.rekey([NEW])
    with pytest.raises(DecodeError):
        opener.open(kept)
    with pytest.raises(DecodeError):
        opener.open(sealer(salt=0).seal(b"of somebody removed"))
    assert opener.open(sender.seal(b"on"))[2] == b"on"


def test_no_two_datagrams_share_key_and_nonce() -> None:
    others = [ME, NodeId("f" * 16)]
    texts = {sealer(boot, salt, me).seal(b"same payload")[-28:] for boot in (1, 2) for salt in (0, 1) for me in others}
    assert len(texts) == 8
    one = sealer()
    assert one.seal(b"same") != one.seal(b"same")


def test_a_hundred_thousand_random_datagrams_open_nothing_and_leave_nothing() -> None:
    rng = random.Random(7)
    opener, sender = Opener([OLD, NEW]), sealer()
    opener.open(sender.seal(b"a friend"))
    head = struct.pack(">BB8s", VERSION, _mark(OLD), bytes.fromhex(ME))
    for i in range(100_000):
        garbage = rng.randbytes(rng.randrange(0, 120))
        if i % 50 == 0:
            garbage = head[: rng.randrange(11)] + garbage  # so that the checks behind the first are met as well
        with pytest.raises(DecodeError):
            opener.open(garbage)
    assert len(opener._senders) == 1
    assert opener.open(sender.seal(b"a friend"))[2] == b"a friend"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=1500), st.integers(0, 60))
def test_any_bytes_are_a_decode_error(garbage: bytes, prefix: int) -> None:
    with pytest.raises(DecodeError):
        Opener([OLD]).open(sealer().seal(b"payload" * 10)[:prefix] + garbage)


def test_the_senders_remembered_are_bounded_and_the_least_recent_goes() -> None:
    opener = Opener([OLD])
    for i in range(SENDERS_MAX + 10):
        opener.open(sealer(me=NodeId(f"{i:016x}")).seal(b""))
    assert len(opener._senders) == SENDERS_MAX
    assert bytes(8) not in opener._senders

# Tokens: copied right they say everything; copied wrong they say so.
from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from idunno.base.errors import InvalidArgument, Unauthenticated
from idunno.wire.tokens import PREFIX, check_ca, hash_secret, make_token, parse_token

CA, OTHER_CA = bytes(range(32)), bytes(32)


class Seeded:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def token_bytes(self, nbytes: int, /) -> bytes:
        return self._rng.randbytes(nbytes)


def test_a_token_says_its_id_its_secret_and_the_ca() -> None:
    text, token_id, secret_hash = make_token(CA)
    token = parse_token(text)
    assert (token.token_id, hash_secret(token.secret), token.ca_fingerprint) == (token_id, secret_hash, CA)
    assert (len(text), len(token.secret), len(token_id)) == (127, 32, 12)
    assert make_token(CA)[0] != text


def test_case_spaces_and_line_breaks_do_not_matter() -> None:
    text, token_id, _ = make_token(CA, Seeded(1))
    assert parse_token(f"  {text[:50].upper()}\n {text[50:]}\n").token_id == token_id


def test_any_single_wrong_character_is_noticed() -> None:
    text, _, _ = make_token(CA, Seeded(1))
    for at in range(len(PREFIX), len(text)):
        wrong = text[:at] + ("a" if text[at] != "a" else "b") + text[at + 1 :]
        with pytest.raises(InvalidArgument, match="mistyped or incomplete"):
            parse_token(wrong)
    for cut in (text[:-1], text + "a", text[:60]):
        with pytest.raises(InvalidArgument, match="mistyped or incomplete"):
            parse_token(cut)


@given(st.text(max_size=200))
@example("")
@example(PREFIX)
@example(PREFIX + "ü" * 120)
@example("x" * 100_000)
def test_any_text_is_a_token_or_one_clear_error(text: str) -> None:
    for candidate in (text, PREFIX + text):
        with pytest.raises(InvalidArgument):
            parse_token(candidate)


def test_a_node_of_another_cluster_is_found_out_before_the_secret_is_sent() -> None:
    token = parse_token(make_token(CA)[0])
    check_ca(token, CA)
    with pytest.raises(Unauthenticated, match="another cluster"):
        check_ca(token, OTHER_CA)

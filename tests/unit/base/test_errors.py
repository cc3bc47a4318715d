# Every error class against the table of docs/errors.md, over the wire, and as an exit status.
from __future__ import annotations

import re
from pathlib import Path

import pytest

from idunno.base.errors import BY_CODE, IdunnoError, InternalError, from_code
from idunno.cli.running import FAILED, UNKNOWN, exit_code_of
from idunno.wire.codec import decode_error, encode_error

PAGE = Path(__file__).parents[3] / "docs" / "errors.md"
YES = {"yes": True, "no": False}


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [a-z]+", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "| --- |" not in line][1:]


def test_the_page_has_a_row_for_every_class_and_no_other() -> None:
    assert sorted(row[0] for row in rows()) == sorted(BY_CODE)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_class_is_what_its_row_says(row: list[str]) -> None:
    code, may_have_happened, retry, status, meaning = row
    cls = BY_CODE[code]
    assert (cls.may_have_happened, cls.retryable) == (YES[may_have_happened], YES[retry])
    assert cls.http_status == int(status)
    assert ": " in meaning, "what it means, then what to do"
    assert cls.__doc__


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_it_arrives_as_what_was_raised_and_ends_the_command_accordingly(code: str) -> None:
    raised = from_code(code, "what, 3 of 4; next step")
    arrived = decode_error(encode_error(raised))
    assert type(arrived) is type(raised) is BY_CODE[code]
    assert str(arrived) == "what, 3 of 4; next step"
    assert exit_code_of(arrived) == (UNKNOWN if raised.may_have_happened else FAILED)


def test_a_code_that_is_not_known_here_is_not_taken_for_harmless() -> None:
    """A newer node's error: nobody can say that nothing happened."""
    arrived = from_code("brand-new", "text")
    assert type(arrived) is InternalError
    assert arrived.may_have_happened
    assert "brand-new" in str(arrived)


def test_what_may_be_sent_again_is_what_certainly_did_not_happen_or_is_found_again() -> None:
    again = {cls.code for cls in BY_CODE.values() if cls.retryable}
    assert {code for code in again if BY_CODE[code].may_have_happened} == {"connection-lost"}
    assert issubclass(BY_CODE["connection-lost"], BY_CODE["may-have-happened"])
    assert IdunnoError.may_have_happened, "a class that says nothing promises nothing"

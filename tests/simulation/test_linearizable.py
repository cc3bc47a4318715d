# The checker of histories: hand-made ones that are legal and that are not, and tiny ones against every possible order.
from __future__ import annotations

import random
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulation.linearizable import (
    CONFLICT,
    DONE,
    NOT_FOUND,
    OPEN,
    Delete,
    FileState,
    Get,
    Model,
    Operation,
    Put,
    Read,
    Verdict,
    Versions,
    Write,
    check,
    file,
    plain,
    register,
    told,
    versions_too_far,
)


def op(begin: float, end: float | None, asked: Any, answer: Any = OPEN) -> Operation:
    if answer is OPEN and isinstance(asked, Write) and end is not None:
        answer = DONE
    return Operation(begin, end, asked, answer)


REGISTERS = {
    "one after the other": (True, [op(0, 1, Write(1)), op(2, 3, Read(), 1)]),
    "a read of what was never written": (False, [op(0, 1, Write(1)), op(2, 3, Read(), 2)]),
    "a stale read": (False, [op(0, 1, Write(1)), op(2, 3, Write(2)), op(4, 5, Read(), 1)]),
    "reads during a write see old and new": (
        True,
        [op(0, 1, Write(1)), op(2, 9, Write(2)), op(3, 4, Read(), 1), op(5, 6, Read(), 2)],
    ),
    "but not new and then old": (
        False,
        [op(0, 1, Write(1)), op(2, 9, Write(2)), op(3, 4, Read(), 2), op(5, 6, Read(), 1)],
    ),
    "two readers do not disagree on the order": (
        False,
        [op(0, 9, Write(1)), op(0, 9, Write(2)), *(op(10 + i, 10 + i, Read(), v) for i, v in enumerate([1, 2]))],
    ),
    "an unknown write may come at once": (True, [op(0, None, Write(1)), op(1, 2, Read(), 1)]),
    "or much later": (True, [op(0, None, Write(1)), op(1, 2, Read(), 0), op(3, 4, Read(), 1), op(5, 6, Read(), 1)]),
    "or never": (True, [op(0, None, Write(1)), op(1, 2, Read(), 0), op(3, 4, Write(2)), op(5, 6, Read(), 2)]),
    "but not twice": (
        False,
        [op(0, None, Write(1)), op(1, 2, Read(), 1), op(3, 4, Write(2)), op(5, 6, Read(), 1)],
    ),
    "nor before it was asked for": (False, [op(0, 1, Read(), 1), op(2, None, Write(1))]),
}


@pytest.mark.parametrize("name", REGISTERS)
def test_histories_of_a_register(name: str) -> None:
    legal, history = REGISTERS[name]
    assert check(register, 0, history).verdict is (Verdict.LEGAL if legal else Verdict.ILLEGAL)


FILES = {
    "versions rise": (True, [op(0, 1, Put("a"), 1), op(2, 3, Put("b"), 2), op(4, 5, Get(), (2, "b"))]),
    "a version is given once": (False, [op(0, 9, Put("a"), 1), op(0, 9, Put("b"), 1)]),
    "a gap needs somebody who made it": (False, [op(0, 1, Put("a"), 1), op(2, 3, Put("b"), 3)]),
    "somebody whose outcome is not known": (
        True,
        [op(0, 1, Put("a"), 1), op(0, None, Put("x")), op(2, 3, Put("b"), 3), op(4, 5, Versions(), (3, 2, 1))],
    ),
    "a deleted file is not there, and its versions go on": (
        True,
        [
            op(0, 1, Put("a"), 1),
            op(2, 3, Delete(), DONE),
            op(4, 5, Get(), NOT_FOUND),
            op(4, 5, Delete(), NOT_FOUND),
            op(6, 7, Put("b"), 2),
            op(8, 9, Versions(), (2,)),
        ],
    ),
    "what was deleted stays so": (False, [op(0, 1, Put("a"), 1), op(2, 3, Delete(), DONE), op(4, 5, Get(), (1, "a"))]),
    "a delete that is done twice is seen": (
        False,
        [op(0, 1, Put("a"), 1), op(2, 3, Delete(), DONE), op(4, 5, Put("b"), 2), op(6, 7, Get(), NOT_FOUND)],
    ),
    "a put that is done twice is seen": (False, [op(0, 1, Put("a"), 1), op(2, 3, Put("b"), 3)]),
    "one of two conditional puts wins": (
        True,
        [op(0, 1, Put("a"), 1), op(2, 9, Put("b", 1), 2), op(2, 9, Put("c", 1), CONFLICT)],
    ),
    "not both": (False, [op(0, 1, Put("a"), 1), op(2, 9, Put("b", 1), 2), op(2, 9, Put("c", 1), 3)]),
    "not none": (False, [op(0, 1, Put("a"), 1), op(2, 9, Put("b", 1), CONFLICT), op(2, 9, Put("c", 1), CONFLICT)]),
    "none, when a third may have come before": (
        True,
        [op(0, 1, Put("a"), 1), op(0, None, Put("x")), op(2, 9, Put("b", 1), CONFLICT)],
    ),
    "an unknown conditional put needs its condition": (
        False,
        [op(0, 1, Put("a"), 1), op(2, 3, Put("b"), 2), op(4, None, Put("c", 1)), op(5, 6, Get(), (3, "c"))],
    ),
    "version 0 wants no file": (True, [op(0, 1, Put("a", 0), 1), op(2, 3, Put("b", 0), CONFLICT)]),
}


@pytest.mark.parametrize("name", FILES)
def test_histories_of_a_file(name: str) -> None:
    legal, history = FILES[name]
    assert check(file, FileState(), history).verdict is (Verdict.LEGAL if legal else Verdict.ILLEGAL)


def brute_force(model: Model, start: Any, history: list[Operation]) -> bool:
    """Every order of every choice of the open ones."""
    closed = [operation for operation in history if operation.end is not None]
    unknown = [operation for operation in history if operation.end is None]
    for chosen in range(1 << len(unknown)):
        happened = closed + [operation for at, operation in enumerate(unknown) if chosen >> at & 1]
        for order in permutations(happened):
            if _in_time(order) and _answers(model, start, order):
                return True
    return False


def _in_time(order: tuple[Operation, ...]) -> bool:
    for at, operation in enumerate(order):
        if any(later.end is not None and later.end < operation.begin for later in order[at + 1 :]):
            return False
    return True


def _answers(model: Model, start: Any, order: tuple[Operation, ...]) -> bool:
    state = start
    for operation in order:
        state = model(state, operation.asked, operation.answer)
        if state is None:
            return False
    return True


TIMES = st.tuples(st.integers(0, 8), st.integers(0, 4), st.booleans())


@st.composite
def tiny_registers(draw: st.DrawFn) -> list[Operation]:
    history = []
    for number in range(draw(st.integers(1, 6))):
        begin, length, known = draw(TIMES)
        if draw(st.booleans()):
            history.append(op(begin, begin + length if known else None, Write(number + 1)))
        else:
            history.append(op(begin, begin + length, Read(), draw(st.integers(0, 6))))
    return history


@st.composite
def tiny_files(draw: st.DrawFn) -> list[Operation]:
    history = []
    for number in range(draw(st.integers(1, 6))):
        begin, length, known = draw(TIMES)
        end = begin + length
        version = draw(st.integers(1, 3))
        match draw(st.sampled_from("ppdgv")):
            case "p":
                condition = draw(st.sampled_from([None, None, 0, 1]))
                answer = draw(st.sampled_from([version, version, CONFLICT])) if condition is not None else version
                history.append(
                    op(begin, end, Put(number, condition), answer) if known else op(begin, None, Put(number))
                )
            case "d":
                answer = draw(st.sampled_from([DONE, NOT_FOUND]))
                history.append(op(begin, end, Delete(), answer) if known else op(begin, None, Delete()))
            case "g":
                history.append(op(begin, end, Get(), draw(st.sampled_from([NOT_FOUND, (version, number // 2)]))))
            case _:
                history.append(op(begin, end, Versions(), draw(st.sampled_from([NOT_FOUND, (1,), (2, 1), (2,)]))))
    return history


@settings(max_examples=200, deadline=None)
@given(tiny_registers())
def test_every_tiny_history_of_a_register_is_judged_as_by_trying_all_orders(history: list[Operation]) -> None:
    wanted = brute_force(register, 0, history)
    assert (check(register, 0, history).verdict is Verdict.LEGAL) == wanted
    assert (check(register, 0, plain(history)).verdict is Verdict.LEGAL) == wanted


@settings(max_examples=200, deadline=None)
@given(tiny_files())
def test_every_tiny_history_of_a_file_is_judged_as_by_trying_all_orders(history: list[Operation]) -> None:
    wanted = brute_force(file, FileState(), history)
    assert (check(file, FileState(), history).verdict is Verdict.LEGAL) == wanted
    assert (check(file, FileState(), plain(history)).verdict is Verdict.LEGAL) == wanted


def lived(seed: int, operations: int, *, unknown: float) -> list[Operation]:
    """A history that happened: each operation at a moment between its call and its return; of some nobody knows."""
    rng = random.Random(seed)
    busy = [0.0] * 6
    waiting: list[tuple[float, int, float, float, Any]] = []
    for number in range(operations):
        client = min(range(6), key=lambda c: busy[c])
        begin = busy[client] + rng.random()
        end = busy[client] = begin + rng.random() * 3
        asked = rng.choice([Put(number), Get(), Get(), Versions(), Delete(), Put(number, number % 50)])
        waiting.append((begin + rng.random() * (end - begin), client, begin, end, asked))
    state, history = FileState(), []
    for _, client, begin, end, asked in sorted(waiting, key=lambda item: item[0]):
        answers: list[Any] = [OPEN, NOT_FOUND, CONFLICT, DONE, state.last + 1, (state.version, state.content)]
        answers.append(tuple(range(state.last, state.first - 1, -1)))
        answer = next(a for a in answers[1:] if file(state, asked, a) is not None)
        after = file(state, asked, answer)
        lost = isinstance(asked, Put | Delete) and rng.random() < unknown
        if not lost or rng.random() < 0.5:  # half of those that nobody heard of never happened
            assert after is not None
            state = after
        history.append(Operation(begin, None if lost else end, asked, OPEN if lost else answer, f"c{client}"))
    return history


@pytest.mark.parametrize("unknown", [0.0, 0.05, 0.15])
def test_a_thousand_operations_on_eight_files_are_judged_in_time(unknown: float) -> None:
    for seed in range(8):
        history = plain(lived(seed, 125, unknown=unknown))
        found = check(file, FileState(), history, too_far=versions_too_far)
        assert found.verdict is Verdict.LEGAL, told(found, history)


def test_one_answer_that_is_not_true_is_found_among_hundreds_and_told() -> None:
    history = plain(lived(5, 200, unknown=0.02))
    at = next(i for i in range(100, 200) if isinstance(history[i].answer, tuple) and isinstance(history[i].asked, Get))
    wrong = Operation(history[at].begin, history[at].end, Get(), (history[at].answer[0], "another content"), "c1")
    found = check(file, FileState(), [*history[:at], wrong, *history[at + 1 :]], too_far=versions_too_far)
    assert found.verdict is Verdict.ILLEGAL
    assert found.stuck == wrong
    assert "another content" in told(found, history)


def test_a_search_that_would_take_too_long_says_so() -> None:
    history = [op(0, 100, Write(number)) for number in range(12)] + [op(101, 102, Read(), 99)]
    assert check(register, 0, history, steps_max=2_000).verdict is Verdict.UNDECIDED

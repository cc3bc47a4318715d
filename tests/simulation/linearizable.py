# tests/simulation/linearizable.py: whether a history of concurrent operations could have happened one at a time.
#
# Rule 1: linearizable (Herlihy and Wing, 1990): there is an order of the operations, each at one moment between its call and its
#         return, in which a single copy of the object gives every answer that was given.
# Rule 2: an operation whose outcome is not known is open for ever: it may take effect at any moment after its call, or never.
# Rule 3: the search is Wing and Gong's (1993) in Lowe's form (2017): along the history in time, with all the ways in which it can
#         have happened so far, equal ones once. Objects are independent, so each is searched by itself (Horn and Kroening,
#         2015). It is bounded, and says so.
# Rule 4: nothing here knows what is simulated: time is a number, an object is a `Model`.
from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

STEPS_MAX: Final = 2_000_000
"""Of one object's search: about ten seconds. A hundred operations of which a tenth is open take some 20,000."""

Model = Callable[[Any, Any, Any], Hashable | None]
"""(state, what was asked, what was answered) -> the state afterwards, or None when that state gives another answer. An open
operation's answer is OPEN: the model does what was asked, and None means that it would change nothing."""


class Open(enum.Enum):
    OPEN = "open"


OPEN: Final = Open.OPEN


@dataclass(frozen=True, slots=True)
class Operation:
    """`end` and `answer` of an operation whose outcome is not known: None and OPEN."""

    begin: float
    end: float | None
    asked: Any
    answer: Any = OPEN
    by: str = ""


class Verdict(enum.Enum):
    LEGAL, ILLEGAL, UNDECIDED = "legal", "illegal", "undecided"


@dataclass(slots=True)
class Found:
    verdict: Verdict
    steps: int = 0
    stuck: Operation | None = None
    """Of a history that is not legal: the operation that had returned when nothing could explain the answers so far."""
    states: list[Hashable] = field(default_factory=list)
    """What the object can have been just before."""


def check(
    model: Model,
    start: Hashable,
    history: Iterable[Operation],
    *,
    too_far: Callable[[Any, Operation], bool] = lambda state, operation: False,
    steps_max: int = STEPS_MAX,
) -> Found:
    """The history of one object. `too_far`: whether nothing leads from the state to one in which this operation's answer would
    be right; it need not know, but where it does the search is short."""
    return _Search(model, start, history, too_far, steps_max).run()


@dataclass(frozen=True, slots=True)
class _Way:
    """One way in which things can have happened so far: what of that which is under way has taken effect, and the state. Which
    open operations were needed for it is kept beside: needing fewer is better, so ways that need more are dropped."""

    done: frozenset[int]
    state: Hashable


class _Search:
    """Goes along the history in time. When an operation returns, it has taken effect in every way that is left (Lowe's
    just-in-time linearization); whatever else is under way or open may have come before it."""

    def __init__(
        self,
        model: Model,
        start: Hashable,
        history: Iterable[Operation],
        too_far: Callable[[Any, Operation], bool],
        steps_max: int,
    ) -> None:
        self._model, self._too_far, self._steps_max, self._steps = model, too_far, steps_max, 0
        self._operations = sorted(history, key=lambda operation: operation.begin)
        self._pending: list[int] = []
        self._open: list[int] = []
        self._ways: dict[_Way, list[int]] = {_Way(frozenset(), start): [0]}  # with the sets of open operations, as bits

    def run(self) -> Found:
        for returns, at in self._moments():
            operation = self._operations[at]
            if not returns:
                (self._open if operation.end is None else self._pending).append(at)
                continue
            before = self._ways
            self._ways = self._after(at)
            if self._steps > self._steps_max:
                return Found(Verdict.UNDECIDED, self._steps, operation)
            if not self._ways:
                return Found(Verdict.ILLEGAL, self._steps, operation, list({way.state: None for way in before}))
            self._pending.remove(at)
        return Found(Verdict.LEGAL, self._steps)

    def _moments(self) -> list[tuple[bool, int]]:
        """(returns, operation), in time; what begins when another returns may have come before it."""
        moments = [(operation.begin, False, at) for at, operation in enumerate(self._operations)]
        moments += [(o.end, True, at) for at, o in enumerate(self._operations) if o.end is not None]
        return [(returns, at) for _, returns, at in sorted(moments)]

    def _after(self, at: int) -> dict[_Way, list[int]]:
        """The ways in which operation `at` has taken effect, that being forgotten."""
        found: dict[_Way, list[int]] = {}
        seen: dict[_Way, list[int]] = {}
        todo: list[tuple[_Way, int]] = []
        for way, needs in self._ways.items():
            for used in needs:
                if at in way.done:
                    _keep(found, _Way(way.done - {at}, way.state), used)
                elif _keep(seen, way, used):
                    todo.append((way, used))
        while todo and self._steps <= self._steps_max:
            way, used = todo.pop()
            if used not in seen[way]:
                continue  # a better one came since
            for next_at, after, needed in self._steps_from(way, used):
                done = way.done if needed != used else way.done | {next_at}
                if next_at == at:
                    _keep(found, _Way(way.done, after), used)
                elif _keep(seen, _Way(done, after), needed):
                    todo.append((_Way(done, after), needed))
        return found

    def _steps_from(self, way: _Way, used: int) -> Iterable[tuple[int, Hashable, int]]:
        """(operation, state, open ones used) for everything that may come next."""
        for at in self._pending:
            if at not in way.done:
                after = self._step(way.state, self._operations[at])
                if after is not None:
                    yield at, after, used
        tried: set[tuple[Any, Any]] = (
            set()
        )  # of equal open ones the first will do: it may come wherever a later one may
        for bit, at in enumerate(self._open):
            operation = self._operations[at]
            if used >> bit & 1 or (operation.asked, operation.answer) in tried:
                continue
            tried.add((operation.asked, operation.answer))
            after = self._step(way.state, operation)
            if after is None or after == way.state:  # what changes nothing may as well never happen
                continue
            if not any(self._too_far(after, self._operations[p]) for p in self._pending if p not in way.done):
                yield at, after, used | 1 << bit

    def _step(self, state: Hashable, operation: Operation) -> Hashable | None:
        self._steps += 1
        return self._model(state, operation.asked, operation.answer)


def _keep(ways: dict[_Way, list[int]], way: _Way, used: int) -> bool:
    """Add a way, unless it is there already with no more open operations used; those that need more are dropped."""
    needs = ways.setdefault(way, [])
    if any(other & used == other for other in needs):
        return False
    needs[:] = [other for other in needs if other & used != used]
    needs.append(used)
    return True


# -- what is replicated ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    value: Hashable


@dataclass(frozen=True, slots=True)
class Read:
    pass


def register(state: Hashable, asked: Write | Read, answer: Any) -> Hashable | None:
    """A register; a read's answer is its value (nothing is None: values are tuples or numbers)."""
    if isinstance(asked, Write):
        return asked.value
    return state if answer is OPEN or answer == state else None


@dataclass(frozen=True, slots=True)
class Put:
    content: Hashable
    if_version: int | None = None


@dataclass(frozen=True, slots=True)
class Get:
    pass


@dataclass(frozen=True, slots=True)
class Versions:
    pass


@dataclass(frozen=True, slots=True)
class Delete:
    pass


NOT_FOUND: Final = "not found"
CONFLICT: Final = "conflict"
DONE: Final = "done"


@dataclass(frozen=True, slots=True)
class FileState:
    """Versions `first` to `last` are there, none when `first` is above; the last has this content."""

    first: int = 1
    last: int = 0
    content: Hashable = None

    @property
    def version(self) -> int:
        """The current one; 0 when there is no file."""
        return self.last if self.first <= self.last else 0


def file(state: FileState, asked: Put | Get | Versions | Delete, answer: Any) -> FileState | None:
    """A file by its name: versions rise and go on after a delete. Answers: the version (put), (version, content) (get), the
    versions, newest first (versions), DONE (delete), NOT_FOUND, CONFLICT (put)."""
    match asked:
        case Put(content, if_version):
            if if_version is not None and if_version != state.version:
                return state if answer == CONFLICT else None
            if answer not in (OPEN, state.last + 1):
                return None
            first = state.first if state.version else state.last + 1
            return FileState(first, state.last + 1, content)
        case Delete():
            if not state.version:
                return state if answer == NOT_FOUND else None
            return FileState(state.last + 1, state.last) if answer in (OPEN, DONE) else None
        case Get():
            return state if answer == ((state.version, state.content) if state.version else NOT_FOUND) else None
        case Versions():
            there = tuple(range(state.last, state.first - 1, -1)) if state.version else NOT_FOUND
            return state if answer == there else None


def versions_too_far(state: FileState, operation: Operation) -> bool:
    """Versions only rise."""
    match operation.asked, operation.answer:
        case (Put(), int() as version):
            return state.last >= version
        case (Get(), (int() as version, _)):
            return state.last > version
        case (Versions(), (int() as version, *_)):
            return state.last > version
    return False


UNREAD: Final = "never read"


def plain(history: Iterable[Operation]) -> list[Operation]:
    """The same history of a file or a register, easier to judge: open writes that nobody read are all alike, and of an open put
    whose content was read the version is known. What is written must be different each time."""
    operations = list(history)
    reads = [operation.answer for operation in operations if isinstance(operation.asked, Get | Read)]
    version_of = {answer[1]: answer[0] for answer in reads if isinstance(answer, tuple) and len(answer) == 2}
    seen = {*reads, *version_of}

    def plainer(operation: Operation) -> Operation:
        match operation.asked:
            case Put(content, if_version) if operation.end is None:
                if content in version_of:
                    return replace(operation, answer=version_of[content])
                return replace(operation, asked=Put(UNREAD, if_version))
            case Write(value) if operation.end is None and value not in seen:
                return replace(operation, asked=Write(UNREAD))
        return operation

    return [plainer(operation) for operation in operations]


def told(found: Found, history: Sequence[Operation]) -> str:
    """Why a history is not legal, for a person: what could not be, what was known by then, and what went before it."""
    stuck = found.stuck
    if stuck is None or stuck.end is None:
        return f"{found.verdict.value} after {found.steps} steps, {len(history)} operations"
    lines = [f"{found.verdict.value} after {found.steps} steps: {_line(stuck)}"]
    lines += [f"  it can have been {state}" for state in found.states[:6]]
    near = sorted((o for o in history if o.begin <= stuck.end), key=lambda o: o.end if o.end is not None else o.begin)
    lines += [f"  {_line(operation)}" for operation in near[-16:]]
    lines += [f"  open: {_line(operation)}" for operation in history if operation.end is None][:8]
    return "\n".join(lines)


def _line(operation: Operation) -> str:
    end = f"{operation.end:.4f}" if operation.end is not None else "?"
    return f"{operation.begin:.4f}-{end} {operation.by} {operation.asked} -> {operation.answer}"

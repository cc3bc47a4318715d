# idunno/cli/options.py: what every command has in common on its command line.
#
# Rule 1: --json, --cluster and --timeout are options of every command and every group, so they may stand anywhere; the one
#         nearest to the end wins.
# Rule 2: every command's help ends in an example. A command without one cannot be written.
# Rule 3: this module and the command modules import nothing heavy at their top: `idunno --help` is to be there at once.
from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import click

_META: Final = "idunno.settings."
_UNITS_S: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
DURATION_MAX_S: Final = 100 * 365 * 86_400.0
"""Nothing here is kept or waited for longer than a life; and it fits where milliseconds are counted."""
COUNT_MAX: Final = 2**31 - 1
"""Of what is counted: what is too many says the cluster; this only keeps it a number that can be sent."""
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(ms|s|m|h|d|w|)")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Settings:
    """The common options of the command that runs."""

    json: bool
    cluster: str | None
    timeout_s: float | None


def settings() -> Settings:
    meta = click.get_current_context().meta
    return Settings(bool(meta.get(_META + "json")), meta.get(_META + "cluster"), meta.get(_META + "timeout"))


def parse_duration_s(text: str) -> float:
    """Seconds of `90`, `45s`, `30m`, `12h`, `1d`. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text[:40]!r} is no duration: write seconds, or 45s, 30m, 12h, 1d")
    return float(match[1]) * _UNITS_S[match[2]]


def parse_time_ms(text: str, now_ms: int) -> int:
    """Milliseconds since 1970 of an ISO time (UTC where it names no zone), or of a duration before now."""
    try:
        ago_s = parse_duration_s(text)
    except ValueError:
        pass
    else:
        if ago_s > DURATION_MAX_S:
            raise ValueError(f"{text[:40]} is more than 100 years ago")
        return now_ms - round(ago_s * 1000)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f"{text[:40]!r} is no time: write 2026-11-20T14:00:00Z, or how long ago: 45s, 30m, 12h, 1d"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


class Duration(click.ParamType):  # type: ignore[type-arg]  # older clicks cannot subscript it
    """A duration in seconds, above zero."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            seconds = parse_duration_s(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds <= 0:
            self.fail(f"{value} is no time to do anything in: give more than 0", param, ctx)
        if seconds > DURATION_MAX_S:
            self.fail(f"{value} is more than 100 years", param, ctx)
        return seconds


class Moment(click.ParamType):  # type: ignore[type-arg]  # older clicks cannot subscript it
    """A time, in ms since 1970."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        import time

        if isinstance(value, int):
            return value
        try:
            return parse_time_ms(str(value), time.time_ns() // 1_000_000)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Named(click.ParamType):  # type: ignore[type-arg]  # older clicks cannot subscript it
    """A name of something in the cluster; `kind` tells the shell what to complete it from. Only a prefix may be empty."""

    def __init__(self, kind: str) -> None:
        self.name = kind  # file | prefix | model | job | node | any
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = sendable(str(value), self, param, ctx)
        return text if self.kind == "prefix" else given(text, self, param, ctx)


class Text(click.ParamType):  # type: ignore[type-arg]  # older clicks cannot subscript it
    """Any text that can be sent; an empty one only where that means something."""

    name = "text"

    def __init__(self, *, empty: bool = False) -> None:
        self._empty = empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = sendable(str(value), self, param, ctx)
        return text if self._empty else given(text, self, param, ctx)


class LocalPath(click.Path):
    """A local path; whether it is there and ours to read is found when it is opened, and then named as an error of its own."""

    def __init__(self) -> None:
        super().__init__(path_type=str, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        given(os.fspath(value), self, param, ctx)  # as a path it would be the directory that one happens to be in
        return super().convert(value, param, ctx)


class Count(click.IntRange):
    """A number of something, at least `min`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = super().convert(value, param, ctx)
        if number > COUNT_MAX:
            self.fail(f"{number} is more than {COUNT_MAX:,}", param, ctx)
        return number


def sendable(text: str, kind: click.ParamType, param: click.Parameter | None, ctx: click.Context | None) -> str:  # type: ignore[type-arg]
    """`text` itself; wrong usage if its bytes on the command line were no UTF-8, which all that is sent is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF  # as os.fsdecode keeps what it cannot read
        kind.fail(f"{text[:40]!r} is no UTF-8: its character {error.start + 1} is the byte 0x{byte:02x}", param, ctx)
    return text


def given(text: str, kind: click.ParamType, param: click.Parameter | None, ctx: click.Context | None) -> str:  # type: ignore[type-arg]
    """`text` itself; wrong usage if it is empty, as `"$UNSET"` is in a script: it would be taken for what was not meant."""
    if not text:
        kind.fail("it is empty; is a variable unset?", param, ctx)
    return text


FILE, PREFIX, MODEL, JOB, NODE, ANY = (Named(kind) for kind in ("file", "prefix", "model", "job", "node", "any"))
LOCAL: Final = LocalPath()
TEXT: Final = Text()


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None and value is not False:
        assert param.name is not None
        ctx.meta[_META + param.name] = value


def _common() -> list[click.Parameter]:
    return [
        click.Option(
            ["--json", "json"],
            is_flag=True,
            expose_value=False,
            callback=_remember,
            help="One JSON document on standard output, nothing else there.",
        ),
        click.Option(
            ["--cluster"],
            type=TEXT,
            metavar="WHERE",
            expose_value=False,
            callback=_remember,
            help="Directory of a cluster or node, or HOST:PORT after a login. [default: $IDUNNO_CLUSTER, ~/.idunno/local]",
        ),
        click.Option(
            ["--timeout"],
            type=Duration(),
            metavar="SECONDS",
            expose_value=False,
            callback=_remember,
            help="Give up after this long, e.g. 30 or 5m.",
        ),
    ]


def _epilog(example: str) -> str:
    return f"\b\nExample:\n  {example}"


class Command(click.Command):
    def __init__(self, name: str | None, *, example: str, **attributes: Any) -> None:
        super().__init__(name, epilog=_epilog(example), **attributes)
        self.example = example
        self.params.extend(_common())


class Group(click.Group):
    def __init__(self, name: str | None = None, *, example: str, **attributes: Any) -> None:
        # Without a command a group says that one is missing, in a line like every other error.
        super().__init__(name, epilog=_epilog(example), **({"no_args_is_help": False} | attributes))
        self.example = example
        self.params.extend(_common())


def command(name: str, *, example: str, **attributes: Any) -> Callable[[F], Command]:
    """A command of that name. `example` is a whole line that a user could type."""

    def decorate(function: F) -> Command:
        return click.command(name, cls=Command, example=example, **attributes)(function)

    return decorate


def group(name: str, *, example: str, **attributes: Any) -> Callable[[F], Group]:
    def decorate(function: F) -> Group:
        return click.group(name, cls=Group, example=example, **attributes)(function)

    return decorate

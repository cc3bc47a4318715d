# tests/simulation/logs.py: what the nodes of a world log goes into its trace, and their errors into its findings.
from __future__ import annotations

import logging
from asyncio import events
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from idunno.base.errors import IdunnoError
from idunno.node.logs import JsonFormatter
from tests.simulation.loop import SimLoop, State

if TYPE_CHECKING:
    from tests.simulation.machine import Machine
    from tests.simulation.world import World

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

LOG_BYTES_MAX: Final = 256 * 1024
"""Of one machine's log that a search finds."""
TOLD: Final = frozenset({"leader elected", "leadership ended", "node started", "node cannot go on", "model ready"})
"""Phrases that a person who reads a world's story wants to see; warnings and errors are told too."""


class LogWatch(logging.Handler):
    """While entered, the handler of the product's loggers."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world
        self._logger = logging.getLogger("idunno")
        self._formatters: dict[str, JsonFormatter] = {}

    def __enter__(self) -> LogWatch:
        self._before = self._logger.level, self._logger.propagate, self._logger.handlers
        self._logger.handlers, self._logger.propagate = [self], False
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        level, self._logger.propagate, self._logger.handlers = self._before
        self._logger.setLevel(level)

    def handle(self, record: logging.LogRecord) -> bool:  # without the lock and filters of the standard one
        loop = events._get_running_loop()
        if not isinstance(loop, SimLoop) or loop.state is State.DEAD:
            return True
        world = self._world
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        text = " ".join(f"{name}={fields[name]}" for name in fields)
        phrase = record.getMessage()
        if record.levelno >= logging.WARNING or phrase in TOLD:
            world.trace.tell(f"{loop.name}: {phrase}", log=text)
        else:
            world.trace.note("log", loop.name, phrase, text)
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, IdunnoError):
            world.found(f"{loop.name} logged {phrase!r}: {error!r} at {_place(error)}")
        if loop.host is not None:
            machine = next((m for m in world.machines if m.host is loop.host), None)
            if machine is not None:
                self._keep(machine, record)
                for callback in world.on_log:
                    callback(machine, record)
        return True

    def _keep(self, machine: Machine, record: logging.LogRecord) -> None:
        """A line in the machine's log, as a handler of its own would have written it; the oldest are rotated away."""
        wall_ms = machine._wall_ms()
        record.created, record.msecs = wall_ms / 1000, wall_ms % 1000
        formatter = self._formatters.get(machine.name) or self._formatters.setdefault(
            machine.name, JsonFormatter(machine.name)
        )
        machine.log += formatter.format(record).encode() + b"\n"
        if len(machine.log) > LOG_BYTES_MAX:
            del machine.log[: machine.log.index(b"\n", LOG_BYTES_MAX // 2) + 1]


def _place(error: BaseException) -> str:
    """Where it was raised, innermost three frames."""
    trace: Any = error.__traceback__
    frames = []
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(frames[-3:])

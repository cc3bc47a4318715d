# tests/simulation/trace.py: everything that happens in a world, as one hash, and the lines of its story.
#
# Rule 1: what goes in is made of virtual time, names, sizes and texts: equal in every process that runs the same seed.
from __future__ import annotations

from collections import deque
from hashlib import blake2b
from typing import Final, TextIO

from tests.simulation.loop import Scheduler

LINES_KEPT: Final = 20_000
"""Of the story, the newest ones."""


AT_ONCE: Final = 256
"""Lines that are hashed together: one by one they cost three times as much."""


class Trace:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._hash = blake2b(digest_size=16)
        self._lines: list[str] = []  # not hashed yet
        self.events = 0
        self.story: deque[str] = deque(maxlen=LINES_KEPT)
        self.file: TextIO | None = None
        """Where all of it is written, to find the first difference of two runs."""
        self.watch = False
        """Print the story as it happens."""

    def note(self, what: str, *about: str | int | float) -> None:
        """Something that happened, for the hash alone."""
        self.events += 1
        line = f"{self._scheduler.now!r} {what} {about!r}\n"
        lines = self._lines
        lines.append(line)
        if len(lines) == AT_ONCE:
            self._flush()
        if self.file is not None:
            self.file.write(line)

    def tell(self, what: str, /, **about: object) -> None:
        """Something that a person wants to read."""
        fields = " ".join(f"{name}={value}" for name, value in about.items() if value not in (None, ""))
        line = f"{self._scheduler.now:9.3f}  {what}{'  ' + fields if fields else ''}"
        self.note(line)
        self.story.append(line)
        if self.watch:
            print(line, flush=True)  # noqa: T201

    def _flush(self) -> None:
        self._hash.update("".join(self._lines).encode())
        self._lines.clear()

    def digest(self) -> str:
        self._flush()
        return self._hash.hexdigest()

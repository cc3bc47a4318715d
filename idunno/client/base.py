# idunno/client/base.py: what the groups of client methods share: the session, the file client, and time.
#
# Rule 1: every method is bounded in time: by the cluster's `timeout_s` if one was given, else by its kind's default.
# Rule 2: one intention, one request id: retries below keep it.
from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from idunno.base.errors import DeadlineExceeded
from idunno.wire.calls import A, Method, Q

if TYPE_CHECKING:
    from idunno.client.session import Session
    from idunno.sdfs.client import FileClient

QUESTION_S: Final = 30.0
"""A question, or a change that is one command: several elections fit."""
TRANSFER_S: Final = 3_600.0
"""A file or folder: 360 GB at 100 MB/s."""
DEPLOY_S: Final = 300.0
"""Until all workers have fetched and set up a model."""
JOB_S: Final = 86_400.0
"""A job that is waited for. It goes on when nobody waits."""
POLL_S: Final = 10.0
"""One long poll: short enough that a node which is about to stop is not held up."""
POLL_MARGIN_S: Final = 0.5
"""A poll near the end of the time waits that much less, so that its answer still arrives."""
POLL_PAUSE_S: Final = 0.1
"""After a poll that brought nothing new at once: bounds what an eager server can make us ask."""


def new_request() -> str:
    return uuid.uuid4().hex


class Deadline:
    """The end of one method's time."""

    def __init__(self, given_s: float | None, default_s: float) -> None:
        self.total_s = default_s if given_s is None else given_s
        self._loop = asyncio.get_running_loop()
        self._end_s = self._loop.time() + self.total_s

    def left_s(self, what: str = "the request") -> float:
        """Seconds left. Raises DeadlineExceeded naming `what` was being waited for when there are none."""
        left_s = self._end_s - self._loop.time()
        if left_s <= 0:
            raise DeadlineExceeded(f"{what} took more than {self.total_s:g} s: give a larger --timeout")
        return max(0.001, round(left_s, 3))  # it is shown to people


class Base:
    def __init__(self, session: Session, files: FileClient, timeout_s: float | None) -> None:
        self.session = session
        self._file_client = files
        self._timeout_s = timeout_s

    @property
    def file_client(self) -> FileClient:
        """Files as streams, ranges and pages, for what is built on the client (idunno.fs)."""
        return self._file_client

    def _deadline(self, default_s: float = QUESTION_S) -> Deadline:
        return Deadline(self._timeout_s, default_s)

    async def _ask(self, method: Method[Q, A], request: Q, deadline: Deadline | None = None) -> A:
        deadline = deadline or self._deadline()
        return await self.session.call(method, request, timeout_s=deadline.left_s(method.name))

    async def _poll(self, method: Method[Q, A], request: Callable[[float], Q], deadline: Deadline) -> A | None:
        """One long poll, asked with `request(wait_s)`. None when the time is over: the caller says what it waited for."""
        try:
            left_s = deadline.left_s()
            wait_s = max(0.0, min(POLL_S, left_s - POLL_MARGIN_S))
            return await self.session.call(method, request(wait_s), timeout_s=left_s)
        except DeadlineExceeded:
            return None  # a poll only asks, and the session asked until the end of the time

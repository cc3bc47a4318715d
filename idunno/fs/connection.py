# idunno/fs/connection.py: one connection to a cluster for a whole process, whatever number of filesystems and threads.
#
# Rule 1: filesystems hold no connection, only what finds one here; so they can be pickled, and go through a fork.
# Rule 2: a fork's child begins with none. It must not touch its parent's: both would write into the same sockets.
from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

from idunno.base.errors import IdunnoError
from idunno.client.api import Cluster, connect_async
from idunno.client.sync import LoopThread
from idunno.fs.errors import os_error

T = TypeVar("T")

Key: TypeAlias = tuple[str, str, float | None]

opener: Callable[..., Coroutine[Any, Any, Cluster]] = connect_async
"""How a cluster is reached; tests put another one here."""


class Connection:
    """A cluster, used from any thread."""

    def __init__(self, where: str | None, timeout_s: float | None) -> None:
        self._pid = os.getpid()
        self._thread = LoopThread()
        try:
            self.cluster = self._thread.run(opener(where, timeout_s=timeout_s))
        except BaseException:
            self._thread.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether it is this process's own, and open."""
        return self._pid == os.getpid() and not self._thread.closed

    def run(self, path: str, work: Coroutine[Any, Any, T], *, create: bool = False) -> T:
        """Run in the connection's loop and wait. Raises OSError about `path` (errors.py)."""
        try:
            return self._thread.run(work)
        except IdunnoError as error:
            raise os_error(error, path, create=create) from error

    def post(self, work: Callable[[], object]) -> None:
        """Run in the loop soon, if there still is one; never waits."""
        if self.alive:
            self._thread.post(work)

    def close(self) -> None:
        try:
            self._thread.run(self.cluster.close())
        finally:
            self._thread.close()


_open: dict[Key, Connection] = {}
_lock = threading.Lock()
_inherited: list[dict[Key, Connection]] = []  # a finaliser could say goodbye in the parent's name: kept, never used


def connection(where: str | None, timeout_s: float | None) -> Connection:
    """This process's connection to WHERE (docs/commands.md), made when it is first asked for. Raises OSError."""
    chosen = where or os.environ.get("IDUNNO_CLUSTER", "")
    key = (chosen, os.environ.get("IDUNNO_HOME", ""), timeout_s)
    with _lock:
        found = _open.get(key)
        if found is None:
            try:
                found = _open[key] = Connection(chosen or None, timeout_s)
            except IdunnoError as error:
                raise os_error(error, chosen) from error
        return found


def close_all() -> None:
    """Close every connection of this process; the next use of a filesystem makes a new one."""
    with _lock:
        while _open:
            _open.popitem()[1].close()


def _after_fork() -> None:
    global _open, _lock
    _inherited.append(_open)
    _open, _lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(close_all)

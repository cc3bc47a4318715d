# idunno/wire/local.py: a node calls its own handlers exactly as it calls those of others.
#
# Rule 1: the same two sessions as over a socket, joined back to back: same checks, deadlines, flow control, bounds, errors.
#         Only the bytes are spared: frames are handed over, bodies by reference.
# Rule 2: a frame is delivered in a later turn of the loop, so that no call runs inside another's.
from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from idunno.base.errors import ConnectionLost, DecodeError, IdunnoError
from idunno.wire.caller import Connection
from idunno.wire.calls import Peer
from idunno.wire.connection import Session
from idunno.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from idunno.wire.server import Server


class LocalLink:
    """connection.Link to the other session of the same process. What waits in it is bounded by calls and credit."""

    paused = False

    def __init__(self) -> None:
        self.near: Session | None = None  # whose link this is
        self.far: LocalLink | None = None
        self._frames: deque[Frame] = deque()
        self._due = self._closed = False

    def send(self, kind: Kind, request: int, header: bytes = b"", body: bytes | memoryview = b"") -> None:
        if self._closed:
            return
        self._frames.append(Frame(kind, request, header, body))
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._deliver)

    async def writable(self) -> None:
        if self._closed:
            raise ConnectionLost("this node is stopping")

    def buffered(self) -> int:
        return 0

    def close(self, error: IdunnoError | None = None) -> None:
        if self._closed:
            return
        self._deliver()
        self._closed = True
        assert self.near is not None
        assert self.far is not None
        self.near.lost(error or ConnectionLost("this node is stopping"))
        self.far.close(error)

    async def gone(self) -> None:
        return

    def _deliver(self) -> None:
        self._due = False
        assert self.far is not None
        assert self.far.near is not None
        try:
            for _ in range(len(self._frames)):
                self.far.near.received(self._frames.popleft())
        except DecodeError as error:
            self._frames.clear()
            self.close(error)


class LocalCaller(Connection):
    """calls.Caller for the handlers of `server`, as `peer`: what PeerPool.to(me) gives."""

    def __init__(self, server: Server, peer: Peer) -> None:
        super().__init__(f"node {server.name}")
        near, far = LocalLink(), LocalLink()
        near.far, far.far = far, near
        near.near, far.near = self, server.attach(far, peer)
        self._link = near

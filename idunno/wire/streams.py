# idunno/wire/streams.py: the two ends of a stream of items, with flow control by credit.
#
# Rule 1: an item costs its bytes plus ITEM_OVERHEAD_BYTES. A sender never has more than STREAM_CREDIT_BYTES of cost under
#         way that the reader has not taken; a peer that sends more, or grants more, broke the protocol (DecodeError).
# Rule 2: the reader gives credit back in eighths of the window. A sender thus always gets to seven eighths of it, which is
#         more than the largest item costs, so no item waits for ever.
# Rule 3: what was received before an end or an error is handed out before it.
from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from idunno.base.disk import Buffer
from idunno.base.errors import DecodeError, IdunnoError, InvalidArgument
from idunno.wire.calls import BODY_BYTES_MAX, HEADER_BYTES_MAX, STREAM_CREDIT_BYTES, Item
from idunno.wire.frames import frozen

ITEM_OVERHEAD_BYTES: Final = 128
"""What an empty item costs: about what it takes in memory here, so that empty ones are bounded too."""
_GIVE_BACK_BYTES: Final = STREAM_CREDIT_BYTES // 8

assert HEADER_BYTES_MAX + BODY_BYTES_MAX + ITEM_OVERHEAD_BYTES <= STREAM_CREDIT_BYTES - _GIVE_BACK_BYTES  # rule 2


def cost(note: bytes, body: bytes | memoryview) -> int:
    return len(note) + len(body) + ITEM_OVERHEAD_BYTES


def parts(body: bytes | memoryview, bytes_max: int) -> list[bytes | memoryview]:
    """`body` in as few parts as frames of `bytes_max` need; an empty one is one part."""
    if len(body) <= bytes_max:
        return [body]
    view = memoryview(body)
    return [view[at : at + bytes_max] for at in range(0, len(view), bytes_max)]


def frame_fits(header: bytes, body: bytes | memoryview) -> bool:
    return len(header) <= HEADER_BYTES_MAX and len(body) <= BODY_BYTES_MAX


def framed(what: str, header: bytes, body: Buffer) -> bytes | memoryview:
    """`body` as bytes that nobody writes to. Raises InvalidArgument when a frame could not carry it with `header`."""
    content = frozen(body)
    if not frame_fits(header, content):
        raise InvalidArgument(
            f"{what}: {len(header)} + {len(content)} bytes are too many for a frame, "
            f"at most {HEADER_BYTES_MAX} + {BODY_BYTES_MAX}; send larger content as a stream"
        )
    return content


class Inbox:
    """Items received and not yet taken. `credit(n)` is called when `n` bytes of cost may be sent anew."""

    def __init__(self, credit: Callable[[int], None]) -> None:
        self.outstanding = 0  # cost received and not given back: at most STREAM_CREDIT_BYTES
        self._credit = credit
        self._items: deque[Item] = deque()
        self._taken = 0  # cost taken and not yet given back
        self._ended = self._dropping = False
        self._error: IdunnoError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, note: bytes, body: bytes | memoryview) -> None:
        """An item has arrived. Raises DecodeError when there was no credit for it, or after the end."""
        if self._error is not None:
            return
        if self._ended:
            raise DecodeError("item after the end of its stream")
        size = cost(note, body)
        self.outstanding += size
        if self.outstanding > STREAM_CREDIT_BYTES:
            raise DecodeError(f"stream item of {len(note) + len(body)} bytes without credit")
        if self._dropping:
            self._give_back(size)
        else:
            self._items.append(Item(note, body))
            self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def fail(self, error: IdunnoError) -> None:
        """No more will come, because of `error`. Without effect after the end."""
        if not self._ended and self._error is None:
            self._error = error
            self._wake()

    def drop(self) -> None:
        """Drop what is there and what comes: nobody will read it, but its sender must not wait."""
        self._dropping = True
        while self._items:
            item = self._items.popleft()
            self._give_back(cost(item.note, item.body))

    async def receive(self) -> Item | None:
        """The next item; None after the end. Raises the error given to fail(). One reader at a time."""
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            assert self._waiter is None, "two readers of one stream"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        self._give_back(cost(item.note, item.body))
        return item

    def _give_back(self, size: int) -> None:
        self._taken += size
        if self._taken >= _GIVE_BACK_BYTES:
            given, self._taken = self._taken, 0
            self.outstanding -= given
            self._credit(given)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Outbox:
    """The credit of a sender. One sender at a time keeps the order of its items."""

    def __init__(self) -> None:
        self._credit = STREAM_CREDIT_BYTES
        self._closed = False
        self._error: IdunnoError | None = None
        self._waiters: list[asyncio.Future[None]] = []

    async def reserve(self, size: int) -> bool:
        """Wait for credit and take it. False: the reader wants no more. Raises the error given to close()."""
        while True:
            if self._error is not None:
                raise self._error
            if self._closed:
                return False
            if self._credit >= size:
                self._credit -= size
                return True
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)

    def grant(self, size: int) -> None:
        """The reader gave credit back. Raises DecodeError when it gives more than was taken."""
        if size < 0 or self._credit + size > STREAM_CREDIT_BYTES:
            raise DecodeError(f"credit of {size} bytes for a stream that lacks {STREAM_CREDIT_BYTES - self._credit}")
        self._credit += size
        self._wake()

    def close(self, error: IdunnoError | None) -> None:
        """Nothing more is to be sent: senders get `error`, or with None their items are dropped quietly."""
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

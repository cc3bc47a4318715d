# idunno/client/session.py: one caller that stays connected to a living node of the cluster.
#
# Rule 1: every request of a client either only asks (Role.READER) or carries an id that makes it safe to send twice. So a
#         request is sent again, at the next node, on every retryable error, until the caller's time is over.
# Rule 2: what may have happened, or may yet, is never reported as certainly not done: if any attempt was left unconfirmed,
#         giving up is a DeadlineExceeded, whatever the last attempt said; that one may still be on its way.
# Rule 3: with no node ever reached, one round over all doors is enough: nobody waits 30 s to hear that nothing runs.
# Rule 4: once every door has refused us for PATIENCE_S, its node has ended and is not being restarted: nothing waits on for it.
#         Silence is no such sign: a network is mended, and the time given is waited.
# Rule 5: streams are not repeated here (their sender has to start again); they only get a connection that lives.
from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Protocol, TypeVar

import msgspec

from idunno.base.disk import Buffer
from idunno.base.errors import (
    DeadlineExceeded,
    IdunnoError,
    Unavailable,
    Unconfirmed,
    undecided,
)
from idunno.client.locate import Door, Place
from idunno.sdfs.asking import LAST_ATTEMPT_S, PATIENCE_S
from idunno.wire.calls import A, Actor, Caller, Empty, Item, Method, Q, Stream

CONNECT_TIMEOUT_S: Final = 3.0
"""For one door. A handshake takes milliseconds; a machine that is off would otherwise hold us for minutes."""
ATTEMPT_S: Final = 10.0
"""For one attempt, beyond what a long poll waits: a node that is frozen is left for another after this."""
PAUSE_MIN_S: Final = 0.05
PAUSE_MAX_S: Final = 1.0
"""Between attempts, doubling: an election takes about a second, so a few attempts fall into it."""
LOOKED_S: Final = 2 * (PAUSE_MAX_S + CONNECT_TIMEOUT_S)
"""Refusals further apart than this are not one absence: nobody looked in between, and the nodes may have run."""
R = TypeVar("R")


class NobodyLeft(Unavailable):
    """Every node has refused the connection for so long that asking again would not help."""

    retryable = False


class Link(Caller, Protocol):
    """One connection (rpc.Connection)."""

    @property
    def closed(self) -> bool: ...

    async def close(self) -> None: ...


Dial = Callable[[Door, float], Awaitable[Link]]
"""Opens a door within so many seconds. Raises Unavailable or DeadlineExceeded when nobody answers."""


class Session:
    """A Caller that goes on while at least one node behind `place` lives."""

    def __init__(self, place: Place, dial: Dial, rng: random.Random) -> None:
        self.place = place
        self.changed = False  # something was sent that changes the cluster
        self._dial = dial
        self._rng = rng
        self._now = rng.randrange(len(place.doors))  # clients spread over the nodes
        self._links: dict[int, Link] = {}
        self._reached = False
        self._refused: tuple[float, float] | None = None  # loop times: since when, and when last, all doors refused
        self._lock = asyncio.Lock()

    def caller(self) -> Caller:
        return self

    async def connect(self, timeout_s: float) -> None:
        """Reach one node, so that a wrong WHERE is reported before any work. Raises Unavailable."""
        await self._link(asyncio.get_running_loop().time() + timeout_s)

    async def call(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> A:
        async def once(link: Link, left_s: float) -> A:
            return await link.call(method, request, timeout_s=left_s, body=body, actor=actor)

        return await self._persist(once, method.name, method.changes, request, timeout_s)

    async def call_with_body(
        self, method: Method[Q, A], request: Q, *, timeout_s: float, body: Buffer = b"", actor: Actor | None = None
    ) -> tuple[A, bytes]:
        async def once(link: Link, left_s: float) -> tuple[A, bytes]:
            return await link.call_with_body(method, request, timeout_s=left_s, body=body, actor=actor)

        return await self._persist(once, method.name, method.changes, request, timeout_s)

    def open(self, method: Method[Q, A], request: Q, *, timeout_s: float, actor: Actor | None = None) -> Stream[A]:
        return _SessionStream(self, method, request, timeout_s, actor)

    def notify(self, method: Method[Q, Empty], request: Q | msgspec.Raw, body: Buffer = b"") -> bool:
        link = self._links.get(self._now)
        return link is not None and not link.closed and link.notify(method, request, body)

    async def close(self) -> None:
        links, self._links = list(self._links.values()), {}
        for link in links:
            await link.close()

    async def _persist(
        self,
        once: Callable[[Link, float], Awaitable[R]],
        name: str,
        changes: bool,
        request: msgspec.Struct,
        timeout_s: float,
    ) -> R:
        """Rules 1 to 3. `once` sends the request on a link, with the time it may take."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        asks = not changes
        again = asks or _has_id(request)
        unsure, pause_s = False, PAUSE_MIN_S
        last: IdunnoError = DeadlineExceeded(f"no time left for {name}: give a larger --timeout")
        tried = False
        while (left_s := end_s - loop.time()) > (LAST_ATTEMPT_S if tried else 0):
            tried = True
            reached = self._reached
            index = self._now
            try:
                link = await self._link(end_s)
                index = self._now
                self.changed = self.changed or not asks
                attempt_s = min(left_s, ATTEMPT_S + getattr(request, "wait_s", 0.0)) if again else left_s
                return await once(link, attempt_s)
            except IdunnoError as error:
                last = error
                goes_on = again and (error.retryable or isinstance(error, DeadlineExceeded))
                if unsure and not goes_on and undecided(error):
                    raise DeadlineExceeded(f"{name} was sent, its answer was lost; asked again: {error}") from error
                unsure = unsure or (error.may_have_happened and not asks)
                if not goes_on or (not reached and not self._reached):
                    raise
            self._leave(index)
            await asyncio.sleep(min(pause_s * self._rng.uniform(0.5, 1.0), max(0.0, end_s - loop.time())))
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
        if unsure and not isinstance(last, Unconfirmed):
            raise DeadlineExceeded(f"{name} was sent, no answer within {timeout_s:g} s ({last})") from last
        raise last

    def _leave(self, index: int) -> None:
        """Go to the next door. The old link stays open for streams that still use it."""
        if index == self._now:
            self._now = (self._now + 1) % len(self.place.doors)

    async def _link(self, end_s: float) -> Link:
        """A living connection. Raises Unavailable when no door opens, or none before `end_s`."""
        link = self._links.get(self._now)
        if link is not None and not link.closed:
            return link
        try:
            async with asyncio.timeout_at(end_s), self._lock:
                return await self._open_door()
        except TimeoutError:
            raise Unavailable(f"{self.place.where}: no node was reached in time: {self.place.next_step}") from None

    async def _open_door(self) -> Link:
        last: IdunnoError | None = None
        refused = True
        for _ in self.place.doors:
            link = self._links.get(self._now)
            if link is not None and not link.closed:
                return link
            try:
                link = await self._dial(self.place.doors[self._now], CONNECT_TIMEOUT_S)
            except IdunnoError as error:
                refused = refused and isinstance(error.__cause__, (ConnectionRefusedError, FileNotFoundError))
                if last is None or isinstance(last, (Unavailable, Unconfirmed)):
                    last = error  # a refusal says more than silence
                self._now = (self._now + 1) % len(self.place.doors)
            else:
                self._links[self._now] = link
                self._reached, self._refused = True, None
                return link
        absent_s = self._note_absence(refused)
        if last is not None and not isinstance(last, (Unavailable, Unconfirmed)):
            raise last
        count = len(self.place.doors)
        tried = "its node does not answer" if count == 1 else f"none of its {count} nodes answers"
        if absent_s >= PATIENCE_S:
            tried += f" for {absent_s:.0f} s"
            raise NobodyLeft(f"{self.place.where}: {tried} ({last}): {self.place.next_step}")
        raise Unavailable(f"{self.place.where}: {tried} ({last}): {self.place.next_step}")

    def _note_absence(self, refused: bool) -> float:
        """For how many seconds all doors have refused us, this round included."""
        now_s = asyncio.get_running_loop().time()
        if not refused:
            self._refused = None
            return 0.0
        since_s, looked_s = self._refused or (now_s, now_s)
        if now_s - looked_s > LOOKED_S:
            since_s = now_s
        self._refused = since_s, now_s
        return now_s - since_s


def _has_id(request: msgspec.Struct) -> bool:
    return any(getattr(request, field, "") for field in ("request", "put", "job"))


class _SessionStream(Stream[A]):
    """A stream whose connection is found when it is entered."""

    def __init__(
        self, session: Session, method: Method[Q, A], request: Q, timeout_s: float, actor: Actor | None
    ) -> None:
        self._session = session
        self._open: Callable[[Link], Stream[A]] = lambda link: link.open(
            method, request, timeout_s=timeout_s, actor=actor
        )
        self._asks = not method.changes
        self._timeout_s = timeout_s
        self._inner: Stream[A] | None = None
        self._index = -1  # of the door it went through

    async def __aenter__(self) -> Stream[A]:
        link = await self._session._link(asyncio.get_running_loop().time() + self._timeout_s)
        self._index = self._session._now
        self._session.changed = self._session.changed or not self._asks
        self._inner = self._open(link)
        return await self._inner.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._inner is not None, "left before it was entered"
        if isinstance(error, (Unavailable, Unconfirmed)):
            self._session._leave(self._index)  # whoever repeats it gets another node
        await self._inner.__aexit__(kind, error, trace)

    async def send(self, body: Buffer = b"", note: bytes = b"") -> None:
        await self._entered().send(body, note)

    async def end(self) -> None:
        await self._entered().end()

    async def receive(self) -> Item | None:
        return await self._entered().receive()

    async def answer(self) -> A:
        return await self._entered().answer()

    def _entered(self) -> Stream[A]:
        assert self._inner is not None, "use a stream inside `async with`"
        return self._inner

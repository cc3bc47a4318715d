# tests/simulation/loop.py: many machines' event loops on one virtual clock.
#
# Rule 1: time moves only when nothing is ready, and then to the next deadline. No thread, no socket, no sleep, no real clock.
# Rule 2: what is due at the same moment runs in the order in which it was asked for; tasks and futures hash by a serial
#         number, so that a set of them is walked in the same order in every process. Same inputs, same run.
# Rule 3: each start of a machine has a loop of its own. The callbacks of a dead one never run; those of a frozen one wait until
#         it thaws: first what the network brought, then the timers, as a real loop would find them.
# Rule 4: an error that nobody caught in a callback or a task is a finding of the world (`Scheduler.escaped`), never lost.
from __future__ import annotations

import asyncio
import contextvars
import enum
import heapq
import sys
import warnings
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.simulation.network import Host

STUCK_CALLBACKS: Final = 2_000_000
"""Callbacks at one moment of virtual time: a loop that never waits. The largest honest burst seen is below 20,000."""

LATE_S: Final = 0.000_05
"""How late a timer fires: a real loop never wakes exactly when it was asked to, and never before."""


class Stuck(AssertionError):
    """The simulated code spins: it never lets time pass."""


class State(enum.Enum):
    RUNNING, FROZEN, DEAD = "running", "frozen", "dead"


class Handle:
    """What asyncio calls Handle and TimerHandle, without what is not needed here."""

    __slots__ = ("args", "callback", "dead", "loop", "network", "time")

    def __init__(self, loop: SimLoop, time: float, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.loop, self.time, self.callback, self.args = loop, time, callback, args
        self.dead = self.network = False

    def cancel(self) -> None:
        self.dead = True
        self.callback, self.args = _nothing, ()

    def cancelled(self) -> bool:
        return self.dead

    def when(self) -> float:
        return self.time


def _nothing() -> None:
    return None


def _close_dropped(generator: Any) -> None:
    """As asyncio does: an asynchronous generator that was dropped half-way is closed by a task."""
    loop = events._get_running_loop()
    if isinstance(loop, SimLoop) and loop.state is State.RUNNING:
        loop.create_task(generator.aclose())


class SimFuture(asyncio.Future[Any]):
    def __init__(self, loop: SimLoop) -> None:
        super().__init__(loop=loop)
        self._serial = loop.scheduler.next_serial()

    def __hash__(self) -> int:
        return self._serial


class SimTask(asyncio.Task[Any]):
    def __init__(self, coro: Any, loop: SimLoop, name: str | None, context: contextvars.Context | None) -> None:
        self._serial = loop.scheduler.next_serial()
        super().__init__(coro, loop=loop, name=name or "task", context=context)

    def __hash__(self) -> int:
        return self._serial


class Scheduler:
    """The one clock and the one queue of a world."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        """Callbacks run so far."""
        self.escaped: list[str] = []
        self.ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._serial = 0
        self._stopping = False

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def at(self, handle: Handle) -> Handle:
        self._serial += 1
        heapq.heappush(self._timers, (handle.time, self._serial, handle))
        return handle

    def stretch(self, loop: SimLoop, factor: float) -> None:
        """What is left of the time of all timers of `loop` takes so much longer."""
        now = self.now
        timers = []
        for time, serial, handle in self._timers:
            if handle.loop is loop and not handle.network and time > now:
                handle.time = time = now + (time - now) * factor
            timers.append((time, serial, handle))
        heapq.heapify(timers)
        self._timers[:] = timers

    def stop(self) -> None:
        self._stopping = True

    def run(self, until_s: float) -> None:
        """Until `stop`, or until virtual time is `until_s`. Raises Stuck."""
        self._stopping = False
        ready, timers = self.ready, self._timers
        before = events._get_running_loop()  # a test may itself run in a loop
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(finalizer=_close_dropped)
        current: SimLoop | None = None
        steps = at_this_moment = 0
        try:
            while not self._stopping:
                if not ready:
                    while timers and timers[0][2].dead:
                        heapq.heappop(timers)
                    if not timers or timers[0][0] > until_s:
                        self.now = max(self.now, until_s)
                        return
                    if timers[0][0] > self.now:
                        self.now, at_this_moment = timers[0][0], 0
                    ready.append(heapq.heappop(timers)[2])
                handle = ready.popleft()
                if handle.dead:
                    continue
                loop = handle.loop
                if loop.state is not State.RUNNING:
                    loop.hold(handle)
                    continue
                if loop is not current:
                    current = loop
                    events._set_running_loop(loop)
                steps += 1
                at_this_moment += 1
                if at_this_moment > STUCK_CALLBACKS:
                    raise Stuck(
                        f"{loop.name} runs {STUCK_CALLBACKS} callbacks at {self.now:.3f} s; next {handle.callback!r}"
                    )
                try:
                    handle.callback(*handle.args)
                except Exception as error:  # noqa: BLE001 - as a real loop does; the world looks at what escaped
                    loop.call_exception_handler({"message": "callback failed", "exception": error, "handle": handle})
        finally:
            self.steps += steps
            events._set_running_loop(before)
            sys.set_asyncgen_hooks(*hooks)


class SimLoop(asyncio.AbstractEventLoop):
    """The event loop of one start of one machine."""

    def __init__(self, scheduler: Scheduler, name: str, host: Host | None = None) -> None:
        self.scheduler, self.name, self.host = scheduler, name, host
        self.state = State.RUNNING
        self.tasks: dict[SimTask, None] = {}
        """Under way, in the order in which they began."""
        self._rate = 1.0
        self._since = self._local = 0.0  # when the rate was last set, by the world's clock and by this machine's
        self._held: list[Handle] = []

    # -- what the world does to it --------------------------------------------------------------------------------

    def hold(self, handle: Handle) -> None:
        """Called instead of running `handle` while the machine does not run."""
        if self.state is State.FROZEN:
            self._held.append(handle)

    def freeze(self) -> None:
        if self.state is State.RUNNING:
            self.state = State.FROZEN

    def thaw(self) -> None:
        if self.state is State.FROZEN:
            self.state = State.RUNNING
            held, self._held = self._held, []
            self.scheduler.ready.extend(handle for handle in held if handle.network)
            self.scheduler.ready.extend(handle for handle in held if not handle.network)

    def kill(self) -> None:
        self.state = State.DEAD
        self._held.clear()

    def bury(self) -> None:
        """Let go of what a dead machine held, in a fixed order. Its `finally` blocks run now, and can do nothing."""
        assert self.state is State.DEAD
        tasks, self.tasks = list(self.tasks), {}
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a `finally` would still begin is never awaited
                for task in tasks:
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    try:
                        task.get_coro().close()
                    except BaseException as error:  # noqa: BLE001 - code that awaits in a `finally` cannot end quietly
                        error.__traceback__ = error.__context__ = error.__cause__ = None
        finally:
            events._set_running_loop(before)

    # -- time and callbacks ---------------------------------------------------------------------------------------

    def time(self) -> float:
        if self._rate == 1.0 and self._since == self._local:
            return self.scheduler.now
        return self._local + (self.scheduler.now - self._since) * self._rate

    def drift(self, rate: float) -> None:
        """From now on this machine's clock makes `rate` seconds of one: its timers come sooner or later."""
        now, before = self.scheduler.now, self._rate
        self._local, self._since, self._rate = self.time(), now, rate
        self.scheduler.stretch(self, before / rate)

    # Contexts are not entered: nothing in this project uses context variables, and each entry costs as much as the callback.
    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        handle = Handle(self, 0.0, callback, args)
        self.scheduler.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        return self.call_at(self.time() + delay, callback, *args)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        if self._rate != 1.0 or self._since != self._local:
            when = self._since + (when - self._local) / self._rate
        return self.scheduler.at(Handle(self, when + LATE_S, callback, args))

    def deliver_at(self, when: float, callback: Callable[..., Any], *args: Any) -> None:
        """As call_at, for what comes from the network or the disk: a frozen machine finds it before its timers."""
        handle = Handle(self, when, callback, args)
        handle.network = True
        self.scheduler.at(handle)

    def create_future(self) -> Any:
        return SimFuture(self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> Any:
        task = SimTask(coro, self, name, context)
        if self.state is State.DEAD:  # asked for by a `finally` that runs in `bury`
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coro.close()
            return task
        self.tasks[task] = None
        task.add_done_callback(self.tasks.pop)
        return task

    async def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """In the loop, one turn later: another callback may run before, as with a real thread."""
        await asyncio.sleep(0)
        return func(*args)

    # -- the network ----------------------------------------------------------------------------------------------

    def _network(self) -> Host:
        assert self.host is not None, f"{self.name} has no network"
        return self.host

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **kw: Any) -> Any:
        return self._network().listen(self, protocol_factory, port, tls=kw.get("ssl") is not None)

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **kw: Any) -> Any:
        return await self._network().connect(self, protocol_factory, host, port, tls=kw.get("ssl") is not None)

    async def create_datagram_endpoint(  # type: ignore[override]
        self, protocol_factory: Any, local_addr: Any = None, **kw: Any
    ) -> Any:
        return self._network().bind(self, protocol_factory, local_addr, kw.get("remote_addr"))

    async def getaddrinfo(self, host: Any, port: Any, **kw: Any) -> Any:
        return self._network().look_up(host, port)

    # -- the rest of the interface --------------------------------------------------------------------------------

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.state is State.DEAD:
            return
        error = context.get("exception")
        if isinstance(error, (AssertionError,)) and self.host is None:
            raise error  # a check of the world itself
        about = context.get("task") or context.get("future") or context.get("handle")
        what = getattr(about.get_coro(), "__qualname__", "") if isinstance(about, SimTask) else ""
        self.scheduler.escaped.append(f"{self.name}: {context.get('message')} {what}: {error!r}")
        self.scheduler.stop()

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def close(self) -> None:
        return None

    def run_alone(self, work: Coroutine[Any, Any, Any], until_s: float) -> Any:
        """Run the whole world until `work`, on this loop, is done. Raises what it raises, and TimeoutError at `until_s`."""
        task = self.create_task(work, name="main")
        task.add_done_callback(lambda _: self.scheduler.stop())
        self.scheduler.run(until_s)
        if not task.done():
            raise TimeoutError(f"the world's own story was not over at {until_s:g} s")
        return task.result()


def new_loop(scheduler: Scheduler, name: str, host: Host | None = None) -> SimLoop:
    # The interface has thirty methods that nobody here needs; asyncio's own base class raises NotImplementedError for them.
    return SimLoop(scheduler, name, host)  # type: ignore[abstract]

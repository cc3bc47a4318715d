# idunno/worker/runner.py: the agent's side of a model's child process.
#
# Rule 1: one request at a time, each with a deadline. Who asks and stops waiting (deadline, cancellation) has killed the
#         process: there is no other way to stop a model.
# Rule 2: the process leads a group of its own; what it forked dies with it.
# Rule 3: an error of a process that died carries how it ended (signal or exit status) and its last lines.
# Rule 4: its environment is made here, from a short list: nothing of the node's leaks into model code.
from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn, Protocol, TypeVar

import idunno
from idunno.base.errors import DecodeError, DiskFailed, InvalidArgument, ModelFailed, from_code
from idunno.worker import protocol
from idunno.worker.protocol import Answer, Count, Counted, Load, Loaded, Ran, Ready, Refused, Request, Run, one_line

log = logging.getLogger("idunno.worker")

START_S: Final = 30.0
"""To import the runtime: 0.1 s from a warm page cache, ten and more from a cold SD card."""
END_S: Final = 2.0
"""After its stdin is closed a child between requests ends within milliseconds; then it is killed."""
LINES_KEPT: Final = 20
LINE_CHARACTERS_MAX: Final = 300

REFUSALS: Final = (InvalidArgument.code, ModelFailed.code, DiskFailed.code)
"""What a child may refuse with. By any other word, "not ready" above all, it could have a task run for ever, uncounted."""

RUNNER: Final[dict[str, dict[str, str]]] = {
    "starting": {"ready": "idle", "died": "dead"},
    "idle": {"asked": "busy", "died": "dead"},
    "busy": {"answered": "idle", "died": "dead"},
    "dead": {"died": "dead"},
}

A = TypeVar("A", Loaded, Counted, Ran)


class Runner(Protocol):
    """A process that holds at most one model. Every method but `close` raises ModelFailed when the process died or was
    too slow (it is killed then), and what the child refused with: InvalidArgument for an unreadable input, ModelFailed
    with the model's own message."""

    @property
    def alive(self) -> bool: ...

    async def load(self, model: str, folder: str, runtime: str, *, threads: int, timeout_s: float) -> str:
        """Load the model from the absolute `folder`. Returns its signature, for people."""
        ...

    async def count(self, path: str, kind: str, *, timeout_s: float) -> int:
        """How many queries the input has."""
        ...

    async def run(self, path: str, kind: str, first: int, last: int, out_path: str, *, timeout_s: float) -> Ran:
        """Answer queries [first, last), as JSON lines in `out_path`."""
        ...

    async def close(self) -> None:
        """End the process; returns when it is gone."""
        ...


class RunnerFactory(Protocol):
    async def __call__(self) -> Runner:
        """A started process with its runtimes imported and no model. Raises ModelFailed when it does not start."""
        ...


class ChildFactory:
    """Starts real child processes. `folder` is their working directory, absolute."""

    def __init__(self, folder: str, environment: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._environment = child_environment(os.environ if environment is None else environment)

    async def __call__(self) -> Runner:
        loop = asyncio.get_running_loop()
        try:
            transport, pipes = await loop.subprocess_exec(
                lambda: Pipes(loop),
                sys.executable,
                "-P",  # never import from the working directory
                "-m",
                "idunno.worker.child",
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
        except OSError as error:
            raise ModelFailed(f"no process for a model can be started: {error}") from error
        runner = ChildRunner(transport, pipes)
        await runner.started()
        return runner


class Pipes(asyncio.subprocess.SubprocessStreamProtocol):
    """The process's pipes as streams, and its exit at the moment it happens: `Process.wait` may wait for a grandchild
    that holds a pipe open."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=64 * 1024, loop=loop)
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        super().process_exited()
        self.exited.set()


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` a model's process gets to see."""
    kept = {
        k: environment[k] for k in ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "TMPDIR") if k in environment
    }
    package_parent = str(Path(idunno.__file__).resolve().parent.parent)
    paths = [package_parent, environment.get("PYTHONPATH", "")]
    # numpy's own thread pool would cost each child a stack per core, and is never used: the runtime has its own.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **threads, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


class ChildRunner:
    """Implements Runner over a child process (child.py)."""

    def __init__(self, transport: asyncio.SubprocessTransport, pipes: Pipes) -> None:
        self._transport, self._exited = transport, pipes.exited
        if pipes.stdin is None or pipes.stdout is None or pipes.stderr is None:
            raise AssertionError("a model's process has three pipes")
        self._stdin, self._stdout, self._stderr = pipes.stdin, pipes.stdout, pipes.stderr
        self._state = "starting"
        self._model = ""
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._end_group())]

    @property
    def alive(self) -> bool:
        return self._state != "dead" and not self._exited.is_set()

    @property
    def pid(self) -> int:
        return self._transport.get_pid()

    @property
    def returncode(self) -> int | None:
        """None while it runs, negative for a signal."""
        return self._transport.get_returncode()

    async def started(self) -> None:
        """Raises ModelFailed when the process does not come up within START_S."""
        answer = await self._answer("start", START_S)
        if not isinstance(answer, Ready):
            await self._broken(f"its first word is {type(answer).__name__}")
        self._step("ready")

    async def load(self, model: str, folder: str, runtime: str, *, threads: int, timeout_s: float) -> str:
        self._model = model
        return (await self._ask(Load(folder, runtime, threads), Loaded, "load", timeout_s)).signature

    async def count(self, path: str, kind: str, *, timeout_s: float) -> int:
        return (await self._ask(Count(path, kind), Counted, "count the queries", timeout_s)).queries

    async def run(self, path: str, kind: str, first: int, last: int, out_path: str, *, timeout_s: float) -> Ran:
        return await self._ask(Run(path, kind, first, last, out_path), Ran, "finish a task", timeout_s)

    async def close(self) -> None:
        if self._state == "idle":
            self._stdin.close()
            if not await self._ends(END_S):
                log.info("model process killed at its end", extra={"model": self._model, "pid": self.pid})
        await self._bury()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _step(self, event: str) -> None:
        new = RUNNER[self._state].get(event)
        if new is None:
            raise AssertionError(f"runner of {self._model!r}: no {event!r} in {self._state!r}")
        self._state = new

    async def _ask(self, request: Request, kind: type[A], what: str, timeout_s: float) -> A:
        if not self.alive:
            await self._bury()
            raise ModelFailed(self._epitaph())
        self._step("asked")
        try:
            self._stdin.write(protocol.encode(request))  # a few hundred bytes: the pipe takes them at once
        except (BrokenPipeError, ConnectionResetError):
            await self._bury()
            raise ModelFailed(self._epitaph()) from None
        answer = await self._answer(what, timeout_s)
        self._step("answered")
        if isinstance(answer, Refused):
            code = answer.code if answer.code in REFUSALS else ModelFailed.code
            raise from_code(code, one_line(answer.text, characters_max=1000))
        if not isinstance(answer, kind):
            await self._broken(f"answered {type(answer).__name__} to {type(request).__name__}")
        return answer

    async def _answer(self, what: str, timeout_s: float) -> Answer:
        """The next answer. However this ends without one, the process is gone."""
        try:
            async with asyncio.timeout(timeout_s):
                head = await self._stdout.readexactly(protocol.LENGTH.size)
                return protocol.decode_answer(await self._stdout.readexactly(protocol.frame_length(head)))
        except TimeoutError:
            await self._bury()
            slow = f"model {self._name} did not {what} within {timeout_s:g} s and was killed"
            raise ModelFailed(slow + self._last()) from None
        except DecodeError as error:
            await self._broken(str(error))
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._bury()
            raise ModelFailed(self._epitaph()) from None
        except BaseException:
            self._kill()
            self._state = "dead"
            raise

    async def _broken(self, how: str) -> NoReturn:
        await self._bury()
        raise ModelFailed(f"the process of model {self._name} broke the protocol and was killed: {how}")

    def _kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # the whole group is gone

    async def _ends(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._exited.wait()
        except TimeoutError:
            return False
        return True

    async def _end_group(self) -> None:
        """What the process forked dies with it, and lets go of the pipes."""
        await self._exited.wait()
        self._kill()

    async def _bury(self) -> None:
        """Kill what is left of the group and wait until the process is reaped and its last lines are read."""
        if self._stdout.at_eof():
            await self._ends(END_S)  # it is ending by itself: its own exit status is the better story
        if not self._exited.is_set():
            self._kill()
        await self._exited.wait()
        self._step("died")
        # A grandchild that left the group may hold the pipe open: what was said so far is enough.
        _, pending = await asyncio.wait(self._tasks, timeout=END_S)
        for task in pending:
            task.cancel()
        self._transport.close()

    async def _listen(self) -> None:
        """Keep the last lines that the process said. What came before is gone: a model may print without end."""
        rest = ""
        while piece := await self._stderr.read(64 * 1024):
            *lines, rest = (rest + piece.decode("utf-8", "replace")).splitlines() or [""]
            self._lines.extend(one_line(line, characters_max=LINE_CHARACTERS_MAX) for line in lines[-LINES_KEPT:])
            rest = rest[-LINE_CHARACTERS_MAX:]
            if piece.endswith(b"\n"):
                self._lines.append(one_line(rest, characters_max=LINE_CHARACTERS_MAX))
                rest = ""
        if rest:
            self._lines.append(one_line(rest, characters_max=LINE_CHARACTERS_MAX))

    @property
    def _name(self) -> str:
        return self._model or "(none loaded)"

    def _last(self) -> str:
        said = [line for line in self._lines if line]
        # The newest end of it: an error that stands in the log has at most 1,000 characters.
        return f"; last lines: {' | '.join(said)[-600:]}" if said else ""

    def _epitaph(self) -> str:
        return f"model {self._name} died: {ending(self.returncode)}{self._last()}"


def ending(returncode: int | None) -> str:
    """How a process ended, for people."""
    if returncode is None:
        return "its process did not end"
    if returncode < 0:
        return f"signal {-returncode} ({(signal.strsignal(-returncode) or 'unknown').lower()})"
    return f"exit status {returncode}"

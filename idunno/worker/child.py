# idunno/worker/child.py: the process that holds one model, started by the agent (runner.py) as `python -m idunno.worker.child`.
#
# Rule 1: it dies with the agent: by signal when the agent's process ends, and at the end of stdin.
# Rule 2: stdin and stdout belong to the protocol. A model that prints writes to stderr, whatever it prints with.
# Rule 3: it runs below the node's own priority, leaves no core file, and has no secrets in its environment (runner.py).
# Rule 4: a request fails with one error and the child lives on. What it cannot survive kills it, and the agent says how.
# Rule 5: this process is its own composition root: it alone reads the clock and the file system here.
from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import IO, Final

import msgspec

from idunno.base.errors import DiskFailed, IdunnoError, InvalidArgument, ModelFailed
from idunno.coordinator.timing import TimingTotal
from idunno.worker import protocol
from idunno.worker.data import Bad, Budget, Chunk, Source, open_source
from idunno.worker.protocol import Answer, Count, Counted, Load, Loaded, Ran, Ready, Refused, Request, Run, one_line
from idunno.worker.runtimes import Answered, Model, load_model

NICE: Final = 5
"""Below the node: its heartbeats and the log's syncs must not wait behind a model."""
SOURCES_MAX: Final = 2
"""Inputs kept open, so that a zip's index is read once and not once a task: this job's, and one more."""
OUTPUT_BYTES_MAX: Final = 1024**3
"""Of one task. A model that answers with more than a gigabyte a batch fills disks: use a smaller batch."""
_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>


class Child:
    """What the process holds: a model and the inputs it read last. `handle` answers one request."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._sources: dict[tuple[str, str], Source] = {}
        self._lines = msgspec.json.Encoder()

    def handle(self, request: Request) -> Answer:
        try:
            match request:
                case Load():
                    self._model = load_model(request.runtime, request.folder, request.threads)
                    return Loaded(self._model.signature)
                case Count():
                    return Counted(self._source(request.path, request.kind).count())
                case Run():
                    return self._run(request)
        except IdunnoError as error:
            return Refused(error.code, one_line(str(error)))
        except OSError as error:
            return Refused(DiskFailed.code, one_line(f"the worker's disk refused: {error.strerror or error}"))
        except MemoryError:
            return Refused(ModelFailed.code, "out of memory in the model's process: use a smaller batch")

    def _source(self, path: str, kind: str) -> Source:
        key = (path, kind)
        source = self._sources.pop(key, None)
        if source is None:
            while len(self._sources) >= SOURCES_MAX:
                oldest = next(iter(self._sources))
                self._sources.pop(oldest).close()
            source = open_source(path, kind)
        self._sources[key] = source  # the one used last stands last
        return source

    def _run(self, task: Run) -> Ran:
        model = self._model
        if model is None:
            raise AssertionError("a task before a model was loaded")
        source = self._source(task.path, task.kind)
        if not 0 <= task.first < task.last:
            raise InvalidArgument(f"a task has at least one query, not [{task.first}, {task.last})")
        done = errors = size = 0
        budget, timing = Budget(), TimingTotal()
        with open(task.out_path, "wb") as out:
            for first in range(task.first, task.last, model.rows_max):
                started = time.perf_counter_ns()
                chunk = source.read(first, min(first + model.rows_max, task.last), budget)
                if not chunk.ids:
                    raise InvalidArgument(f"the input ends before query {first} of the task")
                answers = model.predict(chunk)
                each_us = (time.perf_counter_ns() - started) // 1000 // len(answers)
                timing.measure(each_us, len(answers))
                for block in self._encode(chunk, answers):
                    size += len(block)
                    if size > OUTPUT_BYTES_MAX:
                        raise ModelFailed(
                            f"the output of one task passes {OUTPUT_BYTES_MAX} bytes: use a smaller batch"
                        )
                    out.write(block)
                bad = sum(isinstance(answer, Bad) for answer in answers)
                done, errors = done + len(answers) - bad, errors + bad
        return Ran(done, errors, size, timing.record())

    def _encode(self, chunk: Chunk, answers: list[Answered | Bad]) -> Iterator[bytes]:
        """The answers as JSON lines, some at a time. NaN and infinities become null: JSON has no words for them."""
        for at in range(0, len(answers), 1024):
            lines = [
                {"query": name, "error": answer.error}
                if isinstance(answer, Bad)
                else {"query": name, "output": answer.output}
                for name, answer in zip(chunk.ids[at : at + 1024], answers[at : at + 1024], strict=True)
            ]
            try:
                yield self._lines.encode_lines(lines)
            except (TypeError, ValueError, UnicodeEncodeError, RecursionError) as error:
                raise ModelFailed(f"an output cannot be written as JSON: {error}") from error


def _confine(parent: int) -> None:
    """Die with the parent, below its priority, and leave no core file."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICE)


def _requests(stdin: IO[bytes]) -> Iterator[Request]:
    while len(head := stdin.read(protocol.LENGTH.size)) == protocol.LENGTH.size:
        length = protocol.frame_length(head)
        payload = stdin.read(length)
        if len(payload) < length:
            return
        yield protocol.decode_request(payload)


def main() -> None:
    _confine(int(sys.argv[1]))
    # A copy of stdout that nothing else knows; whatever a model writes to descriptor 1 goes to stderr.
    answers = os.fdopen(os.dup(1), "wb")
    os.set_inheritable(answers.fileno(), False)
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import onnxruntime  # noqa: F401 - a warm process has its runtime imported before there is a model

    child = Child()
    answers.write(protocol.encode(Ready()))
    answers.flush()
    for request in _requests(requests):
        answers.write(protocol.encode(child.handle(request)))
        answers.flush()


if __name__ == "__main__":
    main()

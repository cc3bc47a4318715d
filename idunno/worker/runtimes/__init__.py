# idunno/worker/runtimes: what carries a kind of model out, in the child process.
#
# Rule 1: a runtime is imported only in the child. The agent knows its name alone.
# Rule 2: a row that cannot be used gets an error of its own; only a batch that the model itself rejects raises ModelFailed.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from idunno.base.errors import InvalidArgument
from idunno.worker.data import Bad, Chunk


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model says to one query: a JSON value (numbers, text, lists, dicts)."""

    output: object


class Model(Protocol):
    """A loaded model."""

    @property
    def signature(self) -> str:
        """Its inputs and outputs, in one line, for people."""
        ...

    @property
    def rows_max(self) -> int:
        """How many queries to hand over at once, so that their tensors stay within CHUNK_BYTES."""
        ...

    def predict(self, chunk: Chunk) -> list[Answered | Bad]:
        """One answer a query, in order. Raises ModelFailed when the model rejects the batch."""
        ...


CHUNK_BYTES: Final = 128 * 1024 * 1024
"""Of input tensors in one run of the model: 200 images of 3x224x224; larger batches are run in parts."""


def _onnx(folder: str, threads: int) -> Model:
    from idunno.worker.runtimes.onnx import OnnxModel

    return OnnxModel(folder, threads)


RUNTIMES: Final[dict[str, Callable[[str, int], Model]]] = {"onnx": _onnx}


def load_model(runtime: str, folder: str, threads: int) -> Model:
    """Raises InvalidArgument for an unknown runtime, ModelFailed when the model cannot be loaded."""
    make = RUNTIMES.get(runtime)
    if make is None:
        raise InvalidArgument(f"unknown runtime {runtime[:40]!r}: known are {', '.join(RUNTIMES)}")
    return make(folder, threads)

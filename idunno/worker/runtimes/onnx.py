# idunno/worker/runtimes/onnx.py: ONNX models on the CPU, by onnxruntime.
#
# Rule 1: the first axis of every input and output is the queries. A model with a fixed first axis gets exactly that many
#         rows a run, the last ones repeated where they are too few.
# Rule 2: a chunk is one run of the session; rows of different shapes (an input with open axes) are one run a shape.
# Rule 3: files besides the model (external data) are read only inside the model's folder: onnxruntime checks it.
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from idunno.base.errors import ModelFailed
from idunno.worker.data import Array, Bad, Chunk
from idunno.worker.protocol import one_line
from idunno.worker.runtimes import CHUNK_BYTES, Answered
from idunno.worker.runtimes.prepare import Input, RowError, cast, fit, row

ROWS_MAX: Final = 65_536
"""Of one run, however small the rows: their answers are Python values for a moment, about 1 KB each."""

_DTYPES: Final[Mapping[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}


class OnnxModel:
    """A session on one model file. Implements runtimes.Model."""

    def __init__(self, folder: str, threads: int) -> None:
        path = _model_file(folder)
        name = os.path.basename(path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only: warnings of the optimizer are no news to a user
        # Threads that spin after a run would take the cores from the other models of this machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelFailed(f"{name} cannot be loaded: {one_line(_plain(str(error)))}") from error
        self._inputs, batches = _inputs(self._session)
        self._outputs = [output.name for output in self._session.get_outputs()]
        fixed = {n for n in batches if n is not None}
        if len(fixed) > 1:
            raise ModelFailed(f"{name} takes {sorted(fixed)} rows at once by different inputs: they must agree")
        self._batch = fixed.pop() if fixed else None
        row_bytes = sum(one.row_bytes for one in self._inputs)
        batch = self._batch or 1
        self.rows_max = max(1, min(ROWS_MAX, CHUNK_BYTES // row_bytes) // batch) * batch

    @property
    def signature(self) -> str:
        rows = f" ({self._batch} rows a run)" if self._batch else ""
        return f"{', '.join(map(str, self._inputs))} -> {', '.join(self._outputs)}{rows}"

    def predict(self, chunk: Chunk) -> list[Answered | Bad]:
        if isinstance(chunk.rows, np.ndarray):
            return self._array(chunk.rows)
        answers: list[Answered | Bad] = [Bad("was not answered")] * len(chunk.ids)
        groups: dict[tuple[tuple[int, ...], ...], tuple[list[int], list[list[Array]]]] = {}
        for at, value in enumerate(chunk.rows):
            try:
                feeds = [row(part, one) for part, one in zip(self._split(value), self._inputs, strict=True)]
            except RowError as error:
                answers[at] = Bad(one_line(str(error)))
                continue
            places, rows = groups.setdefault(tuple(feed.shape for feed in feeds), ([], []))
            places.append(at)
            rows.append(feeds)
        for places, rows in groups.values():
            columns = [np.stack([feeds[i] for feeds in rows]) for i in range(len(self._inputs))]
            for at, output in zip(places, self._run(columns, len(places)), strict=True):
                answers[at] = Answered(output)
        return answers

    def _array(self, array: Array) -> list[Answered | Bad]:
        """Rows that are one array already have one shape and type: all of them fit, or none does."""
        if len(self._inputs) > 1:
            names = ", ".join(one.name for one in self._inputs)
            return [Bad(f"is an array, but the model has several inputs ({names}): use .jsonl or .csv")] * len(array)
        wanted = self._inputs[0]
        try:
            fit(array[0], wanted)
            fitted = cast(array, wanted)
        except RowError as error:
            if array.shape[0] > 1 and array.dtype.kind in "iuf" and wanted.dtype.kind in "iu":
                return self.predict(
                    Chunk(list(range(len(array))), list(array))
                )  # find the rows whose values do not fit
            return [Bad(str(error))] * len(array)
        shape = fit(fitted[0], wanted).shape
        outputs = self._run([fitted.reshape(len(array), *shape)], len(array))
        return [Answered(output) for output in outputs]

    def _split(self, value: object) -> list[object]:
        """A query's value, one part an input. Raises RowError."""
        names = [one.name for one in self._inputs]
        if isinstance(value, dict):
            if all(name in value for name in names):
                return [value[name] for name in names]
            if len(names) == 1 and not any(isinstance(part, dict) for part in value.values()):
                return [list(value.values())]  # a record with named fields: its values, in order
            raise RowError(f"has fields {', '.join(map(str, value))}; the model's inputs are {', '.join(names)}")
        if len(names) == 1 or isinstance(value, Bad):
            return [value] * len(names)
        raise RowError(f"has one value, the model's inputs are {', '.join(names)}: use an object with these names")

    def _run(self, columns: list[Array], rows: int) -> list[object]:
        """The outputs of `rows` rows, as JSON values."""
        step = self._batch or rows
        values: list[object] = []
        for first in range(0, rows, step):
            real = min(step, rows - first)
            part = [column[first : first + real] for column in columns]
            if real < step:
                part = [np.concatenate([column, np.repeat(column[-1:], step - real, axis=0)]) for column in part]
            values += self._run_once(part, step)[:real]
        return values

    def _run_once(self, columns: list[Array], rows: int) -> list[object]:
        feeds = {one.name: np.ascontiguousarray(c) for one, c in zip(self._inputs, columns, strict=True)}
        try:
            results = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise ModelFailed(f"the model rejected a batch of {rows}: {one_line(str(error))}") from error
        listed = [_rows(name, result, rows) for name, result in zip(self._outputs, results, strict=True)]
        if len(listed) == 1:
            return listed[0]
        return [dict(zip(self._outputs, together, strict=True)) for together in zip(*listed, strict=True)]


def _rows(name: str, result: Any, rows: int) -> list[object]:
    """An output as one JSON value a row. Raises ModelFailed when its first axis is not the rows."""
    if isinstance(result, np.ndarray):
        if result.ndim and result.shape[0] == rows:
            return result.tolist()  # type: ignore[no-any-return]
        if result.ndim == 0 and rows == 1:
            return [result.item()]
        raise ModelFailed(
            f"output {name} has shape {list(result.shape)} for {rows} rows: its first axis must be the rows"
        )
    if isinstance(result, list) and len(result) == rows:  # a sequence: scikit-learn's probabilities by class
        return [item.tolist() if isinstance(item, np.ndarray) else item for item in result]
    raise ModelFailed(f"output {name} is no tensor and no sequence of {rows} items")


def _inputs(session: ort.InferenceSession) -> tuple[list[Input], list[int | None]]:
    """The inputs, and how many rows each wants at once (None: any). Raises ModelFailed."""
    inputs: list[Input] = []
    batches: list[int | None] = []
    for one in session.get_inputs():
        if one.type not in _DTYPES:
            raise ModelFailed(f"input {one.name} is of type {one.type}, which is not supported")
        if not one.shape:
            raise ModelFailed(f"input {one.name} has no axes: its first axis must be the queries")
        axes = [n if isinstance(n, int) and n > 0 else None for n in one.shape]
        batches.append(axes[0])
        inputs.append(Input(one.name, np.dtype(_DTYPES[one.type]), tuple(axes[1:])))
    if not inputs:
        raise ModelFailed("the model has no inputs")
    return inputs, batches


def _model_file(folder: str) -> str:
    """The model in its folder: model.onnx, else the only .onnx file. Raises ModelFailed."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".onnx"))
    if "model.onnx" in names:
        names = ["model.onnx"]
    if len(names) != 1:
        found = f"has {len(names)} .onnx files" if names else "has no .onnx file"
        raise ModelFailed(f"the model's folder {found}: name the one to load model.onnx")
    return os.path.join(folder, names[0])


_NOISE: Final = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : (\w+) : "
    r"(?:Load model from .*? failed:)?"
    r"(?:/\S+:\d+ [^(]*\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? )?"  # where in its source
)


def _plain(text: str) -> str:
    """onnxruntime's message without its number, its source and the path of our copy, which differs on each node: the reason."""
    found = _NOISE.match(text)
    return f"{text[found.end() :].strip()} ({found[1]})" if found else text

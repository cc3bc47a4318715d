# What the worker's tests share: small models, inputs, and a file store in memory.
from __future__ import annotations

import asyncio
import io
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import blake3
import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image

from idunno.base.errors import Unavailable
from idunno.base.ids import BlockId
from idunno.coordinator.records import Block, ModelFile
from idunno.scheduler.messages import Assignment
from idunno.sdfs.client import Uploaded
from idunno.sdfs.download import Sink
from idunno.sdfs.upload import Source

EXAMPLES: Final = Path(__file__).parents[3] / "examples" / "digits"


def labels() -> dict[str, int]:
    rows = (EXAMPLES / "labels.csv").read_text().splitlines()[1:]
    return {name: int(label) for name, label in (row.split(",") for row in rows)}


def png(width: int = 8, height: int = 8, value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height), value).save(out, "PNG")
    return out.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def save_model(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    constants: Sequence[onnx.TensorProto] = (),
) -> Path:
    """An ONNX model in the folder `path`; inputs and outputs are {name: (type, shape)}."""
    path.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (path / "model.onnx").write_bytes(model.SerializeToString())
    return path


def add_one(path: Path, width: int = 2, *, batch: int | str = "N") -> Path:
    """y = x + 1 for x of float32 [batch, width]."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    shape = [batch, width]
    return save_model(
        path,
        [helper.make_node("Add", ["x", "one"], ["y"])],
        {"x": (TensorProto.FLOAT, shape)},
        {"y": (TensorProto.FLOAT, shape)},
        [one],
    )


def endless(path: Path) -> Path:
    """A model that is right and never returns: a Loop of 2^62 rounds."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Sin", ["value"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    return save_model(
        path,
        [helper.make_node("Loop", ["rounds", "yes", "x"], ["y"], body=body)],
        {"x": (TensorProto.FLOAT, ["N", 2])},
        {"y": (TensorProto.FLOAT, ["N", 2])},
        [
            helper.make_tensor("rounds", TensorProto.INT64, [], [2**62]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        ],
    )


class MemoryFiles:
    """The file store as the worker sees it. `fetches` and `uploads` tell what was asked for."""

    def __init__(self) -> None:
        self.content: dict[BlockId, bytes] = {}
        self.fetches: list[str] = []
        self.uploads: dict[str, bytes] = {}  # by put id
        self.names: dict[str, str] = {}
        self.gate = asyncio.Event()  # fetches wait for it
        self.gate.set()
        self.failing = 0  # so many of the next uploads fail

    def add(self, content: bytes, *, block_bytes: int = 1 << 20) -> tuple[Block, ...]:
        blocks = []
        for at in range(0, len(content), block_bytes):
            piece = content[at : at + block_bytes]
            block = BlockId(blake3.blake3(piece).hexdigest())
            self.content[block] = piece
            blocks.append(Block(block, len(piece)))
        return tuple(blocks)

    def model(self, model: str, folder: Path, *, version: int = 1) -> Assignment:
        files = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            content = path.read_bytes()
            inside = path.relative_to(folder).as_posix()
            files.append(ModelFile(inside, f".idunno/models/{model}/{inside}", 1, len(content), self.add(content)))
        return Assignment(model, version, "onnx", files)

    async def fetch(self, blocks: Sequence[Block], sink: Sink, *, what: str, timeout_s: float) -> None:
        self.fetches.append(what)
        await self.gate.wait()
        offset = 0
        for block in blocks:
            if block.block not in self.content:
                raise Unavailable(f"{what}: nobody has block {block.block[:16]}")
            await sink(offset, self.content[block.block])
            offset += block.size

    async def upload(
        self, source: Source, name: str, *, size: int | None, timeout_s: float, system: bool, put: str
    ) -> Uploaded:
        assert system
        if self.failing:
            self.failing -= 1
            raise Unavailable("no node can take blocks")
        pieces = []
        while piece := await source(64 * 1024):
            pieces.append(bytes(piece))
        content = b"".join(pieces)
        assert size == len(content)
        self.uploads[put], self.names[put] = content, name
        return Uploaded(put, len(content), self.add(content))


async def until(condition: Callable[[], bool], *, within_s: float = 20.0) -> None:
    """Let others run until `condition` holds."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - conditions of real processes, which tell nobody
            await asyncio.sleep(0.005)


def rng() -> random.Random:
    return random.Random(1)

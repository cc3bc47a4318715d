# idunno/coordinator/names.py: which names the machine itself accepts.
#
# Rule 1: apply must answer alike on every node, whatever Python it runs on: only fixed ranges of characters count.
from __future__ import annotations

from typing import Final

from idunno.base.errors import InvalidArgument
from idunno.base.ids import BlockId

SYSTEM: Final = ".idunno/"
REQUEST_BYTES_MAX: Final = 128
"""A request or put id: a UUID four times over, and short enough to stand in every version."""


def check_request(kind: str, request: str) -> str:
    """`request` itself if it can be a request's or put's id. Raises InvalidArgument."""
    if not request.isascii() or not request.isprintable() or not 1 <= len(request) <= REQUEST_BYTES_MAX:
        raise InvalidArgument(f"{request[:80]!r} is no {kind} id: 1 to {REQUEST_BYTES_MAX} printable ASCII characters")
    return request


def is_block_id(block: BlockId) -> bool:
    return len(block) == 64 and all(c in "0123456789abcdef" for c in block)


def job_directory(job: str) -> str:
    return f"{SYSTEM}jobs/{job}/"


def input_name(job: str) -> str:
    """Where a client puts the input of a job before submitting it."""
    return f"{job_directory(job)}input"


def output_name(job: str, task: int) -> str:
    """Where the output of a task goes: JSON lines."""
    return f"{job_directory(job)}output/{task:06d}.jsonl"


def model_directory(model: str) -> str:
    """Below it a client puts the files of a model before deploying it, in a directory for each deploy."""
    return f"{SYSTEM}models/{model}/"


def model_of(name: str) -> str | None:
    """The model whose file `name` is, None when it is no such name."""
    parts = name.split("/")
    return parts[2] if len(parts) >= 5 and parts[:2] == [".idunno", "models"] else None


def input_of(name: str) -> str | None:
    """The job whose input `name` is, None when it is no such name."""
    parts = name.split("/")
    return parts[2] if len(parts) == 4 and parts[:2] == [".idunno", "jobs"] and parts[3] == "input" else None


def job_of(name: str) -> str | None:
    """The job whose file `name` is, input or output; None when it is no such name."""
    parts = name.split("/")
    return parts[2] if len(parts) >= 4 and parts[:2] == [".idunno", "jobs"] else None

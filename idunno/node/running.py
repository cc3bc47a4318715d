# idunno/node/running.py: running the node of a directory in the foreground. Little is loaded before that is wanted.
from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from idunno.node.garbage import lasting

T = TypeVar("T")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop where there is one."""
    import asyncio  # not at the top: it is a fifth of what `run` loads, without looking for garbage

    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def run(directory: Path, seed: str | None = None, *, verbose: bool = False) -> None:
    """Run the node of `directory` in the foreground until SIGINT or SIGTERM."""
    with lasting():
        from idunno.node.config import load_config, parse_address
        from idunno.node.identity import check_settled, load_identity
        from idunno.node.process import run_node

    if seed is not None:
        parse_address(seed)
    check_settled(directory)
    config = load_config(directory)
    identity = load_identity(directory)
    run_async(run_node(directory, config, identity, seed, verbose=verbose))

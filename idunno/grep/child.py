# idunno/grep/child.py: a process that searches one node's logs for one query, and ends.
#
#   python -m idunno.grep.child  < Order in MessagePack  > answers in MessagePack, one after another
#
# Rule 1: it is the node's to kill: an expression that backtracks for ever ends with the query's deadline, and the kernel's
#         limit on processor time ends it even when the node itself has died.
# Rule 2: it writes as fast as the node reads; a full pipe holds it up.
# Rule 3: an answer is ("lines", packed LineBatch), and at the end one ("done", NodeResult) or ("error", code, text).
from __future__ import annotations

import gzip
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO, Final

import msgspec

from idunno.base.errors import DiskFailed, IdunnoError
from idunno.grep.engine import Search, log_order
from idunno.grep.messages import LineBatch, NodeResult, Order

CHUNK_BYTES: Final = 1024 * 1024
FILES_MAX: Final = 256
MEMORY_BYTES_MAX: Final = 1024 * 1024 * 1024
"""Address space. Python and one block need 50 MB; an expression gone wild ends here rather than in the node's memory."""
NICENESS: Final = 5
"""A search gives way to the detector and to consensus on a machine of two cores."""


def open_logs(directory: str) -> list[tuple[str, BinaryIO]]:
    """The log files, oldest first, all opened now.

    The newest is opened first: a rotation in between shows a file twice (seen by its inode, and dropped), never not at all.
    """
    try:
        names = {name: key for name in os.listdir(directory) if (key := log_order(name)) is not None}
    except OSError as error:
        raise DiskFailed(f"cannot read the logs in {directory}: {error.strerror}") from error
    opened: list[tuple[str, BinaryIO]] = []
    seen: set[tuple[int, int]] = set()
    for name in sorted(names, key=names.__getitem__, reverse=True)[:FILES_MAX]:
        try:
            handle = open(os.path.join(directory, name), "rb", buffering=0)  # noqa: SIM115  they live as long as the process
        except FileNotFoundError:
            continue  # rotated away since it was listed: its bytes are in another name
        except OSError as error:
            raise DiskFailed(f"cannot read {name}: {error.strerror}") from error
        stat = os.fstat(handle.fileno())
        if (stat.st_dev, stat.st_ino) not in seen:
            seen.add((stat.st_dev, stat.st_ino))
            opened.append((name, handle))
    return opened[::-1]


def chunks(name: str, handle: BinaryIO) -> Iterator[bytes]:
    if name.endswith(".gz"):
        with gzip.open(handle, "rb") as unpacked:
            while chunk := unpacked.read(CHUNK_BYTES):
                yield chunk
        return
    left = os.fstat(handle.fileno()).st_size  # what is written from now on is not searched: it need never end
    while left > 0 and (chunk := handle.read(min(left, CHUNK_BYTES))):
        left -= len(chunk)
        yield chunk


def run(order: Order, out: BinaryIO) -> None:
    encode = msgspec.msgpack.encode
    began_s = time.perf_counter()
    search = Search(order.query, order.node)
    for name, handle in open_logs(order.directory):
        for batch in search.file(name, chunks(name, handle)):
            out.write(encode(("lines", encode(LineBatch(batch)))))
            out.flush()
        handle.close()
        if search.found.truncated:
            break
    found = search.found
    problem = "; ".join(found.problems)[:1_000]
    seconds = time.perf_counter() - began_s
    out.write(encode(("done", NodeResult(found.count, seconds, found.truncated, found.lines_skipped, problem))))
    out.flush()


def main() -> int:
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Order)
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (order.seconds_max, order.seconds_max + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    try:
        run(order, sys.stdout.buffer)
    except BrokenPipeError:
        return 1  # the node has gone, or wants no more
    except IdunnoError as error:
        sys.stdout.buffer.write(msgspec.msgpack.encode(("error", error.code, str(error))))
    except MemoryError:
        text = f"the pattern needs more than {MEMORY_BYTES_MAX >> 20} MiB of memory; make it simpler"
        sys.stdout.buffer.write(msgspec.msgpack.encode(("error", "exhausted", text)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One node in the foreground that prints one line for each change of a member, flushed at once:

python -m bench.agent DIR

For harnesses that stamp lines when they arrive (bench/beside.py). A node directory is named n1, n2, ..., and so is its node.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from idunno.base.errors import IdunnoError
from idunno.node.running import run


class Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "member changed":
            fields = vars(record)
            print(f"member {fields['event']} {fields['member']}", flush=True)


def main() -> int:
    logging.getLogger("idunno.membership").addHandler(Printer())
    try:
        run(Path(sys.argv[1]).absolute())
    except IdunnoError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


sys.exit(main())

# idunno/node/__main__.py: `python -m idunno.node --dir DIR`: one node in the foreground, without loading the command line.
from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path

from idunno.base.errors import IdunnoError
from idunno.node.running import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m idunno.node", description="Run one node in the foreground.")
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--seed", metavar="HOST:PORT")
    parser.add_argument("--verbose", action="store_true", help="log to standard error too")
    arguments = parser.parse_args()
    try:
        run(arguments.dir.absolute(), arguments.seed, verbose=arguments.verbose)
    except IdunnoError as error:
        return _failed(str(error))
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        return _failed(f"{text}; free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else text)
    except KeyboardInterrupt:  # while it still loads: nothing has begun
        return 130
    return 0


def _failed(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)  # noqa: T201 - the one line a failed start leaves
    return 1


sys.exit(main())

# idunno/node/logs.py: a node's log: one JSON object a line, in a file that is rotated.
#
# Rule 1: {"time", "level", "node", "part", "text"} and the named fields of the record; text is a fixed phrase.
# Rule 2: at most LOG_BYTES_MAX * (LOG_FILES_KEPT + 1) on disk, and one line at most LINE_BYTES_MAX.
# Rule 3: writing must not stop the node: a full disk costs log lines, never the loop (logging's own handler counts them).
from __future__ import annotations

import json
import logging
import logging.handlers
import sys
import time
import traceback
from typing import Final

LOG_BYTES_MAX: Final = 16 * 1024 * 1024
LOG_FILES_KEPT: Final = 4
LINE_BYTES_MAX: Final = 16 * 1024
"""A traceback fits; a line of this length is searched by grep as a whole."""

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "node": self._node,
            "part": record.name.removeprefix("idunno."),
            "text": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _STANDARD:
                line[name] = value
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = repr(record.exc_info[1])
            line["trace"] = "".join(traceback.format_exception(*record.exc_info))
        text = json.dumps(line, default=str, ensure_ascii=False)
        if len(text) > LINE_BYTES_MAX:
            text = json.dumps({"cut": len(text), **{k: str(v)[:1000] for k, v in line.items()}})[:LINE_BYTES_MAX]
        return text


class RotatingLog(logging.handlers.RotatingFileHandler):
    """Counts what could not be written instead of printing about it: standard error may be the same full disk."""

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self.lost += 1


def start_logging(path: str, node: str, *, level: int = logging.INFO, also_stderr: bool = False) -> RotatingLog:
    """Send everything that is logged in this process to the file at `path`. Raises OSError when it cannot be opened."""
    handler = RotatingLog(
        path, maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES_KEPT, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(JsonFormatter(node))
    handlers: list[logging.Handler] = [handler]
    if also_stderr:
        screen = logging.StreamHandler(sys.stderr)
        screen.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        handlers.append(screen)
    logging.basicConfig(level=level, handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = True  # so that handleError is called, and counts
    return handler

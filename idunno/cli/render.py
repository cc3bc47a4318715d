# idunno/cli/render.py: tables and progress bars.
#
# Rule 1: a terminal gets rich tables where they fit it; anything else gets plain aligned text, one row a line, nothing cut: what
#         is folded within its column (the id of a job) can be neither read nor copied.
# Rule 2: a progress bar is drawn on standard error, and only when that is a terminal.
# Rule 3: text that came from elsewhere (logs, names, errors) never reaches a terminal with its control characters.
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import click

PAD_MAX: Final = 60
"""Characters: names and reasons are rarely longer."""
WIDTH_MAX: Final = 10_000
"""Of a table that is only measured."""


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their columns; numbers stand to the right."""
    texts = [[cell(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[place], (int, float)) or row[place] is None for row in rows)
        for place in range(len(columns))
    ]
    if sys.stdout.isatty() and _rich(columns, texts, numeric):
        return
    # One that is very long pushes its own row to the right, not all the others.
    widths = [max(len(title), *(min(len(row[i]), PAD_MAX) for row in texts), 0) for i, title in enumerate(columns)]
    for row in [list(columns), *texts]:
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> bool:
    """Whether it fits the terminal; then it was printed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Two blanks between columns, not three: nine columns then leave more of 80 characters to what stands in them.
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, (title, right) in enumerate(zip(columns, numeric, strict=True), 1):
        whole = place < len(columns)  # only what stands last, a reason or a list of nodes, may be folded
        shown.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        shown.add_row(*(Text(text) for text in row))  # Text: brackets in names are no markup
    console = Console()
    if console.measure(shown, options=console.options.update(max_width=WIDTH_MAX)).minimum > console.width:
        return False
    console.print(shown)
    return True


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value)
    return printable(str(value))


def printable(text: str) -> str:
    """`text` on one line, with control characters shown instead of obeyed."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def counted(count: int, what: str) -> str:
    """1 version, 2 versions."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def size(count: int) -> str:
    """Bytes for people: 512 B, 8.0 MiB."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


Update = Callable[[int, int], None]
"""Called with (done, in all; 0 when unknown)."""


@contextlib.contextmanager
def bar(what: str, *, in_bytes: bool = False) -> Iterator[Update | None]:
    """A progress bar for as long as the block runs; None where there is no terminal to draw it on."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    times: list[ProgressColumn] = [TimeElapsedColumn(), TimeRemainingColumn()]
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), *counts, *times]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(printable(what)[:60], total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        yield update

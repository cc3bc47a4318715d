# idunno/cli/logs.py: `idunno grep`.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from idunno.cli import render
from idunno.cli.options import NODE, Moment, Text, command, settings
from idunno.cli.running import json_line, note, work

if TYPE_CHECKING:
    from idunno.client.api import Cluster
    from idunno.grep.messages import Line, QueryAnswer

LEVELS = ("debug", "info", "warning", "error")
CONTEXT_MAX = 100
"""Lines around a match."""
LIMIT_MAX = 100_000


@command("grep", example="idunno grep -i 'task failed' --since 10m --node n2")
@click.argument("pattern", type=Text(empty=True))
@click.option("-c", "--count", "count_only", is_flag=True, help="Only how many lines match, by node.")
@click.option("-i", "--ignore-case", is_flag=True, help="Upper and lower case are the same.")
@click.option("-v", "--invert", is_flag=True, help="The lines that do not match.")
@click.option("-A", "after", type=click.IntRange(0, CONTEXT_MAX), metavar="N", help="N lines after each match too.")
@click.option("-B", "before", type=click.IntRange(0, CONTEXT_MAX), metavar="N", help="N lines before each match too.")
@click.option("-C", "around", type=click.IntRange(0, CONTEXT_MAX), default=0, metavar="N", help="Both.")
@click.option("--since", type=Moment(), metavar="T", help="Not before: ISO time, or how long ago (10m).")
@click.option("--until", type=Moment(), metavar="T", help="Not after.")
@click.option("--level", type=click.Choice(LEVELS, case_sensitive=False), default=None, help="This level and above.")
@click.option("--node", "nodes", type=NODE, multiple=True, metavar="N", help="Only this node; may be repeated.")
@click.option("--limit", type=click.IntRange(1, LIMIT_MAX), default=10_000, show_default=True, help="Lines a node.")
def grep(
    pattern: str,
    count_only: bool,
    ignore_case: bool,
    invert: bool,
    after: int | None,
    before: int | None,
    around: int,
    since: int | None,
    until: int | None,
    level: str | None,
    nodes: tuple[str, ...],
    limit: int,
) -> None:
    """Search the logs of all living nodes for a regular expression."""
    found: list[Line] = []
    as_json = settings().json

    def heard(lines: list[Line]) -> None:
        if as_json:
            found.extend(lines)  # at most `limit` a node
            return
        for line in lines:
            mark = "-" if line.context else ":"
            click.echo(f"{line.node}{mark}{line.line}{mark} {render.printable(line.text)}")

    async def body(cluster: Cluster) -> QueryAnswer:
        return await cluster.grep(
            pattern,
            heard,
            ignore_case=ignore_case,
            invert=invert,
            count_only=count_only,
            before=around if before is None else before,
            after=around if after is None else after,
            since_ms=since,
            until_ms=until,
            level=level or "",
            nodes=nodes,
            limit=limit,
        )

    answer = work(body)
    if as_json:
        json_line(_document(found, answer))
    elif count_only:
        for node, count in sorted(answer.counts.items()):
            click.echo(f"{node}: {count}")
    _summary(answer)


def _document(found: list[Line], answer: QueryAnswer) -> dict[str, Any]:
    matches: list[dict[str, Any]] = []
    for line in found:
        match: dict[str, Any] = {"node": line.node, "file": line.file, "line": line.line, "text": line.text}
        matches.append(match | {"context": True} if line.context else match)
    return {
        "matches": matches,
        "counts": answer.counts,
        "unreachable": sorted(answer.unreachable),
        "seconds": answer.seconds,
        "truncated": answer.truncated,
    }


def _summary(answer: QueryAnswer) -> None:
    parts = [
        f"{node} {count} in {answer.node_seconds.get(node, 0.0):.3f} s" for node, count in sorted(answer.counts.items())
    ]
    note(f"{sum(answer.counts.values())} matches ({', '.join(parts)}) in {answer.seconds:.3f} s")
    if answer.truncated:
        note("not all are shown: give a narrower pattern or a larger --limit")
    for node, why in sorted(answer.unreachable.items()):
        note(f"no answer from {node}: {render.printable(why)}")

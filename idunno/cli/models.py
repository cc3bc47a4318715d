# idunno/cli/models.py: models, jobs, and the operator's questions about them.
from __future__ import annotations

import sys
import time
from contextlib import aclosing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from idunno.base.errors import ModelFailed
from idunno.base.naming import naming
from idunno.cli import render
from idunno.cli.options import ANY, JOB, LOCAL, MODEL, Count, command, settings
from idunno.cli.running import note, result, usage, work

if TYPE_CHECKING:
    from idunno.client.api import Cluster
    from idunno.scheduler.messages import JobInfo, ModelInfo

BATCH: Count = Count(min=1)


def _seconds_since(began: float) -> float:
    return round(time.monotonic() - began, 3)


@command("deploy", example="idunno deploy digits digits.onnx --workers 3")
@click.argument("name", type=MODEL)
@click.argument("path", type=LOCAL)
@click.option("--workers", type=Count(min=1), metavar="N", help="How many. [default: all]")
@click.option("--batch-size", type=BATCH, metavar="B", help="Queries a task. [default: by measured cost]")
@click.option("--weight", type=click.FloatRange(min=0.001, max=1000), default=1.0, metavar="W", help="Share of rate.")
@click.option("--min-workers", type=Count(min=0), default=0, metavar="N", help="Never fewer than these.")
@click.option("--max-workers", type=Count(min=1), metavar="N", help="Never more than these.")
def deploy(
    name: str,
    path: str,
    workers: int | None,
    batch_size: int | None,
    weight: float,
    min_workers: int,
    max_workers: int | None,
) -> None:
    """Deploy the model file PATH (.onnx) as NAME, and wait until every assigned worker is ready."""
    if max_workers and max(workers or 0, min_workers) > max_workers:
        raise usage(f"--max-workers {max_workers} is less than the {max(workers or 0, min_workers)} workers asked for")
    began = time.monotonic()
    shown: dict[str, str] = {}

    def progress(info: ModelInfo) -> None:
        for worker in info.workers:
            if shown.get(worker.node) != worker.state:
                shown[worker.node] = worker.state
                note(f"{worker.node}: {worker.state}" + (f": {render.printable(worker.error)}" if worker.error else ""))

    async def body(cluster: Cluster) -> ModelInfo:
        with render.bar(f"{name}: sending", in_bytes=True) as sent:
            return await cluster.deploy(
                name,
                path,
                workers=workers or 0,
                batch_size=batch_size or 0,
                weight=weight,
                workers_min=min_workers,
                workers_max=max_workers or 0,
                sent=sent,
                progress=progress,
            )

    info = work(body)
    ready = [worker.node for worker in info.workers if worker.state == "ready"]
    document = {
        "model": info.model,
        "version": info.version,
        "state": info.state,
        "workers": ready,
        "seconds": _seconds_since(began),
    }
    result(document, lambda: click.echo(f"{info.model} version {info.version} is {info.state} on {', '.join(ready)}"))


@command("undeploy", example="idunno undeploy digits")
@click.argument("name", type=MODEL)
def undeploy(name: str) -> None:
    """Take the model NAME away from its workers."""
    work(lambda cluster: cluster.undeploy(name))
    result({"model": name}, lambda: click.echo(f"{name} undeployed"))


@command("models", example="idunno models")
def models() -> None:
    """The models, their state and their workers."""
    rows = work(lambda cluster: cluster.models())
    result(
        [_model_json(row) for row in rows],
        lambda: render.table(
            ["model", "version", "state", "workers", "batch size", "weight", "runtime", "reason"],
            [
                (
                    row.model,
                    row.version,
                    row.state,
                    _serving(row),
                    row.batch_size or "auto",
                    row.weight,
                    row.runtime,
                    row.reason,
                )
                for row in rows
            ],
        ),
    )


def _serving(info: ModelInfo) -> list[str]:
    return [worker.node for worker in info.workers if worker.state != "failed"]


def _model_json(info: ModelInfo) -> dict[str, Any]:
    return {
        "model": info.model,
        "version": info.version,
        "state": info.state,
        "workers": _serving(info),
        "batch_size": info.batch_size,
        "weight": info.weight,
        "runtime": info.runtime,
        "reason": info.reason,
        "failures": info.failures,
    }


@command("infer", example="idunno infer digits images.zip --output answers.jsonl")
@click.argument("model", type=MODEL)
@click.argument("data", type=LOCAL, metavar="INPUT")
@click.option("--batch-size", type=BATCH, metavar="B", help="Queries a task. [default: the model's]")
@click.option("--output", type=LOCAL, metavar="FILE", help="Write the results here, one JSON line a query.")
@click.option("--no-wait", is_flag=True, help="Submit only.")
def infer(model: str, data: str, batch_size: int | None, output: str | None, no_wait: bool) -> None:
    """Run INPUT through MODEL as a job: a folder, archive, image or array, or sdfs:NAME for a file stored already."""
    if no_wait and output:
        raise usage("--output needs the results: leave out --no-wait, or fetch them later by `idunno results`")
    if output == "-":
        raise usage("--output names a file: `idunno results JOB` prints results")
    if output is not None:
        from idunno.client.local import check_place

        check_place(Path(output))
    began = time.monotonic()

    async def body(cluster: Cluster) -> JobInfo:
        from asyncio import CancelledError

        with render.bar(f"{data}: sending", in_bytes=True) as sent:
            job = await cluster.infer(model, data, batch_size=batch_size or 0, sent=sent)
        if no_wait:
            return await job.info()
        note(f"job {job.id}")
        try:
            info = await _wait(cluster, job.id)
            if output is not None and info.state != "cancelled":
                await _write_results(cluster, job.id, output)
        except CancelledError:
            note(f"job {job.id} goes on: `idunno results {job.id}`, or `idunno cancel {job.id}`")
            raise
        except OSError as error:
            if error.filename is not None:  # of FILE, not of a connection
                note(f"job {job.id} is finished and its results are kept: `idunno results {job.id} --output FILE`")
            raise
        return info

    info = work(body)
    result(_job_result(info, output, _seconds_since(began)), lambda: _show_job(info, output, no_wait))
    if not no_wait:
        _check(info)


async def _wait(cluster: Cluster, job: str) -> JobInfo:
    with render.bar(f"job {job[:8]}") as update:

        def progress(info: JobInfo) -> None:
            if update is not None:
                update(info.done, info.queries)

        return await cluster.wait(job, progress)


async def _write_results(cluster: Cluster, job: str, output: str) -> None:
    from idunno.client.local import replacing

    with replacing(Path(output)) as file:
        await _copy_results(cluster, job, file)


async def _copy_results(cluster: Cluster, job: str, file: IO[bytes]) -> None:
    async with aclosing(cluster.result_lines(job)) as lines:
        async for line in lines:
            file.write(line)


def _job_result(info: JobInfo, output: str | None, seconds: float) -> dict[str, Any]:
    """Queries are counted as succeeded (with an output) and failed (with an error, or in a finished job without answer)."""
    tasks = info.tasks
    succeeded = info.done - info.errors
    finished = info.state in ("success", "failed", "cancelled")
    return {
        "job": info.job,
        "model": info.model,
        "queries": info.queries,
        "tasks": tasks.ready + tasks.waiting + tasks.success + tasks.failed,
        "succeeded": succeeded,
        "failed": info.queries - succeeded if finished else info.errors,
        "seconds": seconds,
        "output": output,
        "state": info.state,
    }


def _show_job(info: JobInfo, output: str | None, no_wait: bool) -> None:
    if no_wait:
        click.echo(info.job)
        note(f"job {info.job} is {info.state}: `idunno results {info.job}` waits for its results")
        return
    place = f"in {output}" if output else f"by `idunno results {info.job}`"
    click.echo(f"job {info.job}: {info.done - info.errors} of {info.queries} queries succeeded; results {place}")


def _check(info: JobInfo) -> None:
    """Say how many rows carry an error; raise if the job as a whole failed."""
    if info.state != "success":
        failed = f"{info.tasks.failed} tasks failed, {info.done} of {info.queries} queries answered"
        raise ModelFailed(f"job {info.job} {info.state} ({failed}): {info.reason or 'no reason was given'}")
    if info.errors:
        note(f"{info.errors} of {info.queries} queries have an error of their own in the results")


@command("jobs", example="idunno jobs --all")
@click.option("--all", "everybody", is_flag=True, help="Everybody's jobs.")
def jobs(everybody: bool) -> None:
    """Your jobs, what is done of each, and what it waits for."""
    rows = work(lambda cluster: cluster.jobs(all=everybody))
    result(
        rows,
        lambda: render.table(
            ["job", "client", "model", "state", "queries", "done", "errors", "submitted", "reason"],
            [
                (
                    row.job,
                    row.client,
                    row.model,
                    row.state,
                    row.queries,
                    row.done,
                    row.errors,
                    row.submitted,
                    row.reason,
                )
                for row in rows
            ],
        ),
    )


@command("cancel", example="idunno cancel 3f0c2a9e41d84a05b6c1de9f0a7b2c3d")
@click.argument("job", type=JOB)
def cancel(job: str) -> None:
    """Stop JOB. What it has answered stays."""
    info = work(lambda cluster: cluster.cancel(job))
    result(info, lambda: click.echo(f"job {info.job} is {info.state}: {info.done} of {info.queries} queries answered"))


@command("forget", example="idunno forget 3f0c2a9e41d84a05b6c1de9f0a7b2c3d")
@click.argument("job", type=JOB)
def forget(job: str) -> None:
    """Remove the finished JOB and its outputs."""
    work(lambda cluster: cluster.forget(job))
    result({"job": job}, lambda: click.echo(f"job {job} forgotten"))


@command("results", example="idunno results 3f0c2a9e41d84a05b6c1de9f0a7b2c3d --output answers.jsonl")
@click.argument("job", type=JOB)
@click.option("--output", type=LOCAL, metavar="FILE", help="Write them here instead of standard output.")
@click.option("--list", "listed", is_flag=True, help="The names of the job's output files in SDFS instead.")
def results(job: str, output: str | None, listed: bool) -> None:
    """The results of JOB, one JSON line a query, in input order; waits for those that are not there yet."""
    if listed:
        names = [part.name for part in work(lambda cluster: cluster.outputs(job)) if part.name]
        result(names, lambda: click.echo("\n".join(names), nl=bool(names)))
        return
    if output is None or output == "-":
        with naming("standard output"):
            work(lambda cluster: _print_results(cluster, job, as_array=settings().json))
        return
    began = time.monotonic()

    async def body(cluster: Cluster) -> JobInfo:
        info = await _wait(cluster, job)
        await _write_results(cluster, job, output)
        return info

    info = work(body)
    result(_job_result(info, output, _seconds_since(began)), lambda: _show_job(info, output, False))


async def _print_results(cluster: Cluster, job: str, *, as_array: bool) -> None:
    stdout = sys.stdout.buffer
    if not as_array:
        await _copy_results(cluster, job, stdout)
        stdout.flush()
        return
    before = b"["
    async with aclosing(cluster.result_lines(job)) as lines:
        async for line in lines:
            stdout.write(before + line.rstrip(b"\n"))
            before = b",\n"
    stdout.write(b"]\n" if before != b"[" else b"[]\n")
    stdout.flush()


@command("rates", example="idunno rates")
def rates() -> None:
    """Query rate over the last 10 s and queries done, by model, and how far apart the rates are."""
    answer = work(lambda cluster: cluster.rates())

    def show() -> None:
        render.table(
            ["model", "rate/s", "queries done", "workers", "waiting"],
            [(row.model, row.rate, row.queries_done, row.workers, row.waiting) for row in answer.models],
        )
        click.echo(f"spread {answer.spread:.1%}")

    result(answer, show)


@command("times", example="idunno times digits")
@click.argument("model", type=MODEL)
def times(model: str) -> None:
    """Processing time of a query of MODEL, in seconds."""
    answer = work(lambda cluster: cluster.times(model))
    names = ("mean", "std", "median", "p90", "p95", "p99")
    result(
        answer,
        lambda: render.table(
            ["model", "count", *names],
            [(answer.model, answer.count, *(f"{getattr(answer, name):.6f}" for name in names))],
        ),
    )


@command("batch-size", example="idunno batch-size digits 64")
@click.argument("model", type=MODEL)
@click.argument("size", type=BATCH, metavar="B")
def batch_size(model: str, size: int) -> None:
    """From now on tasks of MODEL have B queries each."""
    info = work(lambda cluster: cluster.batch_size(model, size))
    result(_model_json(info), lambda: click.echo(f"{info.model}: {info.batch_size} queries a task"))


@command("assignments", example="idunno assignments")
def assignments() -> None:
    """Per worker: the models it holds, the task it runs, and since when."""
    rows = work(lambda cluster: cluster.assignments())
    result(
        rows,
        lambda: render.table(
            ["node", "role", "state", "models", "task", "since"],
            [(row.node, row.role, row.state, row.models, row.task, row.since) for row in rows],
        ),
    )


@command("explain", example="idunno explain digits")
@click.argument("what", type=ANY, metavar="MODEL|JOB|NODE")
def explain(what: str) -> None:
    """Why it is where it is: the last decisions with their numbers, and what it waits for."""
    answer = work(lambda cluster: cluster.explain(what))

    def show() -> None:
        click.echo(f"{render.printable(answer.what)}: {render.printable(answer.waits_for) or 'waits for nothing'}")
        if answer.decisions:
            render.table(["time", "about", "why"], [(row.time, row.about, row.why) for row in answer.decisions])

    result(answer, show)


COMMANDS = [
    deploy,
    undeploy,
    models,
    infer,
    jobs,
    cancel,
    forget,
    results,
    rates,
    times,
    batch_size,
    assignments,
    explain,
]

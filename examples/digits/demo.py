"""The main job on real input, step by step: run it as `scripts/demo`.

Starts five nodes on this machine in a temporary directory, deploys the digits classifier, classifies all 1,797 images, stores
and fetches a file, searches the logs, and kills the scheduler's process while a second job runs. Exits 1 if anything is not
as promised.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NODES = 5
IMAGES = 1797
WATCH_LIMIT_S = 60.0


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def idunno(*words: str) -> None:
    """Run a command as a person would, its output shown."""
    print(f"$ idunno {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "idunno", *words], check=True)


def idunno_json(*words: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "idunno", *words, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def check(holds: bool, what: str) -> None:
    print(f"   {'ok' if holds else 'FAILED'}: {what}", flush=True)
    if not holds:
        raise SystemExit(1)


def labels() -> dict[str, int]:
    with open(HERE / "labels.csv", newline="", encoding="utf-8") as file:
        return {row["query"]: int(row["label"]) for row in csv.DictReader(file)}


def check_answers(path: Path) -> None:
    """Every image answered exactly once, in input order, and rightly classified as often as the model promises."""
    truth = labels()
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    check(
        [answer["query"] for answer in answers] == list(truth),
        f"{len(answers)} answers, each image once, in input order",
    )
    right = sum(answer["output"]["label"] == truth[answer["query"]] for answer in answers)
    check(right / IMAGES > 0.95, f"accuracy {right / IMAGES:.2%} ({right} of {IMAGES})")


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses, from 7400 on."""
    for first in range(7400, 9000, count):
        try:
            for port in range(first, first + count):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with socket.socket(socket.AF_INET, kind) as probe:
                        probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise SystemExit("error: no five free ports in a row between 7400 and 9000")


def kill_the_scheduler_half_way(directory: Path, work: Path) -> None:
    output = work / "second.jsonl"
    job = idunno_json("infer", "digits", str(HERE / "digits.zip"), "--batch-size", "2", "--no-wait")["job"]
    print(f"   job {job} is submitted, in batches of 2 images")
    began = time.monotonic()
    scheduler = next(member for member in idunno_json("members") if member["role"] == "scheduler")
    while True:
        about = next(row for row in idunno_json("jobs") if row["job"] == job)
        share = about["done"] / about["queries"] if about["queries"] else 0.0
        if share >= 0.10:
            break
        check(time.monotonic() - began < WATCH_LIMIT_S, "the second job makes progress")
    pid = int((directory / scheduler["name"] / "node.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    print(f"   kill -9 {pid}: the scheduler, {scheduler['name']}, at {share:.0%} of the job")
    check(share <= 0.90, "the job was between 10 % and 90 % done when its scheduler died")
    idunno("results", job, "--output", str(output))
    check_answers(output)
    members = idunno_json("members")
    new = next(member for member in members if member["role"] == "scheduler")
    check(new["name"] != scheduler["name"], f"{new['name']} is the scheduler now")


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="idunno-demo-") as name:
        work = Path(name)
        directory = work / "cluster"
        os.environ["IDUNNO_CLUSTER"] = str(directory)
        say(f"A cluster of {NODES} nodes on this machine")
        try:
            idunno("up", "--nodes", str(NODES), "--dir", str(directory), "--port", str(free_ports(NODES)))
            run(directory, work)
        finally:
            say("Stop")
            idunno("down", "--dir", str(directory))
    say(f"All of it took {time.monotonic() - began:.0f} s.")


def run(directory: Path, work: Path) -> None:
    say("Deploy a classifier of hand-written digits")
    idunno("deploy", "digits", str(HERE / "digits.onnx"))
    say(f"Classify {IMAGES} real images")
    idunno("infer", "digits", str(HERE / "digits.zip"), "--output", str(work / "first.jsonl"))
    check_answers(work / "first.jsonl")
    say("Who did what, and how fast")
    idunno("rates")
    idunno("times", "digits")
    idunno("assignments")
    say("Store a file four times and fetch it again")
    original = HERE / "digits.zip"
    idunno("put", str(original), "demo/digits.zip")
    idunno("where", "demo/digits.zip")
    idunno("get", "demo/digits.zip", str(work / "fetched.zip"))
    check(
        (work / "fetched.zip").read_bytes() == original.read_bytes(), "what came back is what was stored, byte for byte"
    )
    say("Search the logs of all nodes")
    idunno("grep", "leader elected")
    say("Kill the scheduler in the middle of a second job")
    kill_the_scheduler_half_way(directory, work)
    idunno("members")


if __name__ == "__main__":
    main()

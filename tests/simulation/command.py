# tests/simulation/command.py: `tests/simulation/run`: one world with its story, or a night of them.
from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import Counter
from typing import TextIO

from tests.simulation.dose import Dose
from tests.simulation.faults import KINDS
from tests.simulation.scenario import Report, mixed

SECONDS = 20.0
"""Of faults, in a world of the tests: long enough for every kind once."""


def replay_command(seed: str, nodes: int, seconds: float, kinds: list[str] | None) -> str:
    faults = "all" if kinds is None else ",".join(kinds) or "none"
    return f"tests/simulation/run --seed {seed} --nodes {nodes} --minutes {seconds / 60:.6g} --faults {faults}"


def one(
    seed: str, nodes: int, seconds: float, kinds: list[str] | None, *, watch: bool, trace: TextIO | None = None
) -> Report:
    """One world. Raises AssertionError whose last line is the command that replays it."""
    try:
        return mixed(seed, nodes=nodes, seconds=seconds, kinds=kinds, watch=watch, trace=trace)
    except AssertionError as error:
        raise AssertionError(f"{error}\nreplay: {replay_command(seed, nodes, seconds, kinds)}") from error


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/simulation/run", description=__doc__)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--seeds", metavar="A-B", help="many worlds: seeds A to B, without their stories")
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=SECONDS / 60, help="of virtual time under faults")
    parser.add_argument("--faults", default="all", help="all, none, or a list of " + ", ".join(KINDS))
    parser.add_argument("--trace", metavar="FILE", help="write every event of the one world: two runs must not differ")
    parser.add_argument("--quiet", action="store_true", help="no story")
    asked = parser.parse_args()
    kinds = None if asked.faults == "all" else [] if asked.faults == "none" else asked.faults.split(",")
    unknown = [kind for kind in kinds or [] if kind not in KINDS]
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}; known are {', '.join(KINDS)}")
    seconds = asked.minutes * 60
    if asked.seeds is None:
        return _one(asked.seed, asked.nodes, seconds, kinds, watch=not asked.quiet, trace=asked.trace)
    first, _, last = asked.seeds.partition("-")
    return _many(range(int(first), int(last or first) + 1), asked.nodes, seconds, kinds)


def _one(seed: str, nodes: int, seconds: float, kinds: list[str] | None, *, watch: bool, trace: str | None) -> int:
    began = time.perf_counter()
    try:
        with open(trace, "w", encoding="utf-8") if trace else contextlib.nullcontext() as file:
            report = one(seed, nodes, seconds, kinds, watch=watch, trace=file)
    except AssertionError as error:
        print(f"FAILED: {error}", file=sys.stderr)  # noqa: T201
        return 1
    took = time.perf_counter() - began
    _print_dose(report.dose, report.done)
    print(f"{report.virtual_s:.1f} s in {took:.2f} s: {report.virtual_s / took:.0f} times faster than real time")  # noqa: T201
    print(f"trace {report.digest}")  # noqa: T201
    return 0


def _many(seeds: range, nodes: int, seconds: float, kinds: list[str] | None) -> int:
    dose, done, failed, virtual_s = Dose(), Counter[str](), 0, 0.0
    began = time.perf_counter()
    for seed in seeds:
        try:
            report = one(str(seed), nodes, seconds, kinds, watch=False)
        except AssertionError as error:
            failed += 1
            print(f"seed {seed} FAILED: {error}\n", flush=True)  # noqa: T201
            continue
        dose.add(report.dose)
        done.update(report.done)
        virtual_s += report.virtual_s
    took = time.perf_counter() - began
    _print_dose(dose, done)
    ratio = virtual_s / took
    print(f"{len(seeds)} worlds, {failed} failed; {virtual_s:.0f} s in {took:.0f} s: {ratio:.0f} times faster")  # noqa: T201
    return 1 if failed else 0


def _print_dose(dose: Dose, done: dict[str, int]) -> None:
    print("\n".join(dose.table()))  # noqa: T201
    print("clients: " + ", ".join(f"{what} {count}" for what, count in sorted(done.items())))  # noqa: T201

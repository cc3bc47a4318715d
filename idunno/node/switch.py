# idunno/node/switch.py: one node's directory becomes another node's, in steps of which each may be the last before a crash.
#
# Rule 1: everything new is made whole in `recovered.new/`, its plan last. Until then nothing has happened.
# Rule 2: renaming that to `recovering/` decides. From then on a node cannot be started here, and whoever comes next goes on.
# Rule 3: what was there is put aside, never over something, and never deleted. Each step looks at what is there, so it is done
#         once, however often it is begun. The identity is replaced last, in one rename.
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from idunno.base.errors import Conflict, Corrupt, Incompatible
from idunno.base.ids import NodeId
from idunno.node.disk import replace_file, sync_directory
from idunno.node.identity import DECIDED, IDENTITY_FILE

PREPARED: Final = "recovered.new"
PLAN_FILE: Final = "plan.json"
DONE: Final = "done"
"""The folder of the plan, once it is carried out, within what was put aside."""
FORMAT: Final = 1
REPLACED: Final = (
    "log",
    "ca.pem",
    "ca.key",
    "node.pem",
    "node.key",
    "cluster.key",
    "peers.json",
    "recovered.json",
    "joining.json",
    "node.toml",
)
"""What belongs to an identity, beside the identity. Blocks, small contents, logs and the boot number stay where they are."""
KEPT: Final = ("node.toml", "recovered.json")
"""What stays when nothing new takes its place."""

Step = Callable[[str], None]
"""Told what is about to be done; a test may raise there, as a crash would."""


class Party(msgspec.Struct, frozen=True):
    node: NodeId
    name: str


class Plan(msgspec.Struct, frozen=True):
    """`plan.json`."""

    format: int
    what: str  # recover | restore | adopt
    recovery: str  # equal in all directories of one recovery
    cluster: str  # that comes out of it
    before: str  # that was there; "" when nothing was
    parties: list[Party]  # whose directories are switched
    aside: str  # the folder for what was there
    names: list[str]  # what is new
    at: str


def quiet(_: str) -> None:
    """A Step that only goes on."""


def prepare(directory: Path, plan: Plan, fill: Callable[[Path], None], step: Step = quiet) -> None:
    """Make `recovered.new/` by `fill`, then its plan. What an interrupted attempt left is made anew."""
    place = directory / PREPARED
    step("clear what is half prepared")
    (place / PLAN_FILE).unlink(missing_ok=True)  # first: what is being removed is no preparation any more
    if place.exists():
        sync_directory(str(place))
        shutil.rmtree(place)
    step("make the folder")
    place.mkdir(mode=0o700)
    fill(place)
    step("write the plan")
    for name in plan.names:
        assert (place / name).exists(), f"{name} is planned and not prepared"
    replace_file(str(place / PLAN_FILE), msgspec.json.format(msgspec.json.encode(plan)))
    sync_directory(str(directory))


def prepared(directory: Path) -> Plan | None:
    """The plan that was prepared here and not begun. Raises Corrupt, Incompatible."""
    return _plan(directory / PREPARED / PLAN_FILE)


def decided(directory: Path) -> Plan | None:
    """The plan whose switch was begun here and not finished. Raises Corrupt, Incompatible."""
    return _plan(directory / DECIDED / PLAN_FILE)


def decide(directory: Path, step: Step = quiet) -> None:
    for name in REPLACED:
        if os.path.ismount(directory / name):
            raise Conflict(
                f"{directory / name} is a mount point and cannot be put aside: unmount it, copy its content there, run again"
            )
    step("decide")
    os.rename(directory / PREPARED, directory / DECIDED)
    sync_directory(str(directory))


def finish(directory: Path, step: Step = quiet) -> None:
    """Go on from wherever the switch is. Without effect when there is none. Raises OSError: run it again."""
    plan = decided(directory)
    if plan is None:
        return
    place, aside = directory / DECIDED, directory / plan.aside
    step("make the folder for what was there")
    aside.mkdir(mode=0o700, exist_ok=True)
    sync_directory(str(directory))
    _put_aside(directory, place, aside, plan, step)
    _put_in_place(directory, place, plan, step)
    for left in place.iterdir():
        if left.name != PLAN_FILE:
            raise Corrupt(f"{left} is neither new nor old: move it away, then run this again")
    step("say that it is done")
    os.rename(place, aside / DONE)
    sync_directory(str(aside))
    sync_directory(str(directory))


def _put_aside(directory: Path, place: Path, aside: Path, plan: Plan, step: Step) -> None:
    identity = directory / IDENTITY_FILE
    if identity.exists() and (place / IDENTITY_FILE).exists() and not (aside / IDENTITY_FILE).exists():
        step("copy the identity aside")
        replace_file(str(aside / IDENTITY_FILE), identity.read_bytes())
    for name in REPLACED:
        if name in KEPT and name not in plan.names:
            continue
        waits = (place / name).exists() or name not in plan.names  # else what is there is the new one
        if waits and os.path.lexists(directory / name):
            if os.path.lexists(aside / name):
                raise Conflict(f"{aside / name} is there already: move it away, then run this again")
            step(f"put {name} aside")
            os.rename(directory / name, aside / name)
            sync_directory(str(aside))
            sync_directory(str(directory))


def _put_in_place(directory: Path, place: Path, plan: Plan, step: Step) -> None:
    for name in sorted(plan.names, key=lambda name: name == IDENTITY_FILE):
        if (place / name).exists():
            step(f"put the new {name} in place")
            os.rename(place / name, directory / name)
            sync_directory(str(directory))
            sync_directory(str(place))


def _plan(path: Path) -> Plan | None:
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path} is damaged ({error}): move {path.parent} away, then run this again") from None
    if plan.format != FORMAT:
        raise Incompatible(
            f"{path} has format {plan.format}, this version reads {FORMAT}: use the idunno that wrote it"
        )
    names = {IDENTITY_FILE, *REPLACED}
    if not set(plan.names) <= names or "/" in plan.aside or plan.aside in (".", "..", ""):
        raise Corrupt(f"{path} names what no plan names: move {path.parent} away, then run this again")
    return plan

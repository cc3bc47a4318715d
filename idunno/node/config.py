# idunno/node/config.py: what an operator may set for one node, in `node.toml` of its data directory.
#
# Rule 1: few knobs, each with a safe default, a unit in its name and a reason.
# Rule 2: a file that contradicts itself or has a word too many fails at start, in one line that names the field.
from __future__ import annotations

import re
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from idunno.base.errors import InvalidArgument
from idunno.base.ids import check_label
from idunno.node.disk import replace_file

CONFIG_FILE: Final = "node.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    name: str
    listen: str
    """HOST:PORT, for TCP and UDP alike."""
    advertise: str = ""
    """HOST:PORT that others reach it at; "" means `listen`. Set it behind NAT or port mapping."""
    slots: int = 1
    """Tasks that run at once. One fills a small machine: onnxruntime uses all its cores."""
    threads: int = 0
    """Of the runtime for each task. 0: cores / slots, so that the slots together use the machine once."""
    zone: str = ""
    """Rooms or racks that fail together; copies go to different ones first."""
    scheduler_works: str = "auto"
    """auto: the scheduler works too in clusters of fewer than five nodes | always | never"""
    disk_reserve_bytes: int = 2 * 1024**3
    """Blocks are refused below this much free space (and below 5 %): the machine's own programs need some."""
    cache_bytes: int = 4 * 1024**3
    """Models and inputs kept beside SDFS for running tasks."""
    task_limit_s: int = 300
    """A model that takes longer over one task is killed."""
    warm_runner: bool = True
    """Keep one process with the runtime imported, so that a model starts in tens of milliseconds. Costs 60 to 90 MB."""
    snapshot_entries: int = 50_000
    """Log entries after which the next snapshot is taken and the log is cut."""
    voter_silent_s: int = 60
    """A voter that has been silent for so long is replaced by another node."""
    repair_link_percent: int = 30
    """How much of its time this node spends on taking copies that repair orders. 100: as fast as it can."""
    scrub_bytes_per_s: int = 10_000_000
    """What it reads of its own blocks to find rot, all of them at most once a day. 0: never."""
    stopped_wait_s: int = 600
    """How long a node that announced its stop is expected back before its copies are made elsewhere. The scheduler's counts."""
    log_level: str = "info"

    def __post_init__(self) -> None:
        check_label("node", self.name)
        parse_address(self.listen)
        if self.advertise:
            host, _ = parse_address(self.advertise)
            if host in ("0.0.0.0", "::"):
                raise InvalidArgument(
                    f"advertise={self.advertise!r} is no address others can reach: name the machine's own"
                )
        elif parse_address(self.listen)[0] in ("0.0.0.0", "::"):
            raise InvalidArgument(
                f"listen={self.listen!r} needs `advertise`, the address that others reach this machine at"
            )
        for field in ("slots", "task_limit_s", "snapshot_entries", "voter_silent_s"):
            if getattr(self, field) < 1:
                raise InvalidArgument(f"{field}={getattr(self, field)} in {CONFIG_FILE} must be at least 1")
        if not 1 <= self.repair_link_percent <= 100:
            raise InvalidArgument(f"repair_link_percent={self.repair_link_percent} in {CONFIG_FILE} must be 1 to 100")
        for field in ("disk_reserve_bytes", "cache_bytes", "threads", "scrub_bytes_per_s", "stopped_wait_s"):
            if getattr(self, field) < 0:
                raise InvalidArgument(f"{field}={getattr(self, field)} in {CONFIG_FILE} must not be negative")
        if self.scheduler_works not in ("auto", "always", "never"):
            raise InvalidArgument(f"scheduler_works={self.scheduler_works!r} must be auto, always or never")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise InvalidArgument(f"log_level={self.log_level!r} must be debug, info, warning or error")

    @property
    def address(self) -> str:
        return self.advertise or self.listen


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT" or "[V6]:PORT". Raises InvalidArgument."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise InvalidArgument(f"{text[:80]!r} is no address: write HOST:PORT, for example 192.168.1.10:7400")
    return match[1] or match[2], int(match[3])


def load_config(directory: Path) -> NodeConfig:
    """Raises InvalidArgument, with the file and the field."""
    path = directory / CONFIG_FILE
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidArgument(
            f"{directory} is no node's directory: make one with `idunno init` or `idunno join`"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    known = {field.name: field.type for field in fields(NodeConfig)}
    for key, value in raw.items():
        if key not in known:
            raise InvalidArgument(f"{path}: unknown field {key!r}; known are {', '.join(known)}")
        if type(value).__name__ != known[key]:
            raise InvalidArgument(f"{path}: {key} must be {known[key]}, not {value!r}")
    missing = [name for name in ("name", "listen") if name not in raw]
    if missing:
        raise InvalidArgument(f"{path}: {' and '.join(missing)} must be set")
    return NodeConfig(**raw)


def save_config(directory: Path, config: NodeConfig) -> None:
    lines = []
    for name, value in asdict(config).items():
        text = (
            str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int) else _quoted(value)
        )
        lines.append(f"{name} = {text}\n")
    replace_file(str(directory / CONFIG_FILE), "".join(lines).encode())


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

# bench/coord/cutting.py: cuts a process of this machine off, silently: no packet of its sockets gets through, and nobody is told.
#
# Rule: the same for us and for etcd, whose side runs in a Python of its own: nothing of the project is imported here.
# Needs root and iptables.
from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

Rules = list[list[str]]


def rules(pid: int, listens: Sequence[int], every: Sequence[int]) -> Rules:
    """For the process `pid`: packets of any TCP or UDP port of its own, `listens` among them, are dropped. `every` are the ports
    on which nodes listen: a connection that it begins now comes from a port that no rule names, so none is begun meanwhile."""
    cut = [
        ["INPUT", "-i", "lo", "-p", protocol, side, str(port), "-j", "DROP"]
        for port in sorted({*local_ports(pid), *listens})
        for protocol in ("tcp", "udp")
        for side in ("--sport", "--dport")
    ]
    return cut + [["INPUT", "-i", "lo", "-p", "tcp", "--dport", str(port), "--syn", "-j", "DROP"] for port in every]


def apply(rules: Rules) -> None:
    _iptables("-A", rules)


def lift(rules: Rules) -> None:
    _iptables("-D", rules)


def local_ports(pid: int) -> list[int]:
    """Of the TCP sockets that a process holds."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry))
    rows = [row for path in ("/proc/net/tcp", "/proc/net/tcp6") for row in Path(path).read_text().splitlines()[1:]]
    fields = [row.split() for row in rows]
    return [int(row[1].rpartition(":")[2], 16) for row in fields if f"socket:[{row[9]}]" in inodes]


def _iptables(action: str, rules: Rules) -> None:
    for rule in rules:
        subprocess.run(["iptables", "-w", action, *rule], check=True)

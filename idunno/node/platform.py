# idunno/node/platform.py: everything a node is handed from outside itself: disks, threads, clocks, chance, processes, secrets.
#
# Rule 1: a node touches the world through its Platform and its event loop, and in no other way. `real_platform` is the only
#         place where the real ones are made; a simulated world makes its own.
from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from secrets import token_bytes
from ssl import SSLContext

import msgspec

from idunno.base.disk import Disk
from idunno.coordinator.messages import Succession
from idunno.grep.process import Spawn, spawn_child
from idunno.node.config import NodeConfig
from idunno.node.disk import RealDisk, ThreadOffload
from idunno.node.garbage import lasting
from idunno.node.identity import Identity, KnownPeers, Secrets, load_peers, load_secrets, next_boot
from idunno.node.lineage import load_succession
from idunno.node.prompt import Promptness
from idunno.sdfs.hashing import Offload
from idunno.wire.security import client_context, server_context
from idunno.worker.runner import ChildFactory, RunnerFactory

DATA_THREADS = 4
"""For blocks, hashing and everything but the log: two cores hash while two writes wait for the disk."""


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """The world as one start of one node has it."""

    identity: Identity
    boot: int
    """Raised, durably, before the platform is handed over."""
    boot_salt: bytes
    """16 random bytes of this start, for sealing datagrams."""
    secrets: Secrets
    remembered: KnownPeers
    log_disk: Disk
    """For the log alone, so that its sync never waits behind blocks; the same directory as `disk`."""
    disk: Disk
    offload: Offload
    """Runs what would hold the loop."""
    now_ms: Callable[[], int]
    """The wall clock."""
    rng: random.Random
    spawn_runner: RunnerFactory
    spawn_search: Spawn
    server_tls: SSLContext | None
    """None in a simulated world only: there, and only there, connections are plain (rpc.Server refuses it elsewhere)."""
    client_tls: SSLContext | None
    anonymous_tls: SSLContext | None = None
    """For asking who somebody is that shows no certificate of ours; what he answers must prove itself. None: nobody is asked."""
    succeeds: tuple[Succession, ...] = ()
    """The clusters that this one was recovered from."""
    socket_path: str | None
    """Where the local Unix socket goes; None: there is none."""
    cores: int
    random_bytes: Callable[[int], bytes] = token_bytes
    """For keys, where `rng` could be guessed."""
    lasting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around the making of what stays for long: in a real process it is not searched for garbage."""
    close: Callable[[], None]
    """Ends the threads, after everything else has ended."""


def now_ms() -> int:
    return int(time.time() * 1000)


def real_platform(directory: Path, config: NodeConfig, identity: Identity) -> Platform:
    """The real world of the node of `directory`. Raises Corrupt for a damaged directory."""
    held = load_secrets(directory)
    boot = next_boot(directory)
    log_offload, offload = ThreadOffload(1, "log"), ThreadOffload(DATA_THREADS, "data")
    certificate, key = str(directory / "node.pem"), str(directory / "node.key")

    def close() -> None:
        log_offload.close()
        offload.close()

    return Platform(
        identity=identity,
        boot=boot,
        boot_salt=secrets.token_bytes(16),
        secrets=held,
        remembered=load_peers(directory),
        log_disk=RealDisk(str(directory), log_offload, Promptness(time.monotonic)),
        disk=RealDisk(str(directory), offload),
        offload=offload,
        now_ms=now_ms,
        rng=random.Random(secrets.randbits(256)),
        spawn_runner=ChildFactory(str(directory)),
        spawn_search=spawn_child,
        server_tls=server_context(certificate, key, held.ca_pem),
        client_tls=client_context(certificate, key, held.ca_pem),
        anonymous_tls=client_context(None, None, None),
        succeeds=load_succession(directory),
        socket_path=str(directory / "node.sock"),
        cores=os.cpu_count() or 1,
        lasting=lasting,
        close=close,
    )

# bench/recovery.py: a backup and a restore of many files: time, memory, and how long the loop is held.
#
# python -m bench.recovery [FILES [snapshot]]: makes a machine with that many files of one version (default 1,000,000), writes it
# as a node and a client would write a backup, beside the bare encoding of the same rows; reads it back and, unless told not to,
# restores it into a new directory. Times are the processor's.
from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from idunno.base.ids import BlockId
from idunno.coordinator import backup as b
from idunno.coordinator.machine import Machine
from idunno.coordinator.namespace import FileState, Namespace, NamespaceState
from idunno.coordinator.records import Block, VersionRecord
from idunno.coordinator.roster import Roster, RosterState
from idunno.node.config import NodeConfig
from idunno.node.restore import read_backup, restore


def machine_of(files: int) -> Machine:
    def state(n: int) -> FileState:
        block = Block(BlockId(f"{n:064x}"), 8_000_000)
        return FileState(
            f"data/{n // 1000:05}/{n:09}", 1, (VersionRecord(1, 8_000_000, (block,), 1, "alice", f"{n:032x}"),)
        )

    machine = Machine()
    machine.roster = Roster(RosterState("c" * 32, bytes(32)))
    machine.namespace = Namespace(NamespaceState(files=tuple(state(n) for n in range(files))))
    machine.references = machine.recount()
    return machine


def resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    files = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    machine = machine_of(files)
    print(f"{files:,} files: {resident_mb():.0f} MB with the machine")
    began = time.process_time()
    bare = sum(len(msgspec.msgpack.encode(record)) for _, record, _ in machine.namespace.capture())
    bare_s = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "backup")
        head = b.Head(b.FORMAT, "c" * 32, 0, 0, machine.roster.machine_version, "bench", False)
        writer, longest, began = b.Writer(), 0.0, time.process_time()
        with open(path, "wb") as file:
            file.write(writer.begin(head))
            before = time.thread_time()
            for page in b.without_secrets(machine).capture():
                longest = max(longest, time.thread_time() - before)
                for at in range(0, len(page), b.BYTES_MAX[b.MACHINE]):
                    file.write(writer.record(b.MACHINE, page[at : at + b.BYTES_MAX[b.MACHINE]]))
                before = time.thread_time()
            file.write(writer.end())
        took = time.process_time() - began
        size = path.stat().st_size
        print(
            f"snapshot: {size / 1e6:.0f} MB, {took:.1f} s: {took / bare_s:.1f}x the bare encoding of {bare / 1e6:.0f} MB"
        )
        print(f"          longest hold of the loop {longest * 1000:.0f} ms, {resident_mb():.0f} MB resident at most")
        del machine
        began = time.process_time()
        read_backup(path, None)
        print(f"read and checked: {time.process_time() - began:.1f} s, {resident_mb():.0f} MB resident at most")
        if sys.argv[2:] == ["snapshot"]:
            return
        began = time.process_time()
        done = restore(path, [Path(folder, "node")], new=NodeConfig(name="n1", listen="127.0.0.1:7400"))
        print(
            f"restored: {time.process_time() - began:.1f} s; {done['files']:,} files, {done['versions_lost']:,} lack blocks"
        )
        print(f"          {resident_mb():.0f} MB resident at most")


if __name__ == "__main__":
    main()

# A cluster of processes that is started again where it never was.
from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from idunno.node.config import load_config, save_config
from tests.cluster.harness import Cluster, free_ports, until


def test_a_cluster_restarted_on_new_addresses_forms_again_given_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from the old place")
    processes: list[subprocess.Popen[str]] = []
    with Cluster(3) as cluster:
        cluster.json("put", str(tmp_path / "file"), "kept")
        for name in cluster.names():
            cluster.kill(name)
        port = free_ports(3)
        addresses = {name: f"127.0.0.1:{port + place}" for place, name in enumerate(cluster.names())}
        for name, address in addresses.items():
            directory = cluster.directory / name
            save_config(directory, replace(load_config(directory), listen=address))
            seed = [] if name == "n1" else ["--seed", addresses["n1"]]
            processes.append(cluster.start("node", "run", "--dir", str(directory), *seed))

        def together() -> bool:
            for name in addresses:
                try:
                    rows = cluster.json("members", where=str(cluster.directory / name), timeout_s=5)
                except Exception:  # noqa: BLE001 - it does not answer yet
                    return False
                if {(row["name"], row["address"], row["state"]) for row in rows} != {
                    (name, address, "active") for name, address in addresses.items()
                }:
                    return False
            return True

        until(together, "all three, each at its new address, on every node", timeout_s=60.0)
        cluster.json("get", "kept", str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == b"from the old place"
        for name in cluster.names():
            cluster.kill(name)
    for process in processes:
        process.communicate(timeout=10)

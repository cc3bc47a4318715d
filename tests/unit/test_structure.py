# The house keeps its shape: packages import only what stands to their left, and cores stay pure.
from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2] / "idunno"

LEFT = {
    "base": set[str](),
    "wire": {"base"},
    "membership": {"base", "wire"},
    "consensus": {"base", "wire"},
    "coordinator": {"base", "wire", "consensus", "membership"},
    "sdfs": {"base", "wire", "consensus", "membership", "coordinator"},
    "scheduler": {"base", "wire", "consensus", "membership", "coordinator", "sdfs"},
    "grep": {"base", "wire", "membership", "coordinator", "sdfs"},
    "worker": {"base", "wire", "consensus", "membership", "coordinator", "sdfs", "scheduler"},
    "node": {"base", "wire", "consensus", "membership", "coordinator", "sdfs", "scheduler", "grep", "worker"},
    # The client needs the wire, the message types and the file client: it never holds a node's state.
    "client": {"base", "wire", "coordinator", "sdfs", "scheduler", "grep"},
    "fs": {"base", "wire", "coordinator", "sdfs", "scheduler", "grep", "client"},
    "cli": {"base", "wire", "coordinator", "sdfs", "scheduler", "grep", "node", "client"},
}
"""What each package may import besides itself (architecture.md)."""

CORES = [
    "wire/frames.py",
    "wire/sealed.py",
    "wire/tokens.py",
    "membership/swim.py",
    "membership/book.py",
    "membership/probes.py",
    "membership/farewell.py",
    "membership/voice.py",
    "membership/states.py",
    "membership/health.py",
    "membership/gossip.py",
    "membership/ring.py",
    "consensus/raft.py",
    "consensus/quorum.py",
    "consensus/standing.py",
    "coordinator/machine.py",
    "coordinator/roster.py",
    "coordinator/namespace.py",
    "coordinator/registry.py",
    "coordinator/ledger.py",
    "coordinator/references.py",
    "coordinator/trash.py",
    "coordinator/timing.py",
    "coordinator/permissions.py",
    "sdfs/placement.py",
    "sdfs/locator.py",
    "sdfs/pins.py",
    "sdfs/repair.py",
    "scheduler/fairness.py",
    "scheduler/dispatch.py",
    "scheduler/deploy.py",
    "scheduler/rates.py",
]
IMPURE = {"asyncio", "time", "socket", "os", "threading", "logging", "datetime", "subprocess", "pathlib"}
NOT_IN_A_NODE = (
    *("numpy", "onnxruntime", "PIL", "click", "rich", "prompt_toolkit", "idunno.cli", "idunno.client"),
    # What a node needs later or never: the others wait for it until all is loaded that stands at the top of a file.
    *("cryptography.x509", "ctypes", "gzip", "multiprocessing", "shutil", "tarfile", "tempfile", "zipfile"),
    *("idunno.node.lifecycle", "idunno.node.local", "idunno.node.recover", "idunno.node.restore", "idunno.grep.child"),
)


def imports(path: Path, *, types_too: bool = True) -> Iterator[str]:
    """The modules that a file imports anywhere, in functions as well."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden: set[ast.AST] = set()
    if not types_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                hidden.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("package", sorted(LEFT))
def test_a_package_imports_only_what_stands_to_its_left(package: str) -> None:
    for path in sorted((TOP / package).rglob("*.py")):
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "idunno" and len(parts) > 1:
                assert parts[1] in LEFT[package] | {package}, f"{path.relative_to(TOP)} imports {module}"


def test_every_package_has_its_place() -> None:
    found = {path.name for path in TOP.iterdir() if (path / "__init__.py").exists()}
    assert found == set(LEFT)


@pytest.mark.parametrize("core", CORES)
def test_a_core_is_pure(core: str) -> None:
    impure = {module.split(".")[0] for module in imports(TOP / core, types_too=False)} & IMPURE
    assert not impure, f"{core} imports {impure}"


def test_a_node_loads_only_what_it_needs_to_start() -> None:
    code = f"import sys, idunno.node.process; print([m for m in {NOT_IN_A_NODE!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_runs_a_node_loads_little_before_the_collector_is_off() -> None:
    code = "import sys, idunno.node.running; print([m for m in ('asyncio', 'msgspec', 'ssl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_from_outside_is_unpickled_or_evaluated() -> None:
    for path in TOP.rglob("*.py"):
        for module in imports(path):
            assert module.split(".")[0] not in ("pickle", "marshal", "shelve", "dill", "cloudpickle"), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}: {ast.unparse(node)}"

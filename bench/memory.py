"""Memory: the most a decode service has held, beside its weights and its pool.

What a Python process holds after importing torch is taken off. Prompts and tokens fill the pool,
and a service touches the whole pool at its start.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.load import PAGE_SIZE, Load, Report, Row
from bench.machine import Machine
from bench.options import add_modes, count, counts, loads, modes
from engine.model.load import load_model
from engine.remote import AsyncRemoteEngine
from engine.supervisor import ServicePlan, Supervisor

ALLOWED_OTHER_BYTES = 150_000_000
DRAIN_S = 5.0
_STATUS_OF_SELF = "import torch; print(open('/proc/self/status').read())"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    parser.add_argument("--batch", type=counts, default=(8,), metavar="1,8", help="default 8")
    parser.add_argument(
        "--prompt", type=counts, default=(512,), metavar="128,512", help="tokens (default 512)"
    )
    parser.add_argument("--tokens", type=count, default=64, help="generated from each prompt")


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    return [
        bench_memory(options.model, weights, kv, load, report)
        for weights, kv in modes(options)
        for load in loads(options)
    ]


def bench_memory(model: str, weights: str, kv: str | None, load: Load, report: Report) -> Row:
    """One row. Call it from the main thread: the service ends with it."""
    report(f"memory: a decode service with {weights} weights")
    peak = peak_of_service(model, weights, kv, load)
    spec = load_model(model, weights=weights, kv=kv).model.spec
    pages = -(-load.pool_tokens // PAGE_SIZE)
    pool = pages * spec.page_layout(PAGE_SIZE).page_bytes
    settings = load.row(model, spec.weight_mode, spec.kv_dtype)
    return settings | figures(peak, bytes_after_import(), spec.weight_bytes, pool)


def figures(peak: int, after_import: int, weights: int, pool: int) -> Row:
    """In bytes; ``other`` is what is neither import, weights nor pool."""
    other = peak - after_import - weights - pool
    return {
        "peak_bytes": peak,
        "import_bytes": after_import,
        "weight_bytes": weights,
        "pool_bytes": pool,
        "other_bytes": other,
        "allowed_other_bytes": ALLOWED_OTHER_BYTES,
        "within": other <= ALLOWED_OTHER_BYTES,
    }


def peak_of_service(model: str, weights: str, kv: str | None, load: Load) -> int:
    """Runs the load through a decode service that prefills by itself; the most bytes it held."""
    flags = (
        "--prefill=local",
        f"--model={model}",
        f"--weights={weights}",
        f"--kv={kv or 'auto'}",
        f"--page-size={PAGE_SIZE}",
        f"--pool-tokens={load.pool_tokens}",
    )

    def plans(redis_url: str) -> list[ServicePlan]:
        return [ServicePlan("decode", "decode_svc", (f"--redis={redis_url}", *flags))]

    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        supervisor = Supervisor(Path(folder), plans, redis_url="", drain_s=DRAIN_S)
        try:
            supervisor.start(lambda: False)
            (service,) = supervisor.state.services
            asyncio.run(_use(service.endpoint, load))
            return status_bytes(Path(f"/proc/{service.pid}/status").read_text(), "VmHWM")
        finally:
            supervisor.stop()


def bytes_after_import() -> int:
    """What a process of this interpreter holds once it has imported torch."""
    done = subprocess.run(
        [sys.executable, "-c", _STATUS_OF_SELF], capture_output=True, text=True, check=True
    )
    return status_bytes(done.stdout, "VmRSS")


def status_bytes(status: str, name: str) -> int:
    """A field of ``/proc/<pid>/status``, which states kB of 1024 bytes."""
    (value,) = [line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(value) * 1024


async def _use(endpoint: str, load: Load) -> None:
    async with AsyncRemoteEngine([endpoint]) as engine:
        vocab_size = (await engine.model()).vocab_size
        for repeat in range(load.repeat):
            await engine.generate(load.prompts(vocab_size, repeat), load.params)

"""What this machine can do at best, measured in the run that the figures are compared in."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from kernels.dispatch import isa
from kernels.threads import configured_threads

READ_BYTES = 512 << 20
MATMUL_SIZE = 1024
TRY_FOR_S = 2.0
MIN_TRIES = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """Limits of the ``cores`` threads the kernels use, each the best of several tries.

    On a busy machine they come out too low; a share of a limit above 1 shows that.
    ``fp32_gflops`` is what torch's matrix product of 1024 x 1024 reaches: below the peak of a loop
    over registers only, so a share of it looks better than a share of the peak. The peaks of the
    integer and bf16 units need such a loop; without one they are None.
    """

    cores: int
    isa: str
    read_gbps: float
    fp32_gflops: float
    int8_gops: float | None = None
    bf16_gflops: float | None = None
    fp32_measured_by: str = "torch matmul"


def measure_machine(read_bytes: int = READ_BYTES) -> Machine:
    """Takes some five seconds and ``read_bytes`` of memory."""
    cores = configured_threads()
    return Machine(
        cores=cores,
        isa=isa(),
        read_gbps=read_bytes / _best(_reader(cores, read_bytes)) / 1e9,
        fp32_gflops=2 * MATMUL_SIZE**3 / _best(_multiplier(cores)) / 1e9,
    )


def copy_s(num_bytes: int) -> float:
    """Seconds a plain copy of so many bytes takes, memory to memory, by one thread."""
    source = np.ones(num_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    return _best(lambda: np.copyto(target, source))


def _reader(cores: int, read_bytes: int) -> Callable[[], object]:
    """Every thread reads its own part of one array; numpy's maximum runs without the GIL."""
    parts = np.array_split(np.ones(read_bytes // 8, dtype=np.uint64), cores)
    threads = ThreadPoolExecutor(cores)
    return lambda: list(threads.map(np.max, parts))


def _multiplier(cores: int) -> Callable[[], object]:
    torch.set_num_threads(cores)
    left, right = torch.rand(2, MATMUL_SIZE, MATMUL_SIZE)
    return lambda: left @ right


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several tries, over long enough to outlast what else runs here."""
    give_up = time.perf_counter() + TRY_FOR_S
    times = [_timed(work) for _ in range(MIN_TRIES)]
    while time.perf_counter() < give_up:
        times.append(_timed(work))
    return min(times)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

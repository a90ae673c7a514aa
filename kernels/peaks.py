"""What this machine can do at best, measured: reads from memory, multiply-adds from registers.

Shares of these limits are what benchmarks report, so a limit must not come out too low: it is the
best of many tries, by loops of their own that the kernels have no part in. On a busy machine it can
still be too low; a share above 1 shows that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

from kernels.dispatch import KernelUnavailable

LEAST_READ_BYTES = 512 << 20
TRY_FOR_S = 1.0
_CACHES = ("SC_LEVEL2_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL4_CACHE_SIZE")


@dataclass(frozen=True, slots=True)
class Peaks:
    """Limits of ``threads`` threads together; a multiply-add counts as two operations.

    ``int8_gops`` is that of vectors, ``int8_tiles_gops`` that of matrix tiles (AMX); it and
    ``bf16_gflops`` are None where the CPU has none. ``*_by`` names what multiplies: an instruction,
    or "portable" for plain C++ over arrays in the first cache.
    """

    threads: int
    read_gbps: float
    int8_gops: float
    bf16_gflops: float | None
    fp32_gflops: float
    int8_by: str
    fp32_by: str
    int8_tiles_gops: float | None = None

    def gops(self, arithmetic: str) -> float:
        """The peak of "int8", "bf16" or "fp32"; bf16 can always be computed in fp32."""
        if arithmetic == "bf16" and self.bf16_gflops is not None:
            return max(self.bf16_gflops, self.fp32_gflops)
        if arithmetic == "int8":
            return max(self.int8_gops, self.int8_tiles_gops or 0.0)
        return self.fp32_gflops

    @property
    def of_vectors(self) -> Peaks:
        """The limits of a CPU without matrix tiles."""
        return replace(self, int8_tiles_gops=None)


def measure_peaks(threads: int, read_bytes: int | None = None, seconds: float = TRY_FOR_S) -> Peaks:
    """Tries each limit for about ``seconds``; takes ``read_bytes`` of memory meanwhile.

    ``read_bytes`` is by default several times the caches. Raises ``ValueError`` for ``threads``
    outside 1 to 256, ``KernelUnavailable`` without the native module.
    """
    native = _native()
    int8, int8_by = native.peak_ops("int8", threads, seconds)
    fp32, fp32_by = native.peak_ops("fp32", threads, seconds)
    bf16 = native.peak_ops("bf16", threads, seconds)
    tiles = native.peak_ops("int8 tiles", threads, seconds)
    return Peaks(
        threads=threads,
        read_gbps=measure_read(threads, read_bytes, seconds),
        int8_gops=int8 / 1e9,
        bf16_gflops=None if bf16 is None else bf16[0] / 1e9,
        fp32_gflops=fp32 / 1e9,
        int8_by=int8_by,
        fp32_by=fp32_by,
        int8_tiles_gops=None if tiles is None else tiles[0] / 1e9,
    )


def measure_read(threads: int, read_bytes: int | None = None, seconds: float = TRY_FOR_S) -> float:
    """GB/s that ``threads`` threads read from one array; arguments as ``measure_peaks``."""
    num_bytes = read_bytes or default_read_bytes()
    return float(_native().peak_read(num_bytes, threads, seconds)) / 1e9


def default_read_bytes() -> int:
    """Four times the largest cache, at least 512 MiB, at most a quarter of the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(LEAST_READ_BYTES, 4 * _largest_cache()), memory // 4)


def _largest_cache() -> int:
    """Bytes; 0 if the system does not tell."""
    return max((os.sysconf(name) for name in _CACHES if name in os.sysconf_names), default=0)


def _native() -> ModuleType:
    try:
        return import_module("kernels._native")
    except ImportError as error:
        raise KernelUnavailable(f"peaks are measured by the native module: {error}") from error

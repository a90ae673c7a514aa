"""What this machine can do at best, measured in the run that the figures are compared in."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.load import Report, Row
from kernels.dispatch import isa
from kernels.peaks import Peaks, measure_peaks, measure_read
from kernels.threads import configured_threads

TRY_FOR_S = 1.0
MIN_TRIES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    """A row for each number of threads up to the machine's; the last one is ``machine`` itself."""
    rows = []
    for threads in range(1, machine.peaks.threads):
        report(f"machine: {threads} of {machine.peaks.threads} threads")
        rows.append(Machine(machine.isa, measure_peaks(threads, seconds=TRY_FOR_S)).facts())
    return [*rows, machine.facts()]


@dataclass(frozen=True, slots=True)
class Machine:
    """The instruction set of the kernels, and the limits of as many threads as they use."""

    isa: str
    peaks: Peaks
    read_bytes: int | None = None
    seconds: float = TRY_FOR_S

    def read_gbps_now(self) -> float:
        """Once more, in a shorter time: on a shared machine it is not what it was a minute ago."""
        return measure_read(self.peaks.threads, self.read_bytes, self.seconds / 3)

    def facts(self) -> dict[str, Any]:
        """As results show it."""
        facts = asdict(self.peaks)
        return {"cores": facts.pop("threads"), "isa": self.isa, **facts}


def measure_machine(read_bytes: int | None = None, seconds: float = TRY_FOR_S) -> Machine:
    """Arguments as ``measure_peaks``."""
    peaks = measure_peaks(configured_threads(), read_bytes, seconds)
    return Machine(isa(), peaks, read_bytes, seconds)


def copy_s(num_bytes: int) -> float:
    """Seconds a plain copy of so many bytes takes, memory to memory, by one thread."""
    source = np.ones(num_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    return _best(lambda: np.copyto(target, source))


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

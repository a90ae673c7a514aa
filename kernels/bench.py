"""``python -m kernels.bench <op>``: compares an op with its reference, then times it.

The comparison comes first and a difference ends the run: a time of wrong results is worth nothing.
Each row has GB/s and GOP/s and the share of what this machine's limits, measured in the same run,
would allow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from kernels.bench_cases import CASES, Case, reference
from kernels.dispatch import KernelUnavailable, backend, implementation
from kernels.peaks import Peaks, default_read_bytes, measure_peaks
from kernels.threads import configured_threads

ROWS = (1, 8, 32, 512)
MOST_COPIES = 64
REPEATS = 5
TRY_FOR_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description="Compares an op with its reference, then times it.",
    )
    parser.add_argument("op", choices=sorted(CASES))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    try:
        rows = bench_op(options.op, options.rows, measure_peaks(configured_threads()))
    except (KernelUnavailable, Difference) as error:
        print(f"kernels.bench {options.op}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"op": options.op, "rows": rows}))
    else:
        print(render(rows))
    return 0


class Difference(Exception):
    """An op and its reference disagree."""


def bench_op(op: str, rows: Sequence[int], peaks: Peaks) -> list[dict[str, Any]]:
    """A row for each case. Raises Difference; KernelUnavailable where only a reference runs."""
    kernel, definition = getattr(implementation(op), op), reference(op)
    if kernel is definition:
        raise KernelUnavailable(f"{op} has nothing but its reference under {backend()}")
    found = []
    for case in itertools.chain.from_iterable(map(CASES[op], rows)):
        check(case, kernel, definition)
        found.append(figures(case, seconds_of(case, kernel), peaks))
    return found


def figures(case: Case, seconds: float, peaks: Peaks) -> dict[str, Any]:
    read_s = case.num_bytes / (peaks.read_gbps * 1e9)
    compute_s = case.num_ops / (peaks.gops(case.arithmetic) * 1e9)
    return {
        "case": case.name,
        "us": seconds * 1e6,
        "gb_per_s": case.num_bytes / seconds / 1e9,
        "gop_per_s": case.num_ops / seconds / 1e9,
        "bound": "memory" if read_s > compute_s else case.arithmetic,
        "limit_ratio": max(read_s, compute_s) / seconds,
    }


def check(case: Case, kernel: Callable[..., Any], definition: Callable[..., Any]) -> None:
    """Raises Difference unless the kernel gives what the reference gives, and no NaN."""
    found, expected = case.result(kernel), case.result(definition)
    largest = float(expected.abs().max())
    worst = float((found - expected).abs().max())
    if not worst <= case.tolerance * largest:
        raise Difference(
            f"{case.name} is off its reference by {worst:.3g}, the largest value is {largest:.3g}"
        )


def seconds_of(case: Case, kernel: Callable[..., Any]) -> float:
    """Of one call: the median over repeats of the mean of as many as fit into a try.

    Calls take turns with copies of the arguments, enough of them to outgrow the caches where the
    arguments are large: in a step of a model weights and pages come from memory too.
    """
    num_copies = min(MOST_COPIES, -(-default_read_bytes() // (case.held_bytes or case.num_bytes)))
    turns = itertools.cycle([case.ready(kernel) for _ in range(num_copies)])
    times = []
    for _ in range(REPEATS):
        calls, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < TRY_FOR_S / REPEATS or not calls:
            next(turns)()
            calls += 1
        times.append(took / calls)
    return median(times)


def render(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

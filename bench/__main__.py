"""``python -m bench`` or ``quire bench``: measures, prints a table or one JSON object.

The object has ``machine``, measured in this run, and ``rows``; progress goes to standard error.
One file per benchmark, named as on the command line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from bench.machine import measure_machine
from bench.options import count
from bench.table import render_table
from engine.errors import QuireError
from kernels.dispatch import KernelUnavailable

KINDS = {
    "decode": "tokens per second of running sequences",
    "prefill": "prompt tokens per second",
    "handover": "a prompt's pages from process to process",
    "reuse": "a prompt's pages read from another worker's cache, beside computing them",
    "serve": "streams through the services beside the engine alone on the same cores",
    "speculate": "tokens per second with drafts beside those without, on several kinds of text",
    "layers": "how often the head names the model's choice after its first layers",
    "steal": "decode while another process takes one of the cores away",
    "memory": "the most memory a decode service takes",
    "quality": "how far each mode's next-token distributions are from fp32's",
    "peer": "decode and prefill beside llama.cpp on the same cores",
    "machine": "the limits of this machine by number of threads",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark and returns the exit code."""
    options = parser().parse_args(argv)
    if options.cores is not None:
        pin(options.cores)
    try:
        report("measuring the machine")
        machine = measure_machine()
        rows = importlib.import_module(f"bench.{options.what}").run(options, machine, report)
    except (QuireError, KernelUnavailable) as error:
        print(f"quire bench {options.what}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"machine": machine.facts(), "rows": rows}))
    else:
        print(render_table(machine.facts(), rows))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="quire bench", description="Measures on this machine.")
    kinds = top.add_subparsers(dest="what", required=True)
    for name, summary in KINDS.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        importlib.import_module(f"bench.{name}").add_arguments(kind)
        kind.add_argument("--cores", type=count, metavar="N", help="use the first N cores allowed")
        kind.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def pin(num_cores: int) -> None:
    """Keeps this thread, and the threads and processes it starts, on the first cores allowed."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench`` or ``quire bench``: measures, prints a table or one JSON object.

The object has ``machine``, measured in this run, and ``rows``; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from bench.decode import bench_decode
from bench.handover import Services, bench_handover
from bench.load import Load, Row
from bench.machine import Machine, measure_machine
from bench.prefill import bench_prefill
from bench.table import render_table
from engine.errors import QuireError
from engine.model.load import LoadedModel, load_model
from engine.progress import default_progress


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark and returns the exit code."""
    options = parser().parse_args(argv)
    try:
        report("measuring the machine")
        machine = measure_machine()
        rows = options.run(options, machine)
    except QuireError as error:
        print(f"quire bench {options.what}: {error}", file=sys.stderr)
        return 1
    facts = asdict(machine)
    if options.json:
        print(json.dumps({"machine": facts, "rows": rows}))
    else:
        print(render_table(facts, rows))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="quire bench", description="Measures on this machine.")
    kinds = top.add_subparsers(dest="what", required=True)
    decode = kinds.add_parser("decode", help="tokens per second of running sequences")
    _add_shared(decode, prompt=128)
    decode.add_argument("--batch", type=_counts, default=(1,), metavar="1,8", help=_BATCH)
    decode.add_argument("--tokens", type=_count, default=64, help="generated from each prompt")
    decode.set_defaults(run=_decode)
    prefill = kinds.add_parser("prefill", help="prompt tokens per second")
    _add_shared(prefill, prompt=512)
    prefill.add_argument("--batch", type=_counts, default=(1,), metavar="1,8", help=_BATCH)
    prefill.set_defaults(run=_prefill, tokens=1)
    handover = kinds.add_parser("handover", help="a prompt's pages from process to process")
    _add_shared(handover, prompt=1000)
    handover.set_defaults(run=_handover, batch=(1,), tokens=1)
    return top


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_BATCH = "sequences at once, a row for each number"


def _add_shared(kind: argparse.ArgumentParser, prompt: int) -> None:
    kind.add_argument("--model", default="smollm2", help="name or path (default %(default)s)")
    kind.add_argument("--weights", default="fp32", choices=("fp32", "bf16"))
    kind.add_argument("--kv", choices=("fp32", "bf16"), help="default: what suits the weights")
    kind.add_argument("--prompt", type=_count, default=prompt, help="tokens (default %(default)s)")
    kind.add_argument("--repeat", type=_count, default=3, help="medians over this many")
    kind.add_argument("--json", action="store_true", help="print one JSON object")


def _decode(options: argparse.Namespace, machine: Machine) -> list[Row]:
    loaded = _open_model(options)
    runs = (bench_decode(loaded, load, machine, report) for load in loads(options))
    return [asyncio.run(run) for run in runs]


def _prefill(options: argparse.Namespace, machine: Machine) -> list[Row]:
    loaded = _open_model(options)
    runs = (bench_prefill(loaded, load, machine, report) for load in loads(options))
    return [asyncio.run(run) for run in runs]


def _handover(options: argparse.Namespace, machine: Machine) -> list[Row]:
    services = Services(options.model, options.weights, options.kv)
    return [bench_handover(services, load, report) for load in loads(options)]


def loads(options: argparse.Namespace) -> list[Load]:
    """One load for each batch size asked for."""
    return [Load(batch, options.prompt, options.tokens, options.repeat) for batch in options.batch]


def _open_model(options: argparse.Namespace) -> LoadedModel:
    return load_model(
        options.model, weights=options.weights, kv=options.kv, progress=default_progress()
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not at least 1")
    return count


if __name__ == "__main__":
    sys.exit(main())

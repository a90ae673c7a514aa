"""Decode and prefill beside llama.cpp, on the same cores in the same minutes.

Needs llama.cpp's own ``llama-batched-bench`` and ``llama-quantize``. The model's GGUF file is put
in each type asked for; then every repeat runs each of llama.cpp's types and each of our modes once,
so that a drift of the machine meets both. llama.cpp keeps its defaults (keys and values in fp16)
and gets as many threads as we do.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.decode import bench_decode
from bench.llama_cpp import LlamaCpp, add_llama_cpp, model_file
from bench.load import Load, Report, Row
from bench.machine import Machine
from bench.options import add_modes, count, counts, open_models
from bench.prefill import bench_prefill

BENCHES = {"decode": bench_decode, "prefill": bench_prefill}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    add_llama_cpp(parser, required=True)
    parser.add_argument("--batch", type=counts, default=(1, 8, 32), metavar="1,8")
    parser.add_argument("--context", type=count, default=128, help="tokens of a prompt to decode")
    parser.add_argument("--tokens", type=count, default=64, help="generated from each prompt")
    parser.add_argument("--prompt", type=count, default=512, help="tokens of a prompt to prefill")


@dataclass(frozen=True, slots=True)
class Case:
    """What both sides run: ``kind`` is ``decode`` or ``prefill``."""

    kind: str
    load: Load


Speeds = dict[tuple[str, Case], list[float]]
"""Tokens per second by what ran, a llama.cpp type or one of our modes, and case; one per repeat."""


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    """A row for each of our modes in each case."""
    theirs: Speeds = defaultdict(list)
    ours: Speeds = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        peer = LlamaCpp(options.folder)
        source = model_file(options.model)
        files = {kind: peer.convert(source, kind, Path(folder)) for kind in options.types}
        for repeat in range(1, options.repeat + 1):
            for kind, file in files.items():
                report(f"repeat {repeat} of {options.repeat}: llama.cpp {kind}")
                for case in cases_of(options):
                    theirs[kind, case].append(peer.tokens_per_s(file, case.load, case.kind))
            for loaded in open_models(options):
                spec = loaded.model.spec
                for case in cases_of(options):
                    row = asyncio.run(BENCHES[case.kind](loaded, case.load, machine, report))
                    ours[f"{spec.weight_mode}/{spec.kv_dtype}", case].append(row["tokens_per_s"])
    return [row_of(mode, case, speeds, theirs) for (mode, case), speeds in ours.items()]


def cases_of(options: argparse.Namespace) -> list[Case]:
    prefill = Case("prefill", Load(batch=1, prompt=options.prompt, tokens=1, repeat=1))
    decode = [
        Case("decode", Load(batch, options.context, options.tokens, repeat=1))
        for batch in options.batch
    ]
    return [*decode, prefill]


def row_of(mode: str, case: Case, speeds: Sequence[float], theirs: Speeds) -> Row:
    """Medians, and ours over that of each type and of the best one in this case."""
    weights, kv = mode.split("/")
    peers = {kind: median(them) for (kind, other), them in theirs.items() if other == case}
    speed = median(speeds)
    row = {
        "kind": case.kind,
        "weights": weights,
        "kv": kv,
        "batch": case.load.batch,
        "prompt": case.load.prompt,
        "tokens_per_s": speed,
    }
    row |= {f"llama_cpp_{kind}": peer for kind, peer in peers.items()}
    row |= {f"to_{kind}": speed / peer for kind, peer in peers.items()}
    return row | {"to_best": speed / max(peers.values())}

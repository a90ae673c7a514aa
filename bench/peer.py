"""Decode and prefill beside llama.cpp, on the same cores in the same minutes.

Needs llama.cpp's own ``llama-batched-bench`` and ``llama-quantize``. The model's GGUF file is put
in each type asked for; then every repeat runs each of llama.cpp's types and each of our modes once,
so that a drift of the machine meets both. llama.cpp keeps its defaults (keys and values in fp16)
and gets as many threads as we do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.decode import bench_decode
from bench.load import Load, Report, Row
from bench.machine import Machine
from bench.options import add_modes, count, counts, names, open_models
from bench.prefill import bench_prefill
from engine.errors import InvalidRequest
from engine.model.load import PACKAGED, packaged_file
from kernels.threads import configured_threads

FOLDER_FLAG = "--llama-cpp"
BENCHES = {"decode": bench_decode, "prefill": bench_prefill}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    parser.add_argument(
        FOLDER_FLAG,
        dest="folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of llama-batched-bench and llama-quantize",
    )
    parser.add_argument(
        "--types",
        type=names,
        default=("Q8_0", "Q4_0", "BF16"),
        metavar="Q8_0,BF16",
        help="what llama.cpp runs the model in (default %(default)s)",
    )
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
                    theirs[kind, case].append(peer.tokens_per_s(file, case))
            for loaded in open_models(options):
                spec = loaded.model.spec
                for case in cases_of(options):
                    row = asyncio.run(BENCHES[case.kind](loaded, case.load, machine.peaks, report))
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


def model_file(model: str) -> Path:
    """The GGUF file of a name or path. Raises InvalidRequest if it is none."""
    path = packaged_file(model) if model in PACKAGED else Path(model)
    if not path.is_file():
        raise InvalidRequest("--model", f"{model} is not a file", "a GGUF file, smollm2")
    return path


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """The programs in ``folder``. What fails raises InvalidRequest with the program's last line."""

    folder: Path

    def convert(self, model: Path, kind: str, into: Path) -> Path:
        """The model's file in a type, as ``Q8_0``."""
        file = into / f"{kind}.gguf"
        self._run("llama-quantize", "--allow-requantize", model, file, kind)
        return file

    def tokens_per_s(self, model: Path, case: Case) -> float:
        load, threads = case.load, configured_threads()
        context = load.batch * (load.prompt + load.tokens)
        lines = self._run(
            "llama-batched-bench",
            *("-m", model, "-c", context, "-b", 2048, "-ub", 512, "-t", threads),
            *("-npp", load.prompt, "-ntg", load.tokens, "-npl", load.batch),
            *("--output-format", "jsonl"),
        )
        return speed_of(lines, case.kind)

    def _run(self, program: str, *arguments: object) -> str:
        path = self.folder / program
        libraries = {"LD_LIBRARY_PATH": f"{self.folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        try:
            done = subprocess.run(
                [path, *map(str, arguments)],
                env={**os.environ, **libraries},
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise InvalidRequest(
                FOLDER_FLAG, f"{path}: {error.strerror}", "a folder of llama.cpp's programs"
            ) from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InvalidRequest(
                FOLDER_FLAG, f"{program} ended with {done.returncode}: {last}", "programs that run"
            )
        return done.stdout


def speed_of(lines: str, kind: str) -> float:
    """Tokens per second from the one result of llama-batched-bench."""
    (result,) = (json.loads(line) for line in lines.splitlines() if line.startswith("{"))
    return float(result["speed_pp" if kind == "prefill" else "speed_tg"])

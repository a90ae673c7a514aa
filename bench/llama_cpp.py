"""llama.cpp's own programs, run on our prompts and loads."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.load import Load
from bench.options import names
from engine.errors import InvalidRequest
from engine.model.load import PACKAGED, packaged_file
from kernels.threads import configured_threads

FOLDER_FLAG = "--llama-cpp"


def add_llama_cpp(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        FOLDER_FLAG,
        dest="folder",
        type=Path,
        required=required,
        metavar="DIR",
        help="folder of llama.cpp's programs",
    )
    parser.add_argument(
        "--types",
        type=names,
        default=("Q8_0", "Q4_0", "BF16") if required else ("Q8_0",),
        metavar="Q8_0,BF16",
        help="what llama.cpp runs the model in (default %(default)s)",
    )


@dataclass(frozen=True, slots=True)
class Lookup:
    """A text that llama-lookup wrote."""

    num_tokens: int
    seconds: float
    drafted: int
    accepted: int


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

    def tokens_per_s(self, model: Path, load: Load, kind: str) -> float:
        """``kind`` is ``decode`` or ``prefill``."""
        context = load.batch * (load.prompt + load.tokens)
        lines = self._run(
            "llama-batched-bench",
            *("-m", model, "-c", context, "-b", 2048, "-ub", 512, "-t", configured_threads()),
            *("-npp", load.prompt, "-ntg", load.tokens, "-npl", load.batch),
            *("--output-format", "jsonl"),
        )
        return speed_of(lines, kind)

    def lookup(self, model: Path, prompt: str, num_tokens: int, most_drafts: int) -> Lookup:
        """Greedy, from a prompt in which special tokens stand as text; without drafts if
        ``most_drafts`` is 0."""
        context = len(prompt) + 2 * num_tokens  # no text has more tokens than characters
        lines = self._run(
            "llama-lookup",
            *("-m", model, "-c", context, "-t", configured_threads(), "--temp", 0),
            *("-p", prompt, "-n", num_tokens, "--ignore-eos", "--spec-draft-n-max", most_drafts),
        )
        return lookup_of(lines)

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
        return done.stdout + done.stderr


def speed_of(lines: str, kind: str) -> float:
    """Tokens per second from the one result of llama-batched-bench."""
    (result,) = (json.loads(line) for line in lines.splitlines() if line.startswith("{"))
    return float(result["speed_pp" if kind == "prefill" else "speed_tg"])


def lookup_of(lines: str) -> Lookup:
    """From what llama-lookup tells at its end."""
    tokens, seconds = _found(r"decoded +(\d+) tokens in +([\d.]+) seconds", lines)
    (drafted,) = _found(r"n_drafted += (\d+)", lines)
    (accepted,) = _found(r"n_accept += (\d+)", lines)
    return Lookup(int(tokens), float(seconds), int(drafted), int(accepted))


def _found(pattern: str, lines: str) -> tuple[str, ...]:
    match = re.search(pattern, lines)
    if match is None:
        raise InvalidRequest(FOLDER_FLAG, "llama-lookup did not tell its speed", "another version")
    return match.groups()

"""``quire draft train``: a small head that drafts for one model."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from engine.errors import InvalidRequest
from engine.model.llama import LlamaModel
from engine.model.load import load_model
from engine.modes import DEFAULT_WEIGHTS, WEIGHT_MODES
from engine.progress import default_progress
from engine.speculation.head_training import TrainingSettings, save_head, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="draft_command", required=True, metavar="COMMAND")
    training = commands.add_parser(
        "train",
        help="let the model write text, and a small head learn to draft it",
        description="The model writes text, users' messages included, and a head learns to draft "
        "it. Use the head with --speculate head --draft PATH.",
    )
    defaults = TrainingSettings()
    training.add_argument("--model", default="smollm2", help="a name or a path")
    training.add_argument("--weights", choices=WEIGHT_MODES, default=DEFAULT_WEIGHTS)
    training.add_argument("--out", type=Path, required=True, help="a .safetensors file to write")
    training.add_argument(
        "--tokens", type=int, default=defaults.num_tokens, help="of text (%(default)s)"
    )
    training.add_argument(
        "--minutes", type=float, default=defaults.seconds / 60, help="of learning (%(default)s)"
    )
    training.add_argument(
        "--vocabulary",
        type=int,
        default=defaults.vocabulary,
        help="tokens it may draft, the most frequent ones (%(default)s)",
    )
    training.add_argument(
        "--hidden",
        type=int,
        default=defaults.hidden,
        help="its feed-forward's width (0: the model's own)",
    )
    training.add_argument("--seed", type=int, default=defaults.seed)


def run(options: argparse.Namespace) -> int:
    _check(options)
    settings = TrainingSettings(
        num_tokens=options.tokens,
        seconds=60 * options.minutes,
        hidden=options.hidden,
        vocabulary=options.vocabulary,
        seed=options.seed,
    )
    progress = default_progress()
    loaded = load_model(options.model, weights=options.weights, progress=progress)
    if not isinstance(loaded.model, LlamaModel):
        raise InvalidRequest("--model", f"{options.model} has no hidden rows", "a real model")
    head, report = asyncio.run(train(loaded, settings, progress))
    save_head(head, options.out, loaded.model.spec.digest)
    accepted = " ".join(f"{share:.3f}" for share in report.accepted)
    print(
        f"right at positions 1 to {len(report.accepted)} of a draft, where those before it are: "
        f"{accepted} ({report.num_positions} held-out positions)",
        file=sys.stderr,
    )
    print(options.out)
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in ("tokens", "minutes", "vocabulary"):
        value = getattr(options, name)
        if value <= 0:
            raise InvalidRequest(f"--{name}", f"{value} is too few", "more than 0")
    if options.hidden < 0:
        raise InvalidRequest("--hidden", f"{options.hidden} is too few", "0 or more")
    if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
        raise InvalidRequest("--out", f"{options.out} cannot be written", "a .safetensors file")

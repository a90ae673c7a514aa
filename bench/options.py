"""Flags that several benchmarks share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product

from bench.load import Load
from engine.model.load import LoadedModel, load_model
from engine.modes import DEFAULT_WEIGHTS
from engine.progress import default_progress


def add_modes(parser: argparse.ArgumentParser, repeat: int = 3) -> None:
    """Model, modes and repeats; the name of a mode is checked when the model is loaded."""
    parser.add_argument("--model", default="smollm2", help="name or path (default %(default)s)")
    parser.add_argument(
        "--weights",
        type=names,
        default=(DEFAULT_WEIGHTS,),
        metavar="int8,int4",
        help=f"default {DEFAULT_WEIGHTS}",
    )
    parser.add_argument(
        "--kv",
        type=names,
        default=("auto",),
        metavar="bf16,int8",
        help="default auto: what suits the weights",
    )
    parser.add_argument(
        "--repeat", type=count, default=repeat, help="medians over this many (default %(default)s)"
    )


def add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch",
        type=counts,
        default=(1,),
        metavar="1,8",
        help="sequences at once, a row for each number",
    )


def modes(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Each weight mode with each KV dtype asked for; None is what suits the weights."""
    pairs = product(options.weights, options.kv)
    return [(weights, None if kv == "auto" else kv) for weights, kv in pairs]


def open_models(options: argparse.Namespace) -> Iterator[LoadedModel]:
    """The model in each of the modes, loaded one after the other. Raises ModelError."""
    for weights, kv in modes(options):
        yield load_model(options.model, weights=weights, kv=kv, progress=default_progress())


def loads(options: argparse.Namespace) -> list[Load]:
    """One load for each batch size and prompt length asked for."""
    return [
        Load(batch, prompt, options.tokens, options.repeat)
        for batch, prompt in product(options.batch, options.prompt)
    ]


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def counts(text: str) -> tuple[int, ...]:
    return tuple(count(part) for part in text.split(","))


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= 600:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 600")
    return number

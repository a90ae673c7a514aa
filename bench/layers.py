"""Early exit: how often the head names the model's own choice after its first layers only.

A draft made of so many layers and the head reads ``share_of_step`` of what a step reads, so it can
save time only where it is right more often than that (as in LayerSkip: Elhoushi et al., 2024,
arXiv:2404.16710, whose models were trained for it).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace

from bench.load import Report, Row
from bench.machine import Machine
from bench.options import add_modes, count, counts, names, open_models
from bench.quality import all_logits
from bench.speculate import TEXTS, batches_of, engine_of
from engine.errors import InvalidRequest
from engine.model.llama import LlamaModel
from engine.model.load import LoadedModel
from engine.model.weights import step_bytes
from engine.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    parser.add_argument(
        "--layers", type=counts, default=(8, 16, 20, 24, 28), metavar="20,24", help="first layers"
    )
    parser.add_argument("--texts", type=names, default=TEXTS, metavar=",".join(TEXTS))
    parser.add_argument("--tokens", type=count, default=96, help="generated from each prompt")


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    return [row for loaded in open_models(options) for row in bench_layers(loaded, options, report)]


def bench_layers(loaded: LoadedModel, options: argparse.Namespace, report: Report) -> list[Row]:
    """A row for each number of layers and kind of text. Raises InvalidRequest."""
    model = loaded.model
    if not isinstance(model, LlamaModel):
        raise InvalidRequest("--model", f"{loaded.name} has no layers to leave out", "another")
    rows = []
    for text in options.texts:
        report(f"layers {text}")
        answers = asyncio.run(answers_to(loaded, text, options))
        for num_layers in options.layers:
            first = first_layers(model, num_layers)
            rows.append(
                {
                    "text": text,
                    "weights": model.spec.weight_mode,
                    "layers": num_layers,
                    "share_of_step": step_bytes(first.weights) / step_bytes(model.weights),
                    "agreement": agreement(first, answers),
                }
            )
    return rows


Answers = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Prompts and what the model wrote."""


async def answers_to(loaded: LoadedModel, text: str, options: argparse.Namespace) -> Answers:
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens)
    prompts = [prompt for (prompt,) in batches_of(loaded, text, 1)]
    async with engine_of(loaded, "off", len(prompts), options) as engine:
        found = await engine.generate(prompts, params)
    return [(prompt, tuple(each.token_ids)) for prompt, each in zip(prompts, found, strict=True)]


def first_layers(model: LlamaModel, number: int) -> LlamaModel:
    """The model without its other layers. Raises InvalidRequest if it has fewer."""
    if number > len(model.weights.layers):
        raise InvalidRequest("--layers", str(number), f"1 to {len(model.weights.layers)}")
    weights = replace(model.weights, layers=model.weights.layers[:number])
    return LlamaModel(model.config, weights, replace(model.spec, num_layers=number))


def agreement(model: LlamaModel, answers: Answers) -> float:
    """The share of all answers' tokens that this model puts first too."""
    equal = total = 0
    for prompt, answer in answers:
        logits = all_logits(model, prompt + answer)[len(prompt) - 1 : -1]
        equal += sum(
            int(best == token) for best, token in zip(logits.argmax(1), answer, strict=True)
        )
        total += len(answer)
    return equal / total

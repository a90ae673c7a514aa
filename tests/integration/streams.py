"""Kinds of streams that must come out the same however often they are broken and continued."""

from __future__ import annotations

from collections.abc import Iterable

from engine.completion import Collector, Completion, Delta, StreamItem
from engine.sampling_params import SamplingParams

PROMPT = [*b"a prompt of a few pages, so that some of it is found again: "]

KINDS = {
    "greedy": SamplingParams(temperature=0, seed=0, max_tokens=14),
    "sampled": SamplingParams(temperature=1.0, top_p=0.9, seed=2**64 - 1, max_tokens=14),
    "three choices": SamplingParams(
        temperature=1.0, seed=6, n=3, stop_token_ids=tuple(range(60)), max_tokens=8
    ),
    "penalties": SamplingParams(
        temperature=0.8,
        seed=1,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        max_tokens=14,
    ),
    "logprobs": SamplingParams(temperature=0.5, seed=9, logprobs=3, max_tokens=12),
    "stop strings in the middle": SamplingParams(
        temperature=1.0,
        seed=2,
        allowed_token_ids=(97, 98),
        stop=("abbabb", "babab"),
        min_tokens=7,
        max_tokens=60,
        include_stop=True,
    ),
    "unfinished characters": SamplingParams(
        temperature=1.0, seed=6, allowed_token_ids=(0xE2, 0x82, 0xAC, 0x61, 0xF0), max_tokens=16
    ),
    "stop ids and a late end": SamplingParams(
        temperature=1.0, seed=7, stop_token_ids=tuple(range(120)), min_tokens=12, max_tokens=40
    ),
}


def essence(completions: Iterable[Completion]) -> list[tuple[object, ...]]:
    """What must be equal however often and wherever a stream went on."""
    return [
        (each.token_ids, each.text, each.logprobs, each.finish_reason, each.matched_stop, each.seed)
        for each in completions
    ]


def collected(items: Iterable[StreamItem], params: SamplingParams) -> Collector:
    collector = Collector(wants_logprobs=params.logprobs is not None)
    for item in items:
        collector.add(item)
    return collector


def deltas_of(items: Iterable[StreamItem], choice: int) -> list[Delta]:
    """The deltas of one choice: those of several may come in any order."""
    return [item for item in items if isinstance(item, Delta) and item.choice_index == choice]

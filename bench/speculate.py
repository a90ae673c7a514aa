"""Speculation: tokens per second with drafts beside those without, in turn on the same model.

Every pair runs the same prompts, greedily, each once with the proposer and at once once without;
which of the two goes first alternates. Prompts come from the prefix cache, so decoding is what is
timed. The texts are of several kinds, because what can be guessed depends on them
(``bench/prompts``). Beside them, where its programs are, llama.cpp's own lookup does the same.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory

from bench.llama_cpp import LlamaCpp, add_llama_cpp, model_file
from bench.load import PAGE_SIZE, Report, Row
from bench.machine import Machine
from bench.options import add_batch, add_modes, count, names, open_models
from engine.chat_template import ChatMessage
from engine.completion import Completion
from engine.errors import InvalidRequest
from engine.gguf_tokenizer import GgufVocabulary
from engine.local import AsyncLocalEngine
from engine.model.gguf_file import open_gguf
from engine.model.load import LoadedModel
from engine.modes import SPECULATION_MODES
from engine.prompts import encode_prompt
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits
from engine.speculation.loading import packaged_head

PROMPTS = Path(__file__).with_name("prompts")
TEXTS = ("chat", "summary", "code", "story")
SEPARATOR = "\n====\n"
LLAMA_CPP_DRAFTS = 8
# Two-sided 95 % of Student's t, by degrees of freedom; 2 for more.
_STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    add_batch(parser)
    parser.add_argument(
        "--proposers",
        type=names,
        metavar=",".join(SPECULATION_MODES[1:]),
        help="default all; head only where one is named or packaged",
    )
    parser.add_argument("--draft", default="", help="the head's file (the packaged one)")
    parser.add_argument("--texts", type=names, default=TEXTS, metavar=",".join(TEXTS))
    parser.add_argument("--tokens", type=count, default=128, help="generated from each prompt")
    add_llama_cpp(parser, required=False)
    parser.set_defaults(repeat=5)


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    rows = [
        row
        for loaded in open_models(options)
        for batch in options.batch
        for row in asyncio.run(bench_model(loaded, batch, options, report))
    ]
    return rows if options.folder is None else [*rows, *bench_llama_cpp(options, report)]


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds without and with drafts."""

    without_s: float
    with_s: float


async def bench_model(
    loaded: LoadedModel, batch: int, options: argparse.Namespace, report: Report
) -> list[Row]:
    """A row for each proposer and text."""
    rows = []
    proposers = options.proposers or proposers_of(loaded, options.draft)
    async with AsyncExitStack() as stack:
        engines = {
            name: await stack.enter_async_context(engine_of(loaded, name, batch, options))
            for name in ("off", *proposers)
        }
        for text in options.texts:
            batches = batches_of(loaded, text, batch)
            for proposer in proposers:
                report(f"speculate {proposer} {text} batch {batch}")
                pairs, found = await bench_pairs(
                    engines["off"], engines[proposer], batches, options.tokens, options.repeat
                )
                settings = {
                    "proposer": proposer,
                    "text": text,
                    "weights": loaded.model.spec.weight_mode,
                    "batch": batch,
                }
                rows.append(settings | figures(pairs, drafts_of(found)))
    return rows


def proposers_of(loaded: LoadedModel, draft: str) -> tuple[str, ...]:
    """All there are; a head, alone or with lookup, only where one is named or packaged."""
    has_head = bool(draft) or packaged_head(loaded.model.spec.digest) is not None
    return tuple(mode for mode in SPECULATION_MODES[1:] if has_head or mode not in ("auto", "head"))


def engine_of(
    loaded: LoadedModel, speculate: str, batch: int, options: argparse.Namespace
) -> AsyncLocalEngine:
    """Room for all prompts of a kind and what is generated from them."""
    return AsyncLocalEngine(
        loaded,
        pool_tokens=max(batch, 4) * (1024 + 2 * options.tokens),
        page_size=PAGE_SIZE,
        limits=SchedulerLimits(max_sequences=batch, max_step_tokens=max(256, 16 * batch)),
        speculate=speculate,
        draft=options.draft if speculate in ("auto", "head") else "",
    )


Batch = list[tuple[int, ...]]


def batches_of(loaded: LoadedModel, text: str, batch: int) -> list[Batch]:
    """All prompts of a kind as token ids, in chat form, in batches to be run one after the other;
    in large ones some stand more than once. Raises InvalidRequest for an unknown kind.
    """
    if text not in TEXTS:
        raise InvalidRequest("--texts", f"no kind of text is named {text!r}", ", ".join(TEXTS))
    each = (PROMPTS / f"{text}.txt").read_text().split(SEPARATOR)
    encoded = [
        encode_prompt([ChatMessage("user", prompt.strip())], loaded.tokenizer) for prompt in each
    ]
    starts = range(0, len(encoded), batch)
    return [
        [encoded[(start + number) % len(encoded)] for number in range(batch)] for start in starts
    ]


async def bench_pairs(
    without: AsyncLocalEngine,
    drafting: AsyncLocalEngine,
    batches: Sequence[Batch],
    num_tokens: int,
    num_pairs: int,
) -> tuple[list[Pair], list[Completion]]:
    """The times, and what the drafting engine brought; asserts that both bring the same tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    found = [each for batch in batches for each in await drafting.generate(batch, params)]
    expected = [each for batch in batches for each in await without.generate(batch, params)]
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    pairs = []
    for number in range(num_pairs):
        seconds = {without: 0.0, drafting: 0.0}
        for place, batch in enumerate(batches):
            order = (without, drafting) if (number + place) % 2 else (drafting, without)
            for engine in order:
                began = time.perf_counter()
                await engine.generate(batch, params)
                seconds[engine] += time.perf_counter() - began
        pairs.append(Pair(seconds[without], seconds[drafting]))
    return pairs, found


def bench_llama_cpp(options: argparse.Namespace, report: Report) -> list[Row]:
    """A row for each type and text: llama-lookup on the same prompts, one at a time, in turn with
    and without drafts."""
    peer, source = LlamaCpp(options.folder), model_file(options.model)
    loaded = next(open_models(options))
    rows = []
    with TemporaryDirectory(prefix="quire-bench-") as folder:
        for kind, text in product(options.types, options.texts):
            file = peer.convert(source, kind, Path(folder))
            prompts = [text_of(ids, loaded, source) for (ids,) in batches_of(loaded, text, 1)]
            pairs, found = [], []
            for number in range(options.repeat):
                report(f"speculate llama.cpp {kind} {text} {number + 1}/{options.repeat}")
                runs = {
                    most: [peer.lookup(file, each, options.tokens, most) for each in prompts]
                    for most in (0, LLAMA_CPP_DRAFTS)[:: 1 if number % 2 else -1]
                }
                seconds = [sum(run.seconds for run in runs[most]) for most in (0, LLAMA_CPP_DRAFTS)]
                pairs.append(Pair(*seconds))
                found = runs[LLAMA_CPP_DRAFTS]
            settings = {"proposer": "llama.cpp", "text": text, "weights": kind, "batch": 1}
            num_tokens, drafted, accepted = (
                sum(getattr(run, name) for run in found)
                for name in ("num_tokens", "drafted", "accepted")
            )
            rows.append(settings | figures(pairs, Drafts(num_tokens, drafted, accepted)))
    return rows


def text_of(ids: Sequence[int], loaded: LoadedModel, source: Path) -> str:
    """Token ids as text, special ones too."""
    vocabulary = GgufVocabulary.of(open_gguf(source).fields)
    pieces = (
        loaded.tokenizer.token_bytes(each) or vocabulary.text_of(each).encode() for each in ids
    )
    return b"".join(pieces).decode()


@dataclass(frozen=True, slots=True)
class Drafts:
    """Tokens that were written, of which so many were drafted, and so many drafts right."""

    num_tokens: int
    drafted: int
    accepted: int


def drafts_of(found: Sequence[Completion]) -> Drafts:
    return Drafts(
        sum(each.usage.output_tokens for each in found),
        sum(each.usage.drafted_tokens for each in found),
        sum(each.usage.accepted_tokens for each in found),
    )


def figures(pairs: Sequence[Pair], drafts: Drafts) -> Row:
    """The measured part of a row; the interval is that of the ratios' logarithms, at 95 %."""
    logs = [log(pair.without_s / pair.with_s) for pair in pairs]
    spread = 0.0
    if len(logs) > 1:
        spread = _STUDENT_T.get(len(logs) - 1, 2.0) * stdev(logs) / sqrt(len(logs))
    return {
        "tokens_per_s": drafts.num_tokens / median(pair.with_s for pair in pairs),
        "tokens_per_s_off": drafts.num_tokens / median(pair.without_s for pair in pairs),
        "accepted_per_pass": drafts.num_tokens / (drafts.num_tokens - drafts.accepted),
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "speedup": exp(fmean(logs)),
        "speedup_low": exp(fmean(logs) - spread),
        "speedup_high": exp(fmean(logs) + spread),
    }

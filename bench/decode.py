"""Decode: tokens per second of a batch that decodes together, through the whole engine.

The clock runs from the beginning of the first step that decodes the whole batch to the beginning of
the last one; scheduling, sampling and streaming count, prefill does not. ``outside_step`` is the
share of that time outside the model's forward pass.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from bench.limits import Workload, bytes_of, limit_ratios, workload_of
from bench.load import PAGE_SIZE, Load, Report, Row
from bench.machine import Machine
from bench.options import add_batch, add_modes, count, counts, loads, open_models
from bench.timed_model import Call, TimedModel, longest_decode
from engine.errors import InvalidRequest
from engine.local import AsyncLocalEngine
from engine.model.load import LoadedModel
from engine.scheduler import SchedulerLimits
from kernels.peaks import Peaks

WARM_UP_TOKENS = 8
REPEATS = 7  # each takes a second or less, in which what a shared machine gives may change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser, repeat=REPEATS)
    add_batch(parser)
    parser.add_argument(
        "--context",
        "--prompt",
        dest="prompt",
        type=counts,
        default=(128,),
        metavar="128,2048",
        help="tokens before the first one generated (default 128)",
    )
    parser.add_argument("--tokens", type=count, default=64, help="generated from each prompt")


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    return [
        asyncio.run(bench_decode(loaded, load, machine, report))
        for loaded in open_models(options)
        for load in loads(options)
    ]


@dataclass(frozen=True, slots=True)
class Steady:
    """Steps of the whole batch: seconds each, keys each sequence attended to on average, the share
    of the time outside the forward pass, and what was read just before or after, the more of it."""

    step_s: float
    context: float
    outside: float
    read_gbps: float


async def bench_decode(loaded: LoadedModel, load: Load, machine: Machine, report: Report) -> Row:
    """One row: the median over the repeats.

    Prompts are the same in every repeat: all but their last tokens come from the prefix cache then,
    so that the sequences begin to decode together however long their context is.
    """
    model = TimedModel(loaded.model)
    spec = loaded.model.spec
    prompts = load.prompts(spec.vocab_size, repeat=0)
    samples = []
    async with engine_for(replace(loaded, model=model), load) as engine:
        report(f"decode batch {load.batch} context {load.prompt}: prefilling")
        warm_up = replace(load, tokens=min(WARM_UP_TOKENS, load.tokens))
        await engine.generate(prompts, warm_up.params)
        before = machine.read_gbps_now()
        for repeat in range(1, load.repeat + 1):
            model.calls.clear()
            await engine.generate(prompts, load.params)
            after = machine.read_gbps_now()
            steps = longest_decode(model.calls, load.batch)
            samples.append(steady(steps, load.batch, read_gbps=max(before, after)))
            before = after
            report(f"decode batch {load.batch} context {load.prompt}: {repeat}/{load.repeat}")
    settings = load.row(loaded.name, spec.weight_mode, spec.kv_dtype)
    workload = workload_of(loaded.model, PAGE_SIZE)
    return settings | figures(samples, load.batch, workload, machine.peaks)


def engine_for(loaded: LoadedModel, load: Load) -> AsyncLocalEngine:
    """An engine in which the whole load runs together once its prompts are cached."""
    rows = max(256, load.batch * 2 * PAGE_SIZE)
    limits = SchedulerLimits(
        max_sequences=load.batch, max_step_tokens=rows, chunk_tokens=min(rows, 512)
    )
    return AsyncLocalEngine(
        loaded, pool_tokens=load.pool_tokens, page_size=PAGE_SIZE, limits=limits
    )


def steady(steps: Sequence[Call], batch: int, read_gbps: float) -> Steady:
    """Of consecutive steps of the whole batch. Raises InvalidRequest if they are too few."""
    if len(steps) < 2:
        raise InvalidRequest("--tokens", "no two steps decoded the whole batch", "more tokens")
    wall_s = steps[-1].began - steps[0].began
    inside_s = sum(step.ended - step.began for step in steps[:-1])
    return Steady(
        step_s=wall_s / (len(steps) - 1),
        context=fmean(step.num_keys for step in steps[:-1]) / batch,
        outside=1 - inside_s / wall_s,
        read_gbps=read_gbps,
    )


def figures(samples: Sequence[Steady], batch: int, workload: Workload, peaks: Peaks) -> Row:
    """The measured part of a row: medians, the ratios' too, each of what the machine read then."""
    step_s = median(sample.step_s for sample in samples)
    phases = workload.decode_step(batch, fmean(sample.context for sample in samples))
    ratios = [
        limit_ratios(phases, replace(peaks, read_gbps=sample.read_gbps), sample.step_s)
        for sample in samples
    ]
    return {
        "tokens_per_s": batch / step_s,
        "step_s": step_s,
        "bytes_per_step": bytes_of(phases),
        "read_gbps": median(sample.read_gbps for sample in samples),
        **{name: median(each[name] for each in ratios) for name in ratios[0]},
        "outside_step": median(sample.outside for sample in samples),
    }

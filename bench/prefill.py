"""Prefill: prompt tokens per second until the first token of every prompt of the batch.

Chunks are those of the services. The first token's own work (LM head, sampling) is in the time but
not in the operations counted.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from statistics import median

from bench.limits import Workload, limit_ratios, workload_of
from bench.load import PAGE_SIZE, Load, Report, Row
from bench.machine import Machine
from bench.options import add_batch, add_modes, counts, loads, open_models
from engine.local import AsyncLocalEngine
from engine.model.load import LoadedModel
from engine.scheduler import SchedulerLimits
from kernels.peaks import Peaks

CHUNK = SchedulerLimits().chunk_tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    add_batch(parser)
    parser.add_argument(
        "--prompt",
        type=counts,
        default=(512,),
        metavar="128,512",
        help="tokens of each prompt (default 512)",
    )
    parser.add_argument(
        "--chunk",
        type=counts,
        default=(CHUNK,),
        metavar="128,512",
        help="prompt tokens in a step (default that of the services)",
    )
    parser.set_defaults(tokens=1)


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    return [
        asyncio.run(bench_prefill(loaded, load, machine, report, chunk))
        for loaded in open_models(options)
        for load in loads(options)
        for chunk in options.chunk
    ]


async def bench_prefill(
    loaded: LoadedModel, load: Load, machine: Machine, report: Report, chunk: int = CHUNK
) -> Row:
    """One row: the median over the repeats. ``load.tokens`` is 1."""
    spec = loaded.model.spec
    samples = []
    limits = SchedulerLimits(max_step_tokens=max(chunk, 64), chunk_tokens=chunk)
    async with AsyncLocalEngine(
        loaded, pool_tokens=load.pool_tokens, page_size=PAGE_SIZE, limits=limits
    ) as engine:
        for repeat in range(load.repeat + 1):
            prompts = load.prompts(spec.vocab_size, repeat)
            began = time.perf_counter()
            await engine.generate(prompts, load.params)
            if repeat:  # the first one warms up
                samples.append(time.perf_counter() - began)
                report(f"prefill batch {load.batch} of {load.prompt}: {repeat}/{load.repeat}")
    settings = load.row(loaded.name, spec.weight_mode, spec.kv_dtype) | {"chunk": chunk}
    workload = workload_of(loaded.model, PAGE_SIZE)
    return settings | figures(samples, load, workload, machine.peaks)


def figures(samples_s: Sequence[float], load: Load, workload: Workload, peaks: Peaks) -> Row:
    """The measured part of a row; ``samples_s`` are seconds for all prompts."""
    took_s = median(samples_s)
    phases = [workload.prefill(load.batch, load.prompt)]
    return {
        "tokens_per_s": load.batch * load.prompt / took_s,
        "ops_per_token": round(workload.prefill_ops_per_token(load.prompt)),
        **limit_ratios(phases, peaks, took_s),
    }

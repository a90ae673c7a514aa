"""Prefill: prompt tokens per second until the first token of every prompt of the batch.

Chunks are those of the services. The first token's own work (LM head, sampling) is in the time but
not in the operations counted.
"""

from __future__ import annotations

import time
from statistics import median

from bench.limits import Workload, workload_of
from bench.load import PAGE_SIZE, Load, Report, Row
from bench.machine import Machine
from engine.local import AsyncLocalEngine
from engine.model.load import LoadedModel


async def bench_prefill(loaded: LoadedModel, load: Load, machine: Machine, report: Report) -> Row:
    """One row: the median over the repeats. ``load.tokens`` is 1."""
    spec = loaded.model.spec
    samples = []
    async with AsyncLocalEngine(
        loaded, pool_tokens=load.pool_tokens, page_size=PAGE_SIZE
    ) as engine:
        for repeat in range(load.repeat + 1):
            prompts = load.prompts(spec.vocab_size, repeat)
            began = time.perf_counter()
            await engine.generate(prompts, load.params)
            if repeat:  # the first one warms up
                samples.append(time.perf_counter() - began)
                report(f"prefill batch {load.batch}: {repeat}/{load.repeat}")
    settings = load.row(loaded.name, spec.weight_mode, spec.kv_dtype)
    return settings | figures(samples, load, workload_of(loaded.model, PAGE_SIZE), machine)


def figures(samples_s: list[float], load: Load, workload: Workload, machine: Machine) -> Row:
    """The measured part of a row; ``samples_s`` are seconds for all prompts."""
    tokens_per_s = load.batch * load.prompt / median(samples_s)
    ops_per_token = workload.prefill_ops_per_token(load.prompt)
    return {
        "tokens_per_s": tokens_per_s,
        "ops_per_token": round(ops_per_token),
        "limit_ratio": tokens_per_s * ops_per_token / (machine.fp32_gflops * 1e9),
    }

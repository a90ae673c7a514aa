"""Decode: tokens per second of a batch that decodes together, through the whole engine.

The clock runs from the moment the last sequence has its first token until the first sequence has
its last one, so every step in between decodes the whole batch; scheduling, sampling and streaming
count, prefill does not.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import fmean, median

from bench.limits import Workload, allowed_s, workload_of
from bench.load import PAGE_SIZE, Load, Report, Row
from bench.machine import Machine
from engine.completion import Delta
from engine.errors import InvalidRequest
from engine.local import AsyncLocalEngine
from engine.model.load import LoadedModel
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits


@dataclass(frozen=True, slots=True)
class Steady:
    """Steps of the whole batch: seconds each, and the keys a sequence attended to on average."""

    step_s: float
    context: float


async def bench_decode(loaded: LoadedModel, load: Load, machine: Machine, report: Report) -> Row:
    """One row: the median over the repeats."""
    spec = loaded.model.spec
    limits = SchedulerLimits(
        max_sequences=load.batch,
        max_step_tokens=load.batch * load.prompt,  # all prompts in one step: all decode together
        chunk_tokens=load.prompt,
    )
    engine = AsyncLocalEngine(
        loaded, pool_tokens=load.pool_tokens, page_size=PAGE_SIZE, limits=limits
    )
    samples = []
    async with engine:
        for repeat in range(load.repeat + 1):
            prompts = load.prompts(spec.vocab_size, repeat)
            sample = steady(await _arrivals(engine, prompts, load.params), load.prompt)
            if repeat:  # the first one warms up
                samples.append(sample)
                report(f"decode batch {load.batch}: {repeat}/{load.repeat}")
    settings = load.row(loaded.name, spec.weight_mode, spec.kv_dtype)
    return settings | figures(samples, load.batch, workload_of(loaded.model, PAGE_SIZE), machine)


def steady(arrivals: list[list[float]], prompt: int) -> Steady:
    """``arrivals``: for each sequence, when each of its tokens came. Raises InvalidRequest.

    The sequence that began last gets a token from every step of the window: it counts them.
    """
    latest = max(arrivals, key=lambda times: times[0])
    end = min(times[-1] for times in arrivals)
    num_steps = min(range(len(latest)), key=lambda index: abs(latest[index] - end))
    if num_steps == 0:
        raise InvalidRequest("--tokens", "no step decoded the whole batch", "more tokens")
    return Steady(
        step_s=(latest[num_steps] - latest[0]) / num_steps,
        context=prompt + (num_steps + 1) / 2,
    )


def figures(samples: list[Steady], batch: int, workload: Workload, machine: Machine) -> Row:
    """The measured part of a row."""
    step_s = median(sample.step_s for sample in samples)
    phases = workload.decode_step(batch, fmean(sample.context for sample in samples))
    return {
        "tokens_per_s": batch / step_s,
        "step_s": step_s,
        "bytes_per_step": round(sum(phase.num_bytes for phase in phases)),
        "limit_ratio": allowed_s(phases, machine) / step_s,
    }


async def _arrivals(
    engine: AsyncLocalEngine, prompts: list[list[int]], params: SamplingParams
) -> list[list[float]]:
    async def times_of(prompt: list[int]) -> list[float]:
        items = engine.items(prompt, params)
        return [time.perf_counter() async for item in items if isinstance(item, Delta)]

    return await asyncio.gather(*(times_of(prompt) for prompt in prompts))

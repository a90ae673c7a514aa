"""Steal: a busy process takes one of the engine's cores in the middle of a decode run.

The engine should slow down to what the other cores can do and no further; ``one_core_fewer`` is
what it does with one thread less and all cores free.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from time import perf_counter

from bench.decode import engine_for
from bench.load import Load, Report, Row
from bench.machine import Machine
from bench.options import add_batch, add_modes, counts, open_models, positive
from bench.timed_model import Call, TimedModel
from engine.client import AsyncClient
from engine.completion import Delta
from engine.errors import InvalidRequest
from engine.model.load import LoadedModel
from kernels import threads

BUSY = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    add_batch(parser)
    parser.add_argument("--prompt", type=counts, default=(128,), metavar="128", help="tokens")
    parser.add_argument("--seconds", type=positive, default=1.0, help="of each part (default 1)")


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise InvalidRequest("--cores", "there is one core only", "2 or more")
    rows = []
    for loaded in open_models(options):
        spec = loaded.model.spec
        for batch in options.batch:
            for prompt in options.prompt:
                load = Load(batch, prompt, spec.max_context - prompt - 1, repeat=1)
                report(f"steal core {cores[-1]} of {cores}")
                rates = asyncio.run(bench_steal(loaded, load, cores[-1], options.seconds))
                settings = load.row(loaded.name, spec.weight_mode, spec.kv_dtype)
                rows.append(settings | {"seconds": options.seconds} | rates)
    return rows


async def bench_steal(loaded: LoadedModel, load: Load, core: int, seconds: float) -> Row:
    """Tokens per second in each part of one decode run, ``seconds`` each. Raises InvalidRequest."""
    model = TimedModel(loaded.model)
    prompts = load.prompts(loaded.model.spec.vocab_size, repeat=0)
    async with engine_for(replace(loaded, model=model), load) as engine:
        async with _decoding(engine, load, prompts) as tasks:
            before = await _rate(model, load.batch, seconds)
            with busy(core):
                during = await _rate(model, load.batch, seconds)
            after = await _rate(model, load.batch, seconds)
            with one_thread_fewer():
                fewer = await _rate(model, load.batch, seconds)
            if any(task.done() for task in tasks):
                raise InvalidRequest("--seconds", "the sequences ended before", "fewer seconds")
    return {
        "before_tokens_per_s": before,
        "during_tokens_per_s": during,
        "after_tokens_per_s": after,
        "one_core_fewer_tokens_per_s": fewer,
        "during_to_one_core_fewer": during / fewer,
    }


def tokens_per_s(calls: Sequence[Call], batch: int, began: float, ended: float) -> float:
    """Of the decode steps that ended between two moments."""
    steps = sum(call.decodes(batch) and began <= call.ended < ended for call in calls)
    return batch * steps / (ended - began)


async def _rate(model: TimedModel, batch: int, seconds: float) -> float:
    began = perf_counter()
    await asyncio.sleep(seconds)
    return tokens_per_s(model.calls, batch, began, perf_counter())


@asynccontextmanager
async def _decoding(
    engine: AsyncClient, load: Load, prompts: list[list[int]]
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """All sequences decode inside the block; they are cancelled after it."""
    loop = asyncio.get_running_loop()
    begun = [loop.create_future() for _ in prompts]

    async def drain(prompt: list[int], first: asyncio.Future[None]) -> None:
        try:
            async for item in engine.items(prompt, load.params):
                if isinstance(item, Delta) and not first.done():
                    first.set_result(None)
        finally:
            first.cancel()

    tasks = [asyncio.create_task(drain(*each)) for each in zip(prompts, begun, strict=True)]
    try:
        await asyncio.gather(*begun)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@contextmanager
def busy(core: int) -> Iterator[None]:
    """Another process computes on ``core`` without a pause."""
    process = subprocess.Popen([sys.executable, "-c", BUSY % core], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()
            process.wait()


@contextmanager
def one_thread_fewer() -> Iterator[None]:
    count = threads.configured_threads()
    threads.set_num_threads(max(1, count - 1))
    try:
        yield
    finally:
        threads.set_num_threads(count)

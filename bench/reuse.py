"""Reuse: a prompt's pages read from another worker's cache, beside computing them.

A decode service computes each prompt and keeps its pages; once the page index knows them, another
one reads them. Both are processes of this host. The read is leasing, copying and verifying; a plain
copy of the same bytes is the limit it is compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.load import PAGE_SIZE, Load, Report, Row
from bench.machine import Machine, copy_s
from bench.options import add_modes, counts, loads, modes
from engine.completion import Finished
from engine.errors import PeerUnavailable
from engine.lifecycle import Lifecycle
from engine.remote import AsyncRemoteEngine
from engine.supervisor import ServicePlan, Supervisor
from engine.telemetry.trace_tree import SpanRecord, read_spans
from kvstore.index.redis import RedisPageIndex
from kvstore.prefix_hash import PrefixHasher

DRAIN_S = 5.0
PATIENCE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    parser.add_argument(
        "--prompt", type=counts, default=(1000,), metavar="100,1000", help="tokens (default 1000)"
    )
    parser.set_defaults(batch=(1,), tokens=1)


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    return [
        bench_reuse(options.model, weights, kv, load, report)
        for weights, kv in modes(options)
        for load in loads(options)
    ]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds to the first token, of the same prompts computed and then read."""

    kv_dtype: str
    computed: list[float]
    read: list[float]


def bench_reuse(model: str, weights: str, kv: str | None, load: Load, report: Report) -> Row:
    """One row: medians over the repeats. Call it from the main thread: services end with it."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        spans = Path(folder) / "spans.jsonl"

        def plans(redis_url: str) -> list[ServicePlan]:
            flags = (
                f"--redis={redis_url}",
                f"--trace-file={spans}",
                f"--model={model}",
                f"--weights={weights}",
                f"--kv={kv or 'auto'}",
                f"--page-size={PAGE_SIZE}",
                f"--pool-tokens={(load.repeat + 2) * load.pool_tokens}",
            )
            ways = ("local", "pull")
            return [
                ServicePlan("decode", "decode_svc", (*flags, f"--prefill={way}")) for way in ways
            ]

        supervisor = Supervisor(Path(folder), plans, redis_url="", drain_s=DRAIN_S)
        try:
            report("reuse: starting two services")
            supervisor.start(lambda: False)
            times = asyncio.run(
                _ask(supervisor.state.redis, supervisor.state.endpoints("decode"), load, report)
            )
        finally:
            supervisor.stop()
        reads = [span for span in read_spans(spans) if span.name == Lifecycle.PULL]
    row = load.row(model, weights, times.kv_dtype)
    return row | figures(times, reads[-load.repeat :], load.prompt)


def figures(times: Times, reads: Sequence[SpanRecord], prompt: int) -> Row:
    """The measured part of a row; ``reads`` are the spans of the pulls."""
    (num_bytes,) = {int(span.attributes["quire.bytes"]) for span in reads}
    read = median(span.duration_ns for span in reads) / 1e9
    first_read, first_computed = median(times.read), median(times.computed)
    copied = copy_s(num_bytes)
    return {
        "tokens_per_s": prompt / first_read,
        "bytes": num_bytes,
        "read_ms": read * 1e3,
        "memcpy_ms": copied * 1e3,
        "gbps": num_bytes / read / 1e9,
        "limit_ratio": copied / read,
        "first_token_read_s": first_read,
        "first_token_computed_s": first_computed,
    }


async def _ask(redis_url: str, endpoints: Sequence[str], load: Load, report: Report) -> Times:
    owner, reader = (AsyncRemoteEngine([endpoint]) for endpoint in endpoints)
    index = RedisPageIndex(redis_url)
    async with owner, reader:
        try:
            fingerprint = (await owner.model()).fingerprint
            times = Times(fingerprint.kv_dtype, [], [])
            for repeat in range(-1, load.repeat):  # the first one warms up
                vocab_size = (await owner.model()).vocab_size
                (prompt,) = load.prompts(vocab_size, repeat)
                times.computed.append(await _first_token_s(owner, prompt, load, "local"))
                await _published(index, fingerprint.digest, prompt)
                times.read.append(await _first_token_s(reader, prompt, load, "remote"))
                report(f"reuse of {load.prompt} tokens: {repeat + 1}/{load.repeat}")
        finally:
            await index.close()
    return Times(times.kv_dtype, times.computed[1:], times.read[1:])


async def _published(index: RedisPageIndex, fingerprint: bytes, prompt: Sequence[int]) -> None:
    """Waits until the index knows who holds the prompt's pages: holders tell it every 2 s."""
    names = PrefixHasher("", fingerprint, PAGE_SIZE).full_pages(prompt[: len(prompt) - 1])
    give_up = time.monotonic() + PATIENCE_S
    while len(await index.lookup(fingerprint.hex(), names)) < len(names):
        if time.monotonic() > give_up:
            raise PeerUnavailable(f"no worker tells in {PATIENCE_S} s that it holds the prompt")
        await asyncio.sleep(0.05)


async def _first_token_s(
    engine: AsyncRemoteEngine, prompt: list[int], load: Load, expected: str
) -> float:
    """Raises PeerUnavailable if the prompt's pages did not come as they should have."""
    items = [item async for item in engine.items(prompt, load.params)]
    finished = items[-1]
    assert isinstance(finished, Finished)
    if finished.prefilled != expected:
        raise PeerUnavailable(f"the prompt was prefilled {finished.prefilled}, not {expected}")
    return finished.timings.first_token_s

"""Serve: streams through `quire up`'s services, beside the engine alone on the same cores.

All streams begin at once, with prompts nobody has seen; tokens per second are output tokens over
the time until the last one, so prefill, handover, gRPC and the client itself count. ``start_s`` is
from starting `quire up` to the first token that comes out of it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from bench.limits import Workload, bytes_of, limit_ratio, workload_of
from bench.load import PAGE_SIZE, Load, Report, Row
from bench.machine import Machine
from bench.options import add_modes, count, counts, loads, modes
from engine.client import AsyncClient
from engine.completion import Delta, Finished
from engine.errors import PeerUnavailable
from engine.local import AsyncLocalEngine
from engine.model.load import load_model
from engine.remote import AsyncRemoteEngine
from engine.state import read_up_state
from kernels.peaks import Peaks

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
MEET_PEER_S = 5.0
POLL_S = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    parser.add_argument(
        "--streams", dest="batch", type=counts, default=(32,), metavar="8,32", help="default 32"
    )
    parser.add_argument(
        "--prompt", type=counts, default=(128,), metavar="128,512", help="tokens (default 128)"
    )
    parser.add_argument("--tokens", type=count, default=64, help="generated in each stream")


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    return [
        bench_serve(options.model, weights, kv, load, machine.peaks, report)
        for weights, kv in modes(options)
        for load in loads(options)
    ]


@dataclass(frozen=True, slots=True)
class Stream:
    """When messages with tokens came, from the moment the request was sent."""

    arrivals_s: list[float]
    num_tokens: int
    prefilled: str


@dataclass(frozen=True, slots=True)
class Wave:
    """Streams that began together, and the seconds until the last one ended."""

    streams: list[Stream]
    took_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(stream.num_tokens for stream in self.streams) / self.took_s


def bench_serve(
    model: str, weights: str, kv: str | None, load: Load, peaks: Peaks, report: Report
) -> Row:
    """One row: medians over the repeats, percentiles over all their streams."""
    flags = [f"--model={model}", f"--weights={weights}", f"--kv={kv or 'auto'}"]
    flags += [f"--page-size={PAGE_SIZE}", f"--pool-tokens={load.pool_tokens}"]
    report("serve: starting the services")
    with running_up(flags) as up:
        start_s, served = asyncio.run(_through_services(up, load, report))
    loaded = load_model(model, weights=weights, kv=kv)

    async def alone() -> list[Wave]:
        engine = AsyncLocalEngine(loaded, pool_tokens=load.pool_tokens, page_size=PAGE_SIZE)
        async with engine:
            report("serve: the engine alone")
            return await waves(engine, load, loaded.model.spec.vocab_size, report)

    spec = loaded.model.spec
    row = load.row(model, spec.weight_mode, spec.kv_dtype)
    row |= figures(served, asyncio.run(alone())) | {"start_s": start_s}
    workload = workload_of(loaded.model, PAGE_SIZE)
    return row | share_of_limit(row["tokens_per_s"], load, workload, peaks)


def figures(served: Sequence[Wave], alone: Sequence[Wave]) -> Row:
    """What was measured through the services, and beside it the engine alone."""
    streams = [stream for wave in served for stream in wave.streams]
    first = [stream.arrivals_s[0] for stream in streams]
    between = [gap for stream in streams for gap in gaps(stream.arrivals_s)]
    tokens_per_s = median(wave.tokens_per_s for wave in served)
    alone_per_s = median(wave.tokens_per_s for wave in alone)
    return {
        "tokens_per_s": tokens_per_s,
        "alone_tokens_per_s": alone_per_s,
        "ratio_to_alone": tokens_per_s / alone_per_s,
        "remote_share": sum(stream.prefilled == "remote" for stream in streams) / len(streams),
        **percentiles("ttft", first),
        **percentiles("itl", between),
    }


def share_of_limit(tokens_per_s: float, load: Load, workload: Workload, peaks: Peaks) -> Row:
    """All prompts prefilled, then every step decoding all streams, is what would be allowed."""
    step = workload.decode_step(load.batch, load.prompt + load.tokens / 2)
    phases = [workload.prefill(load.batch, load.prompt), *step * load.tokens]
    took_s = load.batch * load.tokens / tokens_per_s
    return {"bytes_per_step": bytes_of(step), "limit_ratio": limit_ratio(phases, peaks, took_s)}


def gaps(arrivals_s: Sequence[float]) -> list[float]:
    """Seconds between one message and the next; one may carry several tokens."""
    return [after - before for before, after in itertools.pairwise(arrivals_s)]


def percentiles(name: str, seconds: Sequence[float]) -> Row:
    """The 50th, 90th and 99th, interpolated; of two or more values."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {f"{name}_p{each}_s": cuts[each - 1] for each in (50, 90, 99)}


@dataclass(frozen=True, slots=True)
class Up:
    process: subprocess.Popen[bytes]
    folder: Path
    began: float

    def decode_endpoints(self) -> list[str]:
        """Waits until the services are ready. Raises PeerUnavailable."""
        give_up = self.began + START_TIMEOUT_S
        while (state := read_up_state(self.folder)) is None:
            if self.process.poll() is not None or time.perf_counter() > give_up:
                raise PeerUnavailable(f"`quire up` did not start:\n{self._output()}")
            time.sleep(POLL_S)
        return state.endpoints("decode")

    def _output(self) -> str:
        return (self.folder / "up.out").read_text(errors="replace")


@contextmanager
def running_up(flags: Sequence[str]) -> Iterator[Up]:
    """`quire up` with a state folder of its own, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as name:
        folder = Path(name)
        with (folder / "up.out").open("wb") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "engine.cli.main", "up", *flags],
                env=os.environ | {"QUIRE_STATE_DIR": name},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Up(process, folder, began)
        finally:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


async def _through_services(up: Up, load: Load, report: Report) -> tuple[float, list[Wave]]:
    """Seconds to the first token, and the waves after a first one that warms up."""
    async with AsyncRemoteEngine(up.decode_endpoints()) as engine:
        items = engine.items([0], load.params)
        async for item in items:
            if isinstance(item, Delta):
                break
        start_s = time.perf_counter() - up.began
        await items.aclose()
        vocab_size = (await engine.model()).vocab_size
        await _meet_peer(engine, load, vocab_size)
        return start_s, await waves(engine, load, vocab_size, report)


async def _meet_peer(engine: AsyncClient, load: Load, vocab_size: int) -> None:
    """Ends once the prefill service takes a prompt, or seems not to be wanted for such ones."""
    give_up = time.perf_counter() + MEET_PEER_S
    attempts = itertools.count(-1, -1)
    while time.perf_counter() < give_up:
        prompts = load.prompts(vocab_size, next(attempts))[:1]
        if (await _wave(engine, load, prompts)).streams[0].prefilled == "remote":
            return


async def waves(engine: AsyncClient, load: Load, vocab_size: int, report: Report) -> list[Wave]:
    """One for each repeat, after one that warms up."""
    found = []
    for repeat in range(load.repeat + 1):
        found.append(await _wave(engine, load, load.prompts(vocab_size, repeat)))
        report(f"serve {load.batch} streams: {repeat}/{load.repeat}")
    return found[1:]


async def _wave(engine: AsyncClient, load: Load, prompts: list[list[int]]) -> Wave:
    began = time.perf_counter()

    async def stream(prompt: list[int]) -> Stream:
        arrivals, num_tokens, prefilled = [], 0, ""
        async for item in engine.items(prompt, load.params):
            if isinstance(item, Delta) and item.token_ids:
                arrivals.append(time.perf_counter() - began)
                num_tokens += len(item.token_ids)
            if isinstance(item, Finished):
                prefilled = item.prefilled
        return Stream(arrivals, num_tokens, prefilled)

    streams = await asyncio.gather(*(stream(prompt) for prompt in prompts))
    return Wave(list(streams), time.perf_counter() - began)

"""Handover: what it costs that a prompt is prefilled in another process on this host.

A prefill service and two decode services run as their own processes; each prompt goes to the one
that fetches its pages and to the one that computes them itself. Exposed is the time between the end
of the prompt's last chunk in the prefill service and the moment all its pages are verified in the
decode service: what the requester waits for beyond the prefill itself. A plain copy of the same
bytes is the limit it is compared with.
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
from engine.completion import Finished, Started
from engine.errors import PeerUnavailable
from engine.lifecycle import Lifecycle
from engine.remote import AsyncRemoteEngine
from engine.supervisor import ServicePlan, Supervisor
from engine.telemetry.attributes import GEN_AI_RESPONSE_ID
from engine.telemetry.trace_tree import SpanRecord, one_trace, read_spans

DRAIN_S = 5.0
CONNECT_TIMEOUT_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    parser.add_argument(
        "--prompt", type=counts, default=(1000,), metavar="100,1000", help="tokens (default 1000)"
    )
    parser.set_defaults(batch=(1,), tokens=1)


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    return [
        bench_handover(Services(options.model, weights, kv), load, report)
        for weights, kv in modes(options)
        for load in loads(options)
    ]


@dataclass(frozen=True, slots=True)
class Services:
    """What the services run."""

    model: str
    weights: str
    kv: str | None

    def plans(self, redis_url: str, spans: Path, pool_tokens: int) -> list[ServicePlan]:
        """One prefill service, a decode service that uses it, and one that does not."""
        flags = (
            f"--redis={redis_url}",
            f"--trace-file={spans}",
            f"--model={self.model}",
            f"--weights={self.weights}",
            f"--kv={self.kv or 'auto'}",
            f"--page-size={PAGE_SIZE}",
            f"--pool-tokens={pool_tokens}",
        )
        return [
            ServicePlan("prefill", "prefill_svc", flags),
            ServicePlan("decode", "decode_svc", flags),
            ServicePlan("decode", "decode_svc", (*flags, "--prefill=local")),
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    request_id: str
    finished: Finished


@dataclass(frozen=True, slots=True)
class Answers:
    """The same prompts both ways, and the dtype of their pages."""

    kv_dtype: str
    remote: list[Answer]
    local: list[Answer]


def bench_handover(services: Services, load: Load, report: Report) -> Row:
    """One row: medians over the repeats. Call it from the main thread: services end with it."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        spans = Path(folder) / "spans.jsonl"
        supervisor = Supervisor(
            Path(folder),
            lambda redis_url: services.plans(redis_url, spans, 2 * load.pool_tokens),
            redis_url="",
            drain_s=DRAIN_S,
        )
        try:
            report("handover: starting three services")
            supervisor.start(lambda: False)
            answers = asyncio.run(_ask(supervisor.state.endpoints("decode"), load, report))
        finally:
            supervisor.stop()
        traces = [_trace_of(read_spans(spans), answer.request_id) for answer in answers.remote]
    return load.row(services.model, services.weights, answers.kv_dtype) | figures(
        answers, traces, load.prompt
    )


def figures(answers: Answers, traces: Sequence[Sequence[SpanRecord]], prompt: int) -> Row:
    """The measured part of a row; ``traces`` are those of the remote answers."""
    (num_bytes,) = {handover_bytes(trace) for trace in traces}
    exposed = median(exposed_s(trace) for trace in traces)
    remote = median(answer.finished.timings.first_token_s for answer in answers.remote)
    local = median(answer.finished.timings.first_token_s for answer in answers.local)
    copied = copy_s(num_bytes)
    return {
        "tokens_per_s": prompt / remote,
        "handover_bytes": num_bytes,
        "exposed_s": exposed,
        "copy_s": copied,
        "limit_ratio": copied / exposed,
        "first_token_remote_s": remote,
        "first_token_local_s": local,
    }


def exposed_s(trace: Sequence[SpanRecord]) -> float:
    """Seconds of a handover that the prefill did not cover. One host: one clock."""
    computed = max(span.end_ns for span in trace if _is_remote_chunk(span))
    return (_handover(trace).end_ns - computed) / 1e9


def handover_bytes(trace: Sequence[SpanRecord]) -> int:
    return int(_handover(trace).attributes["quire.bytes"])


def _handover(trace: Sequence[SpanRecord]) -> SpanRecord:
    (span,) = [span for span in trace if span.name == Lifecycle.HANDOVER]
    return span


def _is_remote_chunk(span: SpanRecord) -> bool:
    return span.name == Lifecycle.PREFILL_CHUNK and span.service == "quire-prefill"


def _trace_of(spans: Sequence[SpanRecord], request_id: str) -> list[SpanRecord]:
    (trace_id,) = {
        span.trace_id for span in spans if span.attributes.get(GEN_AI_RESPONSE_ID) == request_id
    }
    return one_trace(spans, trace_id)


async def _ask(endpoints: Sequence[str], load: Load, report: Report) -> Answers:
    remote, local = (AsyncRemoteEngine([endpoint]) for endpoint in endpoints)
    async with remote, local:
        model = await remote.model()
        await _warm_up(remote, local, load, model.vocab_size)
        answers = Answers(model.fingerprint.kv_dtype, [], [])
        for repeat in range(load.repeat):
            (prompt,) = load.prompts(model.vocab_size, repeat)
            answers.remote.append(await _answer(remote, prompt, load, "remote"))
            answers.local.append(await _answer(local, prompt, load, "local"))
            report(f"handover: {repeat + 1}/{load.repeat}")
    return answers


async def _warm_up(
    remote: AsyncRemoteEngine, local: AsyncRemoteEngine, load: Load, vocab_size: int
) -> None:
    """Ends once a prompt has gone each way; the decode service has to hear of its peer first."""
    give_up = time.monotonic() + CONNECT_TIMEOUT_S
    attempt = -1
    await _answer(local, load.prompts(vocab_size, attempt)[0], load, "local")
    while True:
        try:
            await _answer(remote, load.prompts(vocab_size, attempt)[0], load, "remote")
            return
        except PeerUnavailable:
            if time.monotonic() > give_up:
                raise
            attempt -= 1


async def _answer(
    engine: AsyncRemoteEngine, prompt: list[int], load: Load, expected: str
) -> Answer:
    """Raises PeerUnavailable if the prompt was not prefilled where it should have been."""
    items = [item async for item in engine.items(prompt, load.params)]
    started, finished = items[0], items[-1]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    if finished.prefilled != expected:
        raise PeerUnavailable(f"the prompt was prefilled {finished.prefilled}, not {expected}")
    return Answer(started.request_id.hex(), finished)

"""Handover: what it costs that a prompt is prefilled in another process on this host.

One prefill service, a decode service for each transport, and one that computes its prompts itself
run as their own processes; each prompt goes to one decode service. Exposed is the time between the
end of the prompt's last chunk in the prefill service and the moment the decode service's engine has
its sequence: what the requester waits for beyond the prefill itself. Then the same prompts are
asked for again, which the prefill service still has and the decode service has not: the rate at
which pages move by themselves. A plain copy of the same bytes is the limit for both.
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
from bench.options import add_modes, counts, loads, modes, names
from engine.completion import Finished, Started
from engine.errors import InvalidRequest, PeerUnavailable
from engine.lifecycle import Lifecycle
from engine.remote import AsyncRemoteEngine
from engine.supervisor import ServicePlan, Supervisor
from engine.telemetry.attributes import GEN_AI_RESPONSE_ID
from engine.telemetry.trace_tree import SpanRecord, one_trace, read_spans
from kvstore.transports.choice import NAMES, problem_of

DRAIN_S = 5.0
CONNECT_TIMEOUT_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_modes(parser)
    parser.add_argument(
        "--prompt", type=counts, default=(1000,), metavar="100,1000", help="tokens (default 1000)"
    )
    parser.add_argument(
        "--transports",
        type=names,
        default=("shm", "grpc"),
        metavar="shm,grpc",
        help="a row for each (default shm,grpc)",
    )
    parser.set_defaults(batch=(1,), tokens=1)


def run(options: argparse.Namespace, machine: Machine, report: Report) -> list[Row]:
    return [
        row
        for weights, kv in modes(options)
        for load in loads(options)
        for row in bench_handover(
            Services(options.model, weights, kv, _transports(options)), load, report
        )
    ]


def _transports(options: argparse.Namespace) -> tuple[str, ...]:
    """Raises InvalidRequest for one that cannot be had here."""
    for name in options.transports:
        problem = problem_of(name) if name in NAMES else "nobody knows it"
        if problem is not None:
            raise InvalidRequest("--transports", f"{name}: {problem}", ", ".join(NAMES))
    return tuple(options.transports)


@dataclass(frozen=True, slots=True)
class Services:
    """What the services run."""

    model: str
    weights: str
    kv: str | None
    transports: tuple[str, ...]

    def plans(self, redis_url: str, spans: Path, load: Load) -> list[ServicePlan]:
        """One prefill service that keeps all prompts, a decode service for each transport that has
        room for one or two, and one that computes them."""
        flags = (
            f"--redis={redis_url}",
            f"--trace-file={spans}",
            f"--model={self.model}",
            f"--weights={self.weights}",
            f"--kv={self.kv or 'auto'}",
            f"--page-size={PAGE_SIZE}",
        )
        kept = len(self.transports) * (load.repeat + 2) + 1
        prefill = (
            f"--pool-tokens={kept * load.pool_tokens}",
            f"--transports={','.join(self.transports)}",
        )
        room = f"--pool-tokens={load.pool_tokens}"
        return [
            ServicePlan("prefill", "prefill_svc", (*flags, *prefill)),
            *(
                ServicePlan(
                    "decode",
                    "decode_svc",
                    (*flags, room, f"--transports={name}", "--prefill=remote"),
                )
                for name in self.transports
            ),
            ServicePlan("decode", "decode_svc", (*flags, room, "--prefill=local")),
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    request_id: str
    finished: Finished


@dataclass(frozen=True, slots=True)
class Answers:
    """The same number of prompts each way: computed elsewhere, fetched again, computed here."""

    kv_dtype: str
    remote: list[Answer]
    again: list[Answer]
    local: list[Answer]


def bench_handover(services: Services, load: Load, report: Report) -> list[Row]:
    """A row for each transport: medians over the repeats. Call it from the main thread: services
    end with it."""
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder:
        spans = Path(folder) / "spans.jsonl"
        supervisor = Supervisor(
            Path(folder),
            lambda redis_url: services.plans(redis_url, spans, load),
            redis_url="",
            drain_s=DRAIN_S,
        )
        try:
            report(f"handover: starting {len(services.transports) + 2} services")
            supervisor.start(lambda: False)
            *remote, local = supervisor.state.endpoints("decode")
            found = asyncio.run(_ask(services.transports, remote, local, load, report))
        finally:
            supervisor.stop()
        told = read_spans(spans)
    return [
        load.row(services.model, services.weights, answers.kv_dtype)
        | {"transport": transport}
        | figures(answers, *_traces(told, answers), load.prompt)
        for transport, answers in found.items()
    ]


Trace = Sequence[SpanRecord]


def figures(answers: Answers, remote: Sequence[Trace], again: Sequence[Trace], prompt: int) -> Row:
    """The measured part of a row; the traces are those of the answers."""
    (num_bytes,) = {handover_bytes(trace) for trace in (*remote, *again)}
    exposed = median(exposed_s(trace) for trace in remote)
    moved = median(_handover(trace).duration_ns for trace in again) / 1e9
    first_remote = median(answer.finished.timings.first_token_s for answer in answers.remote)
    first_local = median(answer.finished.timings.first_token_s for answer in answers.local)
    copied = copy_s(num_bytes)
    return {
        "tokens_per_s": prompt / first_remote,
        "bytes": num_bytes,
        "exposed_ms": exposed * 1e3,
        "memcpy_ms": copied * 1e3,
        "gbps": num_bytes / moved / 1e9,
        "limit_ratio": copied / exposed,
        "first_token_remote_s": first_remote,
        "first_token_local_s": first_local,
    }


def exposed_s(trace: Trace) -> float:
    """Seconds of a handover that the prefill did not cover. One host: one clock."""
    computed = max(span.end_ns for span in trace if _is_remote_chunk(span))
    (joined,) = [span.end_ns for span in trace if span.name == Lifecycle.EXPOSED]
    return (joined - computed) / 1e9


def handover_bytes(trace: Trace) -> int:
    return int(_handover(trace).attributes["quire.bytes"])


def _handover(trace: Trace) -> SpanRecord:
    (span,) = [span for span in trace if span.name == Lifecycle.HANDOVER]
    return span


def _is_remote_chunk(span: SpanRecord) -> bool:
    return span.name == Lifecycle.PREFILL_CHUNK and span.service == "quire-prefill"


def _traces(spans: Trace, answers: Answers) -> tuple[list[Trace], list[Trace]]:
    """Of the remote answers and of those fetched again."""
    return (
        [_trace_of(spans, answer.request_id) for answer in answers.remote],
        [_trace_of(spans, answer.request_id) for answer in answers.again],
    )


def _trace_of(spans: Trace, request_id: str) -> Trace:
    (trace_id,) = {
        span.trace_id for span in spans if span.attributes.get(GEN_AI_RESPONSE_ID) == request_id
    }
    return one_trace(spans, trace_id)


async def _ask(
    transports: Sequence[str],
    remotes: Sequence[str],
    local_endpoint: str,
    load: Load,
    report: Report,
) -> dict[str, Answers]:
    found: dict[str, Answers] = {}
    async with AsyncRemoteEngine([local_endpoint]) as local:
        for number, (transport, endpoint) in enumerate(zip(transports, remotes, strict=True)):
            async with AsyncRemoteEngine([endpoint]) as remote:
                ask = _Questions(remote, local, load, number * (load.repeat + 2))
                found[transport] = await ask.answers(transport, report)
    return found


class _Questions:
    """Prompts for one decode service and for the one that computes them itself."""

    def __init__(
        self, remote: AsyncRemoteEngine, local: AsyncRemoteEngine, load: Load, first: int
    ) -> None:
        self._remote = remote
        self._local = local
        self._load = load
        self._first = first
        self._vocab_size = 0

    async def answers(self, name: str, report: Report) -> Answers:
        model = await self._remote.model()
        self._vocab_size = model.vocab_size
        await self._warm_up()
        answers = Answers(model.fingerprint.kv_dtype, [], [], [])
        for repeat in range(self._load.repeat):
            answers.remote.append(await self._answer(self._remote, repeat, "remote"))
            answers.local.append(await self._answer(self._local, repeat, "local"))
            report(f"handover by {name}: {repeat + 1}/{self._load.repeat}")
        await self._answer(self._remote, self._load.repeat, "remote")  # drives out the first one
        for repeat in range(self._load.repeat):
            answers.again.append(await self._answer(self._remote, repeat, "remote"))
        return answers

    async def _warm_up(self) -> None:
        """Ends once a prompt has gone each way; the decode service has to hear of its peer first.

        Its prompts are none of the measured ones."""
        give_up = time.monotonic() + CONNECT_TIMEOUT_S
        attempt = -1 - self._first
        await self._answer(self._local, attempt - self._first, "local")
        while True:
            try:
                await self._answer(self._remote, attempt - self._first, "remote")
                return
            except PeerUnavailable:
                if time.monotonic() > give_up:
                    raise
                attempt -= 1

    async def _answer(self, engine: AsyncRemoteEngine, number: int, expected: str) -> Answer:
        """Raises PeerUnavailable if the prompt was not prefilled where it should have been."""
        (prompt,) = self._load.prompts(self._vocab_size, self._first + number)
        items = [item async for item in engine.items(prompt, self._load.params)]
        started, finished = items[0], items[-1]
        assert isinstance(started, Started)
        assert isinstance(finished, Finished)
        if finished.prefilled != expected:
            raise PeerUnavailable(f"the prompt was prefilled {finished.prefilled}, not {expected}")
        return Answer(started.request_id.hex(), finished)

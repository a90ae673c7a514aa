"""``quire demo``: everything up, one answer through both services, its trace, everything down."""

from __future__ import annotations

import argparse
import asyncio
import time

from opentelemetry.trace import SpanKind

from engine.chat_template import ChatMessage
from engine.cli import up
from engine.cli.trace import trace_file
from engine.completion import Delta, Finished
from engine.remote import AsyncRemoteEngine
from engine.sampling_params import SamplingParams
from engine.telemetry.trace_tree import one_trace, read_spans, render_tree
from engine.telemetry.tracing import ended, setup_tracing, start_span

QUESTION = (
    "In two sentences: why do people put a prompt's keys and values into pages, "
    "the way an operating system puts memory into pages?"
)
BACKGROUND = (
    "You are a helpful AI assistant. You answer briefly and in plain words. A language model reads "
    "a prompt once and keeps what it computed, keys and values, in a cache, so that every further "
    "token needs only one new row of work. The cache grows with every token and with every user."
)
SPANS_TIMEOUT_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    up.add_arguments(parser)
    parser.add_argument("--question", default=QUESTION)


def run(options: argparse.Namespace) -> int:
    with up.running(options) as (supervisor, _):
        for service in supervisor.state.services:
            print(f"{service.role:<8} {service.endpoint}  pid {service.pid}")
        print(f"redis    {supervisor.state.redis}\n\n> {options.question}\n", flush=True)
        trace_id = asyncio.run(_ask(supervisor.state.endpoints("decode"), options.question))
        print(_trace(trace_id))
    print("stopped cleanly")
    return 0


async def _ask(endpoints: list[str], question: str) -> str:
    """Streams the answer to the terminal; returns its trace id."""
    end_tracing = setup_tracing("client", boot_id="", otlp_endpoint=None, trace_file=trace_file())
    messages = [ChatMessage("system", BACKGROUND), ChatMessage("user", question)]
    params = SamplingParams(temperature=0.0, max_tokens=96)
    span = start_span("chat", kind=SpanKind.CLIENT, attributes={})
    try:
        with ended(span):
            async with AsyncRemoteEngine(endpoints) as engine:
                async for item in engine.items(messages, params):
                    if isinstance(item, Delta):
                        print(item.text, end="", flush=True)
                    if isinstance(item, Finished):
                        print(f"\n\n{_summary(item)}\n")
    finally:
        end_tracing()
    return format(span.get_span_context().trace_id, "032x")


def _summary(finished: Finished) -> str:
    usage, timings = finished.usage, finished.timings
    rate = (usage.output_tokens - 1) / max(timings.total_s - timings.first_token_s, 1e-9)
    return (
        f"[prompt {usage.prompt_tokens} tokens, {usage.handed_over_tokens} of them handed over by "
        f"the prefill service ({finished.prefilled}); first token after "
        f"{timings.first_token_s:.2f} s, then {rate:.1f} tokens/s]"
    )


def _trace(trace_id: str) -> str:
    """The trace as a tree, once the services have written the request's last spans."""
    give_up = time.monotonic() + SPANS_TIMEOUT_S
    while True:
        spans = one_trace(read_spans(trace_file()), trace_id)
        done = {span.service for span in spans} >= {"client", "quire-decode", "quire-prefill"}
        if done or time.monotonic() > give_up:
            return render_tree(spans)
        time.sleep(0.05)

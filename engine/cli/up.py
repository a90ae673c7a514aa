"""``quire up``: Redis, prefill and decode services on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.cli.trace import trace_file
from engine.modes import DEFAULT_WEIGHTS, KV_MODES, WEIGHT_MODES
from engine.state import UpState, state_dir
from engine.supervisor import ServicePlan, Supervisor, only_one

_PASSED_ON = ("model", "weights", "kv", "pool_tokens", "page_size", "otlp_endpoint", "drain_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, choices=WEIGHT_MODES)
    parser.add_argument("--kv", default="auto", choices=("auto", *KV_MODES))
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill services")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode services")
    parser.add_argument("--redis", default="", metavar="URL", help="use this one, start none")
    parser.add_argument("--pool-tokens", type=int, default=16384, help="KV pool of each service")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--otlp-endpoint", default="", metavar="URL")
    parser.add_argument("--drain-s", type=float, default=30.0)


def run(options: argparse.Namespace) -> int:
    logging.basicConfig(format="%(message)s")
    with running(options) as (supervisor, stopping):
        print(_welcome(supervisor.state), flush=True)
        supervisor.keep_running(stopping)
        print("stopping: running requests may finish", flush=True)
    return 0


@contextmanager
def running(
    options: argparse.Namespace,
) -> Iterator[tuple[Supervisor, Callable[[], bool]]]:
    """Everything started and ready inside the block, stopped after it."""
    folder = state_dir()
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: stop.append(signum))

    def plans(redis_url: str) -> Sequence[ServicePlan]:
        return service_plans(options, redis_url, trace_file())

    with only_one(folder):
        trace_file().unlink(missing_ok=True)
        supervisor = Supervisor(folder, plans, options.redis, options.drain_s)
        try:
            print(f"starting: {options.model}, logs in {folder / 'logs'}", flush=True)
            supervisor.start(lambda: bool(stop))
            yield supervisor, lambda: bool(stop)
        finally:
            code = supervisor.stop()
        if code:
            raise SystemExit(code)


def service_plans(options: argparse.Namespace, redis_url: str, spans: Path) -> list[ServicePlan]:
    """The services the flags ask for."""
    flags = [f"--redis={redis_url}", f"--trace-file={spans}"]
    flags += [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in _PASSED_ON
        if getattr(options, name) != ""
    ]
    prefill = ServicePlan("prefill", "prefill_svc", tuple(flags))
    decode = ServicePlan("decode", "decode_svc", tuple(flags))
    return [prefill] * options.prefill + [decode] * options.decode


def _welcome(state: UpState) -> str:
    lines = [f"redis    {state.redis}"]
    lines += [f"{each.role:<8} {each.endpoint}  pid {each.pid}" for each in state.services]
    for endpoint in state.endpoints("decode")[:1]:
        lines += [
            "",
            "try:  quire generate --prompt 'The capital of France is' --max-tokens 8",
            "or:   buf curl --protocol grpc --http2-prior-knowledge \\",
            """        -d '{"text": "The capital of France is", "sampling": """
            """{"temperature": 0, "maxTokens": 8}}' \\""",
            f"        http://{endpoint}/quire.v1.InferenceService/Generate",
            "Ctrl-C stops everything.",
        ]
    return "\n".join(lines)

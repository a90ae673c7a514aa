"""Killed, frozen and restarted workers under load: no request is lost and no token changes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from engine.completion import Completion, Delta, Finished, StreamItem
from engine.local import AsyncLocalEngine
from engine.remote import AsyncRemoteEngine, RemoteEngine
from engine.sampling_params import SamplingParams
from engine.serving.server import parse_ready_line
from quire.v1 import admin_pb2, admin_pb2_grpc
from tests.e2e.conftest import PATIENCE_S, QUIRE, Up, start_up, wait_until
from tests.integration.streams import KINDS, PROMPT, collected, essence

PATIENT = {"idle_s": 20.0, "patience_s": PATIENCE_S}
"""For tests in which nothing freezes: a busy machine is not taken for a lost worker."""
LONG = SamplingParams(temperature=1.0, seed=2, ignore_eos=True, max_tokens=600)


@pytest.fixture(scope="module")
def pairs_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Two prefill and two decode services of the hash model."""
    flags = ("--model", "hash", "--page-size", "16", "--prefill", "2", "--decode", "2")
    up = start_up(tmp_path_factory.mktemp("pairs"), *flags, "--pool-tokens", "32768")
    yield up
    assert up.stop() == 0


def endpoints_of(up: Up, role: str = "decode") -> list[str]:
    return [each["endpoint"] for each in up.state["services"] if each["role"] == role]


def pid_at(up: Up, endpoint: str) -> int:
    return next(int(e["pid"]) for e in up.state["services"] if e["endpoint"] == endpoint)


def state_of(endpoint: str) -> str:
    """What the worker says of itself; empty if it says nothing."""
    with grpc.insecure_channel(endpoint) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            return stub.GetState(admin_pb2.GetStateRequest(), timeout=2.0).state
        except grpc.RpcError:
            return ""


def all_serve(up: Up) -> bool:
    return all(state_of(each["endpoint"]) == "serving" for each in up.state["services"])


def hold_nothing(up: Up) -> bool:
    """Whether every page of every service is free, or kept by the prefix cache alone."""
    pages = []
    for service in up.state["services"]:
        with grpc.insecure_channel(service["endpoint"]) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            pages += stub.ListPages(admin_pb2.ListPagesRequest(), timeout=PATIENCE_S).pages
    return all(page.reason == "kept by the prefix cache" for page in pages)


def endless(params: SamplingParams) -> SamplingParams:
    """The same kind of stream, too long to end before its worker is killed."""
    stops = tuple(stop * 3 for stop in params.stop)
    return replace(
        params,
        stop=stops,
        stop_token_ids=(),
        ignore_eos=True,
        min_tokens=0,
        max_tokens=600 // params.n,
    )


async def expected_of(wanted: list[SamplingParams]) -> list[list[tuple[object, ...]]]:
    async with AsyncLocalEngine("hash", page_size=16, pool_tokens=32768) as engine:
        each = await asyncio.gather(*(engine.generate([PROMPT], params) for params in wanted))
    return [essence(completions) for completions in each]


async def test_a_worker_killed_under_streams_of_every_kind_costs_none_a_token(
    pairs_up: Up,
) -> None:
    wanted = [endless(params) for params in KINDS.values()]
    expected = await expected_of(wanted)
    endpoints = endpoints_of(pairs_up)
    started = asyncio.Semaphore(0)

    async def run(params: SamplingParams) -> list[Completion]:
        items: list[StreamItem] = []
        async with AsyncRemoteEngine(endpoints, **PATIENT) as client:
            async for item in client.items(PROMPT, params):
                items.append(item)
                if len(items) == 12:
                    started.release()
        return collected(items, params).completions()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(params)) for params in wanted]
        for _ in tasks:
            await started.acquire()
        os.kill(pid_at(pairs_up, endpoints[0]), signal.SIGKILL)
    for name, task, whole in zip(KINDS, tasks, expected, strict=True):
        completions = task.result()
        assert essence(completions) == whole, name
        assert 0 < completions[0].usage.resumed_tokens < completions[0].usage.output_tokens, name
    wait_until(lambda: all_serve(pairs_up))
    wait_until(lambda: hold_nothing(pairs_up))


async def test_a_frozen_worker_holds_a_stream_up_for_no_more_than_its_watchdog(
    pairs_up: Up,
) -> None:
    (expected,) = await expected_of([LONG])
    endpoints = endpoints_of(pairs_up)
    frozen, items, gaps = pid_at(pairs_up, endpoints[0]), [], []
    async with AsyncRemoteEngine(endpoints) as client:
        before = 0.0
        async for item in client.items(PROMPT, LONG):
            gaps.append(time.monotonic() - before)
            items.append(item)
            if len(items) == 100:
                os.kill(frozen, signal.SIGSTOP)
            if isinstance(item, Delta) and item.first_index == 500:
                os.kill(frozen, signal.SIGCONT)  # its late frames must not be heard
            before = time.monotonic()
    finished = items[-1]
    assert isinstance(finished, Finished)
    assert essence(collected(items, LONG).completions()) == expected
    assert 0 < finished.usage.resumed_tokens < 600
    assert max(gaps[1:]) < 4.0, "2 s of silence, and a worker that takes over"
    wait_until(lambda: hold_nothing(pairs_up))


@pytest.mark.timeout(400)
async def test_a_rolling_restart_of_all_workers_under_load_loses_nothing(pairs_up: Up) -> None:
    """Half are told by SIGTERM and half by Admin.Drain; every one ends with code 0."""
    kinds = [replace(params, max_tokens=60, min_tokens=0) for params in KINDS.values()]
    expected = await expected_of(kinds)
    stop = asyncio.Event()
    num_done = 0

    async def load(client: AsyncRemoteEngine, number: int) -> None:
        nonlocal num_done
        while not stop.is_set():
            found = await client.generate([PROMPT], kinds[number])
            assert essence(found) == expected[number]
            num_done += 1

    async def restart(endpoint: str, by_signal: bool) -> None:
        old, before = pid_at(pairs_up, endpoint), num_done
        if by_signal:
            os.kill(old, signal.SIGTERM)
        else:
            async with grpc.aio.insecure_channel(endpoint) as channel:
                await admin_pb2_grpc.AdminServiceStub(channel).Drain(admin_pb2.DrainRequest())
        await asyncio.to_thread(wait_until, lambda: pid_at(pairs_up, endpoint) != old)
        await asyncio.to_thread(wait_until, lambda: all_serve(pairs_up))
        await asyncio.to_thread(wait_until, lambda: num_done > before + len(kinds))

    workers = [*endpoints_of(pairs_up, "prefill"), *endpoints_of(pairs_up, "decode")]
    async with AsyncRemoteEngine(endpoints_of(pairs_up), **PATIENT) as client:
        async with asyncio.TaskGroup() as group:
            for number in range(len(kinds)):
                group.create_task(load(client, number))
            for number, endpoint in enumerate(workers):
                await restart(endpoint, by_signal=number % 2 == 0)
            stop.set()
    output = (pairs_up.folder / "up.out").read_text()
    assert output.count("was drained; starting it again") == len(workers), output
    wait_until(lambda: hold_nothing(pairs_up))


def test_generate_takes_several_endpoints_and_outlives_its_worker(pairs_up: Up) -> None:
    first, second = endpoints_of(pairs_up)
    flags = ["--prompt", "x" * 40, "--ignore-eos", "--max-tokens", "1000", "--seed", "4"]
    flags += ["--temperature", "1"]
    request = subprocess.Popen(
        [*QUIRE, "generate", *flags, "--json", "--endpoint", f"127.0.0.1:1,{first},{second}"],
        env=pairs_up.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: pairs_up.runs_something())
    os.kill(pid_at(pairs_up, first), signal.SIGKILL)
    output, _ = request.communicate(timeout=PATIENCE_S)
    found = json.loads(output)
    local = pairs_up.generate(*flags, "--local", "--model", "hash")
    assert found["token_ids"] == local["token_ids"]
    assert found["text"] == local["text"]
    assert 0 < found["usage"]["resumed_tokens"] < 1000
    wait_until(lambda: all_serve(pairs_up))


@pytest.fixture
def lone_decode(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A decode service without Redis or supervisor, and its endpoint."""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "decode_svc", "--model", "hash", "--drain-s", "600"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    with process.stdout:
        line = parse_ready_line(process.stdout.readline())
        assert line is not None, (tmp_path / "log").read_text()
        yield process, line[1]
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_second_sigterm_ends_a_drain_at_once(
    lone_decode: tuple[subprocess.Popen[str], str],
) -> None:
    process, endpoint = lone_decode
    params = replace(LONG, max_tokens=4000)
    with RemoteEngine([endpoint], patience_s=0.1) as client:
        items = client.items(PROMPT, params)
        next(items)
        process.terminate()
        wait_until(lambda: state_of(endpoint) == "draining")
        assert process.poll() is None
        process.terminate()
        assert process.wait(PATIENCE_S) == -signal.SIGTERM
        items.close()


def test_a_drained_worker_ends_with_code_0_when_its_last_stream_has_ended(
    lone_decode: tuple[subprocess.Popen[str], str],
) -> None:
    process, endpoint = lone_decode
    with RemoteEngine([endpoint], **PATIENT) as client:
        items = client.items(PROMPT, LONG)
        next(items)
        process.terminate()
        assert isinstance([*items][-1], Finished)
    assert process.wait(PATIENCE_S) == 0

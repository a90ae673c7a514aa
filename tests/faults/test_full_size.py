"""Faults of which ``make test`` runs a smaller form, at full size: many clients, long storms."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import grpc
import pytest

from decode_svc import intake, workers
from engine.client import AsyncClient
from engine.completion import Completion
from engine.sampling_params import SamplingParams
from engine.wire import prompt_to_wire, sampling_to_wire
from kvstore.page import PageFrame
from kvstore.transports import LandingPlace, PageSource, receive
from quire.v1 import inference_pb2_grpc
from tests.faults.fleet import Fleet, WorkerProcess, eventually, fresh_prompt
from tests.faults.truth import Truth
from tests.integration.cluster import running
from tests.integration.test_faults import failures

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(600),
]

PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=12)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


async def right(client: AsyncClient, truth: Truth, num_tokens: int = 100) -> Completion:
    prompt = fresh_prompt(num_tokens)
    (found,) = await client.generate([prompt], PARAMS)
    assert found.token_ids == await truth.tokens(prompt, PARAMS)
    return found


# -- pages that are read long after their lease

ROUNDS, AT_ONCE = 500, 20
LATE_S, LEASE_S = 2.0, 0.05


@pytest.mark.parametrize("transport", ["grpc", "shm"])
async def test_five_hundred_reads_two_seconds_late_never_give_anothers_pages(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Leases of 50 ms, an owner's pool of 24 pages that others fill at once, and a receiver that
    looks at what was announced to it after 2 s."""
    seen: WeakSet[LandingPlace] = WeakSet()

    async def late(frames: Sequence[PageFrame], landing: LandingPlace, source: PageSource) -> int:
        if landing not in seen:
            seen.add(landing)
            await asyncio.sleep(LATE_S)  # the time itself is tested
        return await receive(frames, landing, source)

    monkeypatch.setattr(intake, "receive", late)
    monkeypatch.setattr(workers, "AVOID_S", 0.0)
    async with running(
        redis_url,
        prefill={"lease_s": LEASE_S, "pool_tokens": 24 * 16},
        decode={"handover_idle_s": 5.0},
        transports=(transport,),
    ) as cluster:
        async with cluster.client(timeout_s=120.0) as client:
            for _ in range(ROUNDS // AT_ONCE):
                await asyncio.gather(*[right(client, truth, 90) for _ in range(AT_ONCE)])
        counted = failures(cluster)
    assert sum(counted.values()) == ROUNDS
    if transport == "shm":  # whoever reads by himself finds the slots given to others
        assert counted["generation"] >= ROUNDS // 4, counted


# -- aborts

STORM_S, EVERY_S = 60.0, 0.25


async def test_a_minute_of_aborts_leaves_the_rest_their_throughput_and_the_pool_full_in_seconds(
    redis_url: str, truth: Truth
) -> None:
    """Nine of ten requests go away at random moments; of the others at least 80 % are done in the
    same minute, and two seconds later every page is back."""
    rng = random.Random(90)
    done: Counter[str] = Counter()
    async with (
        running(redis_url, pool_tokens=2048) as cluster,
        cluster.client(timeout_s=120.0) as client,
    ):

        async def stays() -> None:
            await right(client, truth)
            done["stayed"] += 1

        async def leaves() -> None:
            work = asyncio.create_task(client.generate([fresh_prompt(100)], ENDLESS))
            await asyncio.sleep(rng.uniform(0, 0.3))
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            done["left"] += 1

        began = time.monotonic()
        num_rounds = round(STORM_S / EVERY_S)
        async with asyncio.TaskGroup() as group:
            for number in range(num_rounds):
                await asyncio.sleep(began + number * EVERY_S - time.monotonic())
                group.create_task(stays())
                for _ in range(9):
                    group.create_task(leaves())
            await asyncio.sleep(began + STORM_S - time.monotonic())
            assert done["stayed"] >= 0.8 * num_rounds, done
        assert done == {"stayed": num_rounds, "left": 9 * num_rounds}
        ended = time.monotonic()
        await cluster.balanced()
        assert time.monotonic() - ended < 2
        await right(client, truth)


# -- clients that stop reading

NUM_STUCK = 500
MAX_GROWTH_BYTES = 128 << 20


async def test_five_hundred_clients_that_stop_reading_and_a_stopped_one_hold_up_nobody(
    fleet: Fleet, truth: Truth, tmp_path: Path
) -> None:
    worker = await fleet.add("decode", pool_tokens=65536, max_requests=1024, output_queue=16)
    worker.start()
    await worker.ready()
    await fleet.hands_over(worker)
    before = resident_bytes(worker)
    # Messages that nobody reads are not taken in beforehand: the streams stop.
    options = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]
    async with (
        stopped_client(worker, tmp_path),
        grpc.aio.insecure_channel(f"127.0.0.1:{worker.port}", options=options) as channel,
        fleet.client([worker]) as client,
    ):
        stuck = await streams_nobody_reads(channel, NUM_STUCK)
        began = time.monotonic()
        await asyncio.gather(*[right(client, truth) for _ in range(8)])
        assert time.monotonic() - began < 30
        await eventually(worker.in_balance, "they ended, or were cut off")
        assert resident_bytes(worker) - before < MAX_GROWTH_BYTES
        for call in stuck:
            call.cancel()
    await fleet.balanced()
    await fleet.remove(worker)


async def streams_nobody_reads(channel: grpc.aio.Channel, count: int) -> list[Any]:
    """Streams that have begun, of which nobody reads on."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = prompt_to_wire(fresh_prompt(20))
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    request.sampling.CopyFrom(sampling_to_wire(params))
    calls = [stub.Generate(request, timeout=120) for _ in range(count)]
    await asyncio.gather(*[call.read() for call in calls])
    return calls


@asynccontextmanager
async def stopped_client(worker: WorkerProcess, folder: Path) -> AsyncIterator[None]:
    """A client process that has stopped itself after its first token."""
    process = client_that_stops(worker, folder)

    async def has_stopped() -> bool:
        assert process.poll() is None
        return state_of(process.pid) == "T"

    try:
        await eventually(has_stopped, "the client has its first token")
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def client_that_stops(worker: WorkerProcess, folder: Path) -> subprocess.Popen[bytes]:
    script = folder / "client.py"
    script.write_text(
        "import os, signal, sys\n"
        "from engine.remote import RemoteEngine\n"
        "from engine.sampling_params import SamplingParams\n"
        "with RemoteEngine([sys.argv[1]]) as engine:\n"
        "    for _ in engine.stream(list(range(50)), SamplingParams(ignore_eos=True)):\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    return subprocess.Popen(
        [sys.executable, str(script), worker.link.endpoint],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def state_of(pid: int) -> str:
    """The kernel's letter for what a process does."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def resident_bytes(worker: WorkerProcess) -> int:
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    (found,) = [line.split() for line in lines if line.startswith("VmRSS:")]
    return int(found[1]) * 1024

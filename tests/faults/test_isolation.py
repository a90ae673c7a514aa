"""What crosses no border: clocks between processes, one tenant's text to another, one client's
broken link to the others."""

from __future__ import annotations

import asyncio
import subprocess
import time

import grpc
import pytest
import redis

from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from engine.serving.channels import open_channel
from engine.wire import prompt_to_wire
from quire.v1 import inference_pb2_grpc
from tests.faults.fleet import Fleet, eventually, fresh_prompt
from tests.faults.history import OK, Record, observe, violations
from tests.faults.truth import Truth

# The first of them starts all processes; that alone may take a minute where others work too.
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PARAMS = SamplingParams(temperature=1.0, seed=9, max_tokens=12)
LONG = SamplingParams(temperature=1.0, seed=9, max_tokens=300, ignore_eos=True)
NAMESPACE = ("unshare", "--user", "--map-root-user", "--time", "--fork", "--kill-child")


def elsewhere_in_time(seconds: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """Command and environment of a process whose monotonic clock is that much ahead: a time
    namespace where the system grants one, otherwise an offset inside the process."""
    wrapper = (*NAMESPACE, "--monotonic", str(seconds), "--boottime", str(seconds))
    granted = subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode == 0
    return (wrapper, {}) if granted else ((), {"QUIRE_TEST_MONOTONIC": str(seconds)})


async def test_processes_whose_clocks_began_at_other_times_understand_each_other(
    fleet: Fleet, truth: Truth
) -> None:
    """Only durations travel: with a time stamp on the wire, a lease or deadline would be over."""
    shifted = [fleet.prefill[0], fleet.decode[0]]
    for worker, seconds in zip(shifted, (100_000, 3_000_000), strict=True):
        worker.kill()
        wrapper, environment = elsewhere_in_time(seconds)
        worker.start(*wrapper, **environment)
    fleet.prefill[1].kill()
    for worker in shifted:
        await worker.ready()
    await fleet.hands_over(fleet.decode[0])
    requests = [(fresh_prompt(300), PARAMS) for _ in range(4)]
    history: list[Record] = []
    async with fleet.client([fleet.decode[0]]) as client:
        for prompt, params in requests:
            await observe(client, prompt, params, 30.0, history)
    assert violations(history, await truth.of(requests)) == []
    assert {(record.outcome, record.where) for record in history} == {(OK, "remote")}
    await fleet.balanced()
    for worker in shifted:
        worker.kill()


ONE_WAY = [pytest.param(way, marks=pytest.mark.slow) for way in ("to_server", "to_client")]


@pytest.mark.parametrize("way", [*ONE_WAY, "both"])
async def test_a_client_and_a_decode_worker_cut_off_from_each_other_both_know_it_in_seconds(
    fleet: Fleet, truth: Truth, way: str
) -> None:
    cut_off, other = fleet.decode
    for worker in fleet.decode:
        worker.pace(0.02)
    request = (fresh_prompt(), LONG)
    broken: list[Record] = []
    whole: list[Record] = []
    async with fleet.client([cut_off]) as first, fleet.client([other]) as second:
        lost = asyncio.create_task(observe(first, *request, 60.0, broken))
        kept = asyncio.create_task(observe(second, *request, 60.0, whole))
        await streams_have_tokens([broken, whole])
        for name in ("to_server", "to_client") if way == "both" else (way,):
            getattr(cut_off.link, name).hold()
        began = time.monotonic()
        await lost
        assert time.monotonic() - began < 30  # not the minute that gRPC would take
        for worker in fleet.decode:
            worker.pace(0)
        await eventually(cut_off.in_balance, "the worker gave the pages back", 15.0)
        await kept
    assert violations(broken + whole, await truth.of([request])) == []
    assert broken[0].outcome in {OK, "PeerUnavailable"}
    assert whole[0].outcome == OK


async def streams_have_tokens(histories: list[list[Record]]) -> None:
    async def look() -> bool:
        return all(records and records[0].deltas for records in histories)

    await eventually(look, "streams have tokens")


async def test_a_worker_that_cannot_be_reached_at_all_is_told_in_seconds(fleet: Fleet) -> None:
    """Connections are accepted and nothing ever answers."""
    worker = fleet.decode[0]
    worker.link.hold()
    async with open_channel(worker.link.endpoint, "control") as channel:
        request = prompt_to_wire(fresh_prompt())
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await inference_pb2_grpc.InferenceServiceStub(channel).Generate(request).read()
        assert time.monotonic() - began < 15
    assert told.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_tenants_words_are_in_no_log_no_key_and_no_other_tenants_stream(
    fleet: Fleet, truth: Truth
) -> None:
    """Canaries: through handovers, a failing worker, and errors that name what was wrong."""
    canaries = {tenant: f"canary-{tenant}-{number}" for number, tenant in enumerate("xyz")}
    fleet.prefill[0].arm("frame", "raise planted")
    for tenant, canary in canaries.items():
        async with fleet.client(tenant=tenant) as client:
            found = await client.generate([f"{canary} says hello. " * 8] * 2, PARAMS)
            with pytest.raises(InvalidRequest) as refused:
                await client.generate([canary * 1000], PARAMS)
        others = [each for name, each in canaries.items() if name != tenant]
        assert canary not in str(refused.value)
        assert not any(other in each.text for other in others for each in found)
    stored = everything_in(fleet)
    for worker in fleet.workers:
        stored += worker.log
    token_ids = ", ".join(str(byte) for byte in b"canary-")
    assert "canary-" not in stored
    assert token_ids not in stored
    assert b"canary-".hex() not in stored


def everything_in(fleet: Fleet) -> str:
    """All of Redis as text."""
    with redis.Redis.from_url(fleet.server.url) as client:
        found = []
        for key in client.scan_iter():
            found.append(repr(key))
            found.append(repr(client.dump(key)))
        return "\n".join(found)

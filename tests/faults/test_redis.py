"""Redis dies, freezes, forgets, or lies, under processes that serve.

Streams go on, new requests are served by the workers last known, and workers register again by
themselves (law 6): an answer of Redis can make a request slower, never wrong.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from engine.sampling_params import SamplingParams
from kvstore.embedded import EmbeddedRedis
from kvstore.index import IndexUnavailable, WorkerLoad, WorkerRecord
from kvstore.index.redis import RedisPageIndex
from tests.faults.fleet import Fleet, eventually, fresh_prompt
from tests.faults.history import OK, Record, observe, violations
from tests.faults.link import free_port
from tests.faults.truth import Truth

# The first of them starts all processes; that alone may take a minute where others work too.
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PARAMS = SamplingParams(temperature=1.0, seed=5, max_tokens=12)
LONG = SamplingParams(temperature=1.0, seed=6, max_tokens=200, ignore_eos=True)
REGISTER_AGAIN_S = 15.0  # two heartbeats and a breaker's pause are 5 s; the rest is for the machine
WORKER_TTL_S = 10.0


@asynccontextmanager
async def index_of(server: EmbeddedRedis) -> AsyncIterator[RedisPageIndex]:
    index = RedisPageIndex(server.url, timeout_s=2.0, breaker_cooldown_s=0.05)
    yield index
    await index.close()


async def listed(server: EmbeddedRedis) -> list[WorkerRecord]:
    async with index_of(server) as index:
        try:
            return await index.workers()
        except IndexUnavailable:
            return []


async def all_registered(fleet: Fleet, server: EmbeddedRedis, timeout_s: float) -> None:
    wanted = {worker.link.endpoint for worker in fleet.workers if worker.alive}

    missing = set(wanted)

    async def look() -> bool:
        nonlocal missing
        missing = wanted - {record.endpoint for record in await listed(server)}
        return not missing

    try:
        await eventually(look, "all workers are registered", timeout_s)
    except AssertionError:
        logs = [each.log[-1500:] for each in fleet.workers if each.link.endpoint in missing]
        raise AssertionError(f"not registered: {missing}; {logs}") from None


@asynccontextmanager
async def streams_running(fleet: Fleet, truth: Truth) -> AsyncIterator[list[Record]]:
    """Long streams on every decode worker; when the block ends they must end well, and right."""
    requests = [(fresh_prompt(), LONG) for _ in range(4)]
    history: list[Record] = []
    for worker in fleet.decode:
        worker.pace(0.01)
    async with fleet.client() as client, asyncio.TaskGroup() as group:
        for prompt, params in requests:
            group.create_task(observe(client, prompt, params, 60.0, history))

        async def all_have_tokens() -> bool:
            return len(history) == 4 and all(record.deltas for record in history)

        await eventually(all_have_tokens, "streams have tokens")
        yield history
        for worker in fleet.decode:
            worker.disarm()
    assert violations(history, await truth.of(requests)) == []
    assert {record.outcome for record in history} == {OK}


async def serve_fresh_ones(fleet: Fleet, truth: Truth, count: int = 4) -> list[Record]:
    """New requests, one after another; they must end well, and right."""
    requests = [(fresh_prompt(), PARAMS) for _ in range(count)]
    history: list[Record] = []
    async with fleet.client() as client:
        for prompt, params in requests:
            await observe(client, prompt, params, 30.0, history)
    assert violations(history, await truth.of(requests)) == []
    assert {record.outcome for record in history} == {OK}
    return history


async def test_redis_killed_and_restarted_empty_stops_no_stream_and_no_new_request(
    fleet: Fleet, truth: Truth
) -> None:
    async with streams_running(fleet, truth):
        os.kill(fleet.server.pid, signal.SIGKILL)
        fresh = await serve_fresh_ones(fleet, truth)
        assert {record.where for record in fresh} == {"remote"}
        fleet.server.stop()
        fleet.server.start()
        assert await listed(fleet.server) == []
        fresh = await serve_fresh_ones(fleet, truth)
        assert {record.where for record in fresh} == {"remote"}
        await all_registered(fleet, fleet.server, REGISTER_AGAIN_S)


def freeze_by_signal(server: EmbeddedRedis) -> None:
    os.kill(server.pid, signal.SIGSTOP)


def freeze_by_command(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.client_pause(3000)


@pytest.mark.parametrize("freeze", [freeze_by_signal, freeze_by_command])
async def test_a_redis_that_answers_nothing_holds_up_no_request(
    fleet: Fleet, truth: Truth, freeze: Callable[[EmbeddedRedis], None]
) -> None:
    await serve_fresh_ones(fleet, truth)
    freeze(fleet.server)
    try:
        fresh = await serve_fresh_ones(fleet, truth)
        assert {record.where for record in fresh} == {"remote"}
        assert max(record.seconds for record in fresh) < 2.5  # not the three of the pause
    finally:
        os.kill(fleet.server.pid, signal.SIGCONT)
    await all_registered(fleet, fleet.server, REGISTER_AGAIN_S)


async def test_a_redis_flushed_again_and_again_sends_no_request_astray(
    fleet: Fleet, truth: Truth
) -> None:
    async def flush() -> None:
        with redis.Redis.from_url(fleet.server.url) as client:
            while True:
                await asyncio.to_thread(client.flushall)
                await asyncio.sleep(0.05)

    flushing = asyncio.create_task(flush())
    fresh = await serve_fresh_ones(fleet, truth, 8)
    flushing.cancel()
    await asyncio.gather(flushing, return_exceptions=True)
    assert {record.where for record in fresh} == {"remote"}
    await all_registered(fleet, fleet.server, REGISTER_AGAIN_S)


@pytest.mark.slow
async def test_a_failover_that_loses_writes_brings_nobody_back_for_longer_than_his_time_to_live(
    fleet: Fleet, truth: Truth, tmp_path: Path
) -> None:
    """The replica misses the last writes: among them, that a worker has left."""
    leaving = fleet.prefill[0]
    with EmbeddedRedis(tmp_path, port=free_port()) as replica:
        with redis.Redis.from_url(replica.url) as client:
            client.replicaof("127.0.0.1", fleet.redis_port)
            await all_registered(fleet, replica, 30.0)
            client.replicaof("NO", "ONE")
        leaving.send(signal.SIGTERM)
        assert await leaving.ended() == 0
        async with streams_running(fleet, truth):
            for worker in fleet.workers:
                worker.redis.target = int(replica.url.rpartition(":")[2].partition("/")[0])
                await worker.redis.reset()
            os.kill(fleet.server.pid, signal.SIGKILL)
            assert leaving.link.endpoint in {each.endpoint for each in await listed(replica)}
            await serve_fresh_ones(fleet, truth)
            await all_registered(fleet, replica, REGISTER_AGAIN_S)

            async def forgotten() -> bool:
                return leaving.link.endpoint not in {
                    each.endpoint for each in await listed(replica)
                }

            await eventually(forgotten, "the one who left is forgotten", 2 * WORKER_TTL_S)
        await serve_fresh_ones(fleet, truth)
    fleet.server.stop()


@pytest.mark.parametrize("lie", ["a dead address", "another service", "someone else's address"])
async def test_an_entry_that_lies_costs_time_and_no_token(
    fleet: Fleet, truth: Truth, lie: str
) -> None:
    """It names the least loaded worker of all, so it is tried first."""
    where = {
        "a dead address": f"127.0.0.1:{free_port()}",
        "another service": fleet.decode[0].link.endpoint,
        "someone else's address": f"localhost:{fleet.prefill[0].link.port}",
    }[lie]
    records = await listed(fleet.server)
    true = next(record for record in records if record.role == "prefill")
    hostile = WorkerRecord(
        boot_id="00" * 15 + secrets.token_hex(1),
        role="prefill",
        endpoint=where,
        fingerprint=true.fingerprint,
        model=true.model,
        load=WorkerLoad(0, 0, 0, 9999, 9999),
        state="serving",
    )
    async with index_of(fleet.server) as index:
        began = time.monotonic()
        while time.monotonic() - began < 2.5:  # longer than the workers are not looked up
            await index.register(hostile, WORKER_TTL_S)
            await serve_fresh_ones(fleet, truth, 2)
        await index.unregister(hostile.boot_id)
    assert any(f"endpoint={where} " in worker.log for worker in fleet.decode), "it was not tried"
    await all_registered(fleet, fleet.server, REGISTER_AGAIN_S)

"""What operators see of a worker, how it leaves, and what requests leave behind."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.errors import PeerUnavailable, ShuttingDown
from engine.local import AsyncLocalEngine
from engine.outputs import Reserved
from engine.plan import Landed
from engine.request import Brought, Request
from engine.sampling_params import SamplingParams
from engine.serving import server as serving
from engine.serving import worker as worker_module
from engine.serving.status import from_rpc_error
from kvstore.ledger import PageState
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings
from quire.v1 import admin_pb2, admin_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from tests.integration.cluster import eventually, running, settings_for, start, until

PROMPT = list(range(100))
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


async def test_state_and_pages_tell_what_a_worker_holds(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        stream = client.stream(PROMPT, ENDLESS)
        for _ in range(4):
            await anext(stream)
        async with grpc.aio.insecure_channel(cluster.decode[0].endpoint) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            state = await stub.GetState(admin_pb2.GetStateRequest())
            listed = await stub.ListPages(admin_pb2.ListPagesRequest())
        await stream.aclose()
    assert (state.role, state.state, state.model) == ("decode", "serving", "hash")
    assert state.num_running == 1
    assert state.index_reachable
    counts = listed.counts
    parts = (counts.free, counts.filling, counts.sealed, counts.quarantined)
    assert sum(parts) == counts.total == 256
    assert len(listed.pages) == counts.total - counts.free > 0
    owned = [page for page in listed.pages if page.owners]
    assert len(owned) >= 7
    assert all("owned by" in page.reason and page.held_s >= 0 for page in owned)


async def test_a_question_that_is_given_up_before_its_turn_leaves_the_engine_alive(
    redis_url: str,
) -> None:
    async with running(redis_url, num_prefill=0) as cluster, cluster.client() as client:
        node, params = cluster.decode[0], SamplingParams(temperature=0, max_tokens=5)
        node.model.gate.clear()
        num_steps = node.model.num_steps
        work = asyncio.create_task(client.generate([PROMPT], params))
        await until(lambda: node.model.num_steps > num_steps)
        question = asyncio.create_task(node.worker.engine.call(lambda core: core.totals))
        await asyncio.sleep(0)
        question.cancel()
        node.model.gate.set()
        (found,) = await work
        assert len(found.token_ids) == 5
        assert question.cancelled()
        assert not node.worker.broken


async def test_drain_finishes_what_runs_and_takes_nothing_new(redis_url: str) -> None:
    async with running(redis_url, drain_s=20.0) as cluster, cluster.client() as client:
        node = cluster.decode.pop()
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1000)
        stream = client.items(PROMPT, params)
        for _ in range(3):
            await anext(stream)
        async with grpc.aio.insecure_channel(node.endpoint) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            assert (await stub.Drain(admin_pb2.DrainRequest())).num_running == 1
        await until(lambda: node.worker.state == "draining")
        with pytest.raises((ShuttingDown, PeerUnavailable)):
            await client.generate([PROMPT], params)
        items = [item async for item in stream]
        assert type(items[-1]).__name__ == "Finished"
        async with asyncio.timeout(20):
            await node.task


async def test_a_worker_whose_background_task_fails_leaves_instead_of_living_on_half_dead(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = await start(PrefillWorker, PrefillSettings(**settings_for(redis_url)))

    async def fail() -> None:
        raise RuntimeError("a bug")

    node.worker.spawn(fail())
    await node.task
    assert node.worker.broken
    assert "a background task failed" in caplog.text


async def test_before_it_is_warm_a_service_says_so(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health answers while the model loads; calls are UNAVAILABLE, readiness is NOT_SERVING."""
    loading = threading.Event()
    load = worker_module.load_model

    def slow_load(*arguments: object, **options: object) -> object:
        assert loading.wait(30)
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(worker_module, "load_model", slow_load)
    monkeypatch.setattr(serving, "ready_line", lambda role, endpoint: "ready")
    stop, where = asyncio.Event(), asyncio.get_running_loop().create_future()
    worker = PrefillWorker(PrefillSettings(**settings_for(redis_url)), stop.set)
    warm = worker.warm

    async def telling(endpoint: str) -> None:
        where.set_result(endpoint)
        await warm(endpoint)

    monkeypatch.setattr(worker, "warm", telling)
    task = asyncio.create_task(serving.serve(worker, worker.settings.listen, stop))
    async with grpc.aio.insecure_channel(await where) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def status(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return (await health.Check(request)).status  # type: ignore[no-any-return]

        answers = health_pb2.HealthCheckResponse
        assert await status("") == answers.SERVING
        assert await status("quire.v1.PrefillService") == answers.NOT_SERVING
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ReleasePages(prefill_pb2.ReleasePagesRequest())
        assert isinstance(from_rpc_error(caught.value), PeerUnavailable)
        loading.set()

        async def ready() -> bool:
            return await status("quire.v1.PrefillService") == answers.SERVING

        await eventually(ready)
    stop.set()
    await task


@pytest.mark.parametrize("cancels", [1, 2, 3])
@pytest.mark.parametrize("started", [True, False])
async def test_a_request_cancelled_again_and_again_still_gives_its_pages_back(
    cancels: int, started: bool
) -> None:
    """The closing task is cancelled while it closes; the intake perhaps before it began."""
    async with AsyncLocalEngine("hash", page_size=16, check_pages=True) as local:
        began = asyncio.Event()

        async def intake(reserved: Reserved) -> Brought:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
            return Brought(0)

        request = Request(tuple(PROMPT), ENDLESS, local.capacity, intake=intake)

        async def run() -> None:
            async for _ in request.stream(local.engine):
                pass

        task = asyncio.create_task(run())
        if started:
            await began.wait()
        else:
            await until(lambda: local.engine.core.scheduler.num_sequences > 0)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: local.engine.core.pool.ledger.count(PageState.FREE) == 512 * 2)


async def test_an_intake_that_raises_leaves_the_prompt_to_this_service() -> None:
    async with AsyncLocalEngine("hash", page_size=16, check_pages=True) as local:

        async def broken(reserved: Reserved) -> Brought:
            raise RuntimeError("a bug")

        async def wrong(reserved: Reserved) -> Brought:
            local.engine.worker.post(Landed(reserved.name, 0))
            return Brought(0)

        params = SamplingParams(temperature=0, max_tokens=9)
        (expected,) = await local.generate([PROMPT], params)
        for intake in (broken, wrong):
            local.engine.core.pool.clear_cache()
            request = Request(tuple(PROMPT), params, local.capacity, intake=intake)
            items = [item async for item in request.stream(local.engine)]
            tokens = tuple(t for item in items for t in getattr(item, "token_ids", ()))
            assert tokens == expected.token_ids

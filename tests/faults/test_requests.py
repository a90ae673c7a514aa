"""Requests that ask too much, go away, stop reading, or share a batch with hostile ones."""

from __future__ import annotations

import asyncio
import random
import sys
import time

import grpc
import pytest

from engine.client import AsyncClient
from engine.completion import Completion
from engine.errors import EngineFault, InvalidRequest, QuireError
from engine.sampling_params import SamplingParams
from engine.wire import prompt_to_wire, sampling_to_wire
from kvstore.transports.grpc_wire import fingerprint_to_wire
from quire.v1 import inference_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from tests.faults.fleet import fresh_prompt
from tests.faults.truth import Truth
from tests.integration.cluster import Cluster, Node, eventually, running, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=12)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


async def right(client: AsyncClient, truth: Truth, num_tokens: int = 100) -> Completion:
    prompt = fresh_prompt(num_tokens)
    (found,) = await client.generate([prompt], PARAMS)
    assert found.token_ids == await truth.tokens(prompt, PARAMS)
    return found


# -- too much


async def test_a_prompt_at_the_limit_is_served_and_a_longer_one_refused_before_it_costs_anything(
    redis_url: str, truth: Truth
) -> None:
    async with running(redis_url, pool_tokens=1024) as cluster, cluster.client() as client:
        limit = (await client.model()).max_prompt_tokens
        longest = fresh_prompt(limit)
        (found,) = await client.generate([longest], PARAMS)
        expected = await truth.tokens(longest, PARAMS)
        assert found.token_ids == expected[: len(found.token_ids)]
        allocations = sum(page.generation for page in ledger_of(cluster.decode[0]))
        for size in (limit + 1, limit * 10):
            with pytest.raises(InvalidRequest, match=str(limit)):
                await client.generate([fresh_prompt(size)], PARAMS)
        assert sum(page.generation for page in ledger_of(cluster.decode[0])) == allocations


def ledger_of(node: Node) -> list[object]:
    ledger = node.core.pool.ledger
    return [ledger[slot] for slot in range(len(ledger))]


async def test_twenty_requests_in_a_pool_of_sixteen_pages_all_end_with_their_own_text(
    redis_url: str, truth: Truth
) -> None:
    """Preempted again and again, but the oldest always gets on: no livelock."""
    params = SamplingParams(temperature=1.0, seed=8, max_tokens=60, ignore_eos=True)
    prompts = [fresh_prompt(17) for _ in range(20)]
    async with running(redis_url, decode={"pool_tokens": 16 * 16}) as cluster:
        async with cluster.client() as client:
            found = await client.generate(prompts, params)
    for prompt, each in zip(prompts, found, strict=True):
        assert each.token_ids == await truth.tokens(prompt, params)
    assert sum(each.usage.preemptions for each in found) > 0


# -- pages that nobody fetches


def prefill_request(node: Node, number: int, num_tokens: int = 600) -> prefill_pb2.PrefillRequest:
    return prefill_pb2.PrefillRequest(
        request_id=number.to_bytes(16, "big"),
        attempt=1,
        token_ids=fresh_prompt(num_tokens),
        fingerprint=fingerprint_to_wire(node.core.fingerprint),
    )


async def test_pages_nobody_acknowledges_leave_room_for_others(redis_url: str) -> None:
    """Beyond half the pool new prompts are refused with a hint; when leases end, served again."""
    async with running(
        redis_url, num_decode=0, pool_tokens=2048, prefill={"lease_s": 1.0}
    ) as cluster:
        node = cluster.prefill[0]
        async with grpc.aio.insecure_channel(node.endpoint) as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            refused = None
            for number in range(4):
                try:
                    async for _ in stub.Prefill(prefill_request(node, number)):
                        pass
                except grpc.aio.AioRpcError as error:
                    refused = error
            assert refused is not None
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "wait for an acknowledgement" in (refused.details() or "")
            await cluster.balanced()
            async for _ in stub.Prefill(prefill_request(node, 9)):
                pass


async def test_a_receiver_that_takes_nothing_is_given_up_though_it_answers_pings(
    redis_url: str,
) -> None:
    async with running(
        redis_url,
        num_decode=0,
        pool_tokens=4096,
        prefill={"receiver_idle_s": 0.5, "lease_s": 60.0},
    ) as cluster:
        node = cluster.prefill[0]
        options = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(node.endpoint, options=options) as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            call = stub.Prefill(prefill_request(node, 1, 4000))
            await call.read()
            await cluster.balanced()
            call.cancel()


# -- going away


async def test_a_cancellation_at_any_moment_leaves_nothing_behind(
    redis_url: str, truth: Truth
) -> None:
    """After every number of turns of the event loop that a request takes."""
    async with running(redis_url) as cluster, cluster.client() as client:
        for turns in range(0, 120, 3):
            work = asyncio.create_task(client.generate([fresh_prompt(60)], PARAMS))
            for _ in range(turns):
                await asyncio.sleep(0)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        await cluster.balanced()
        await right(client, truth)


async def test_a_storm_of_aborts_leaves_the_rest_right_and_the_pool_full_in_seconds(
    redis_url: str, truth: Truth
) -> None:
    """Nine of ten requests go away, at random moments; one of ten stays."""
    rng = random.Random(90)
    async with running(redis_url, pool_tokens=2048) as cluster, cluster.client() as client:

        async def one(stays: bool) -> None:
            if stays:
                await right(client, truth)
                return
            work = asyncio.create_task(client.generate([fresh_prompt(100)], ENDLESS))
            await asyncio.sleep(rng.uniform(0, 0.3))
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

        for _ in range(5):
            await asyncio.gather(*[one(number % 10 == 0) for number in range(30)])
        began = time.monotonic()
        await cluster.balanced()
        assert time.monotonic() - began < 10
        await right(client, truth)


async def test_after_an_abort_the_others_go_on(redis_url: str, truth: Truth) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        others = [asyncio.create_task(right(client, truth)) for _ in range(4)]
        stream = client.stream(fresh_prompt(), ENDLESS)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.gather(*others)
        await cluster.balanced()


async def test_an_aborted_prefill_never_yields_a_token(redis_url: str, truth: Truth) -> None:
    """The prefill worker gives up in the middle; what has arrived is not decoded from."""
    async with running(redis_url) as cluster, cluster.client() as client:
        node = cluster.prefill[0]
        node.model.gate.clear()
        work = asyncio.create_task(right(client, truth, 600))
        await until(lambda: node.core.scheduler.num_sequences > 0)
        for name in list(node.worker.engine._mailboxes):
            node.worker.engine._mailboxes[name].fail(EngineFault("given up"))
        node.model.gate.set()
        assert (await work).prefilled == "local"


async def test_clients_that_stop_reading_hold_up_nobody_and_free_their_pages(
    redis_url: str, truth: Truth
) -> None:
    async with running(redis_url, decode={"pool_tokens": 32768}) as cluster:
        async with (
            grpc.aio.insecure_channel(cluster.decode[0].endpoint) as channel,
            cluster.client() as client,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = prompt_to_wire(fresh_prompt(20))
            request.sampling.CopyFrom(
                sampling_to_wire(SamplingParams(max_tokens=50, ignore_eos=True))
            )
            stuck = [stub.Generate(request, timeout=60) for _ in range(20)]
            for call in stuck:
                await call.read()
            await asyncio.gather(*[right(client, truth) for _ in range(4)])
            await cluster.balanced()  # they ran to their end, or were cut off
            for call in stuck:
                call.cancel()


# -- neighbours


async def test_hostile_neighbours_in_the_batch_change_no_bit_of_a_request(
    redis_url: str, truth: Truth
) -> None:
    """Poison that fails the step, extreme parameters, many choices, aborts, full pools."""
    poison = 259
    watched = SamplingParams(temperature=1.0, seed=4, max_tokens=40, logprobs=3, ignore_eos=True)
    extreme = SamplingParams(
        temperature=2.0, top_p=0.01, repetition_penalty=2.0, presence_penalty=-2.0, n=4,
        max_tokens=60, logprobs=20, stop=("\x00", "zz"),
    )  # fmt: skip
    prompt = fresh_prompt()
    async with running(redis_url, decode={"pool_tokens": 1024}) as cluster:
        async with cluster.client() as client:
            (alone,) = await client.generate([prompt], watched)
            cluster.decode[0].model.fail_on = poison
            neighbours = [
                asyncio.create_task(client.generate([each], params))
                for each, params in [
                    *[([poison, *fresh_prompt(20)[:12]], PARAMS) for _ in range(3)],
                    *[(fresh_prompt(40), extreme) for _ in range(3)],
                    *[(fresh_prompt(30), ENDLESS) for _ in range(3)],
                ]
            ]
            await until(lambda: cluster.decode[0].core.scheduler.num_running > 2)
            (crowded,) = await client.generate([prompt], watched)
            for each in neighbours:
                each.cancel()
            ends = await asyncio.gather(*neighbours, return_exceptions=True)
    assert crowded.token_ids == alone.token_ids == await truth.tokens(prompt, watched)
    assert crowded.logprobs == alone.logprobs
    assert all(isinstance(end, QuireError | asyncio.CancelledError | list) for end in ends)


async def test_what_former_owners_left_in_a_page_reaches_no_one(
    redis_url: str, truth: Truth
) -> None:
    """Both pools are full of NaN before the first request."""
    async with running(redis_url) as cluster, cluster.client() as client:
        for node in cluster.nodes:
            await node.worker.engine.call(lambda core: core.memory.kv.fill_(0xFF))
        for size in (17, 60, 100):
            await right(client, truth, size)


async def test_two_tenants_with_one_label_and_one_prompt_are_strangers(
    redis_url: str, truth: Truth
) -> None:
    """A client's own label names nothing: requests of one label at once are independent."""
    prompt = fresh_prompt()
    async with running(redis_url) as cluster:
        async with grpc.aio.insecure_channel(cluster.decode[0].endpoint) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)

            async def ask(tenant: str) -> tuple[bytes, list[int], int]:
                request = prompt_to_wire(prompt)
                request.sampling.CopyFrom(sampling_to_wire(PARAMS))
                request.label, request.tenant = "the same", tenant
                name, tokens, cached = b"", [], -1
                async for message in stub.Generate(request, timeout=60):
                    if message.HasField("started"):
                        name = message.started.request_id
                    if message.HasField("delta"):
                        tokens += message.delta.token_ids
                    if message.HasField("finished"):
                        cached = message.finished.usage.cached_tokens
                return name, tokens, cached

            found = await asyncio.gather(*[ask(tenant) for tenant in ("a", "b", "c")])
    assert len({name for name, _, _ in found}) == 3
    assert {cached for _, _, cached in found} == {0}
    expected = list(await truth.tokens(prompt, PARAMS))
    assert all(tokens == expected for _, tokens, _ in found)


# -- clocks


async def test_a_wall_clock_that_jumps_changes_nothing(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour ahead, an hour back, and 1970, while streams and leases run."""
    true = time.time

    def jumped(shift: float) -> float:
        # gRPC compares with what its own library reads from the clock, which stands still here.
        asks = sys._getframe(2).f_globals["__name__"]
        return true() + (0.0 if asks.startswith(("grpc", "engine.serving.deadline")) else shift)

    async with running(redis_url, prefill={"lease_s": 1.0}) as cluster:
        async with cluster.client(timeout_s=30.0) as client:
            for shift in (3600.0, -3600.0, -true()):
                monkeypatch.setattr(time, "time", lambda shift=shift: jumped(shift))
                monkeypatch.setattr(time, "time_ns", lambda shift=shift: int(jumped(shift) * 1e9))
                found = await asyncio.gather(*[right(client, truth) for _ in range(3)])
                assert {each.prefilled for each in found} == {"remote"}
                assert all(0 <= each.timings.total_s < 30 for each in found)
            await cluster.balanced()


# -- identities


async def test_of_two_workers_that_claim_one_identity_one_is_listed_and_no_token_is_wrong(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.serving import worker

    monkeypatch.setattr(worker.secrets, "token_bytes", lambda count: b"\x11" * count)
    # The name of a shared pool's socket would be the same one too.
    async with running(redis_url, num_prefill=2, num_decode=0, transports=("grpc",)) as cluster:
        monkeypatch.undo()
        index = cluster.prefill[0].worker.index

        async def one() -> bool:
            return len(await index.workers("prefill")) == 1

        await eventually(one)
        await serve_beside(redis_url, cluster, truth)


async def serve_beside(redis_url: str, cluster: Cluster, truth: Truth) -> None:
    async with running(redis_url, num_prefill=0) as other:
        await other.prefill_known()
        async with other.client() as client:
            assert (await right(client, truth)).prefilled == "remote"
        await cluster.balanced()

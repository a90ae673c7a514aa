"""Two services = LocalEngine, on a model whose every token depends on every byte of its pages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from engine.client import AsyncClient
from engine.completion import Completion
from engine.local import AsyncLocalEngine
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits
from tests.integration.cluster import running, until


def text(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ,.\n", k=length))


PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40),
    "sampled": SamplingParams(temperature=1.0, seed=7, max_tokens=40),
    "hot and filtered": SamplingParams(
        temperature=1.7, top_p=0.8, top_k=50, min_p=0.001, seed=2**64 - 1, max_tokens=40
    ),
    "four choices": SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=30),
    "penalties": SamplingParams(
        temperature=0.8,
        seed=1,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        max_tokens=40,
    ),
    "logprobs": SamplingParams(temperature=0.5, seed=9, logprobs=5, max_tokens=20),
    "stops": SamplingParams(
        temperature=1.0, seed=5, stop=("e", "xyz"), min_tokens=4, max_tokens=60
    ),
    "stop ids": SamplingParams(temperature=1.0, seed=6, stop_token_ids=tuple(range(64, 90))),
    "bias": SamplingParams(
        temperature=0, logit_bias={65: 50.0}, banned_token_ids=(66,), max_tokens=10
    ),
    "only some ids": SamplingParams(
        temperature=1.0, seed=8, allowed_token_ids=(97, 98, 99), max_tokens=20
    ),
    "no end": SamplingParams(temperature=1.0, seed=4, ignore_eos=True, max_tokens=50),
}


def essence(completions: list[Completion]) -> list[tuple[object, ...]]:
    """What must be equal however and wherever a request ran."""
    return [
        (each.token_ids, each.text, each.logprobs, each.finish_reason, each.matched_stop)
        for each in completions
    ]


async def local(
    prompt: str | list[int], params: SamplingParams, **options: object
) -> list[Completion]:
    async with AsyncLocalEngine("hash", page_size=16, check_pages=True, **options) as engine:  # type: ignore[arg-type]
        return await engine.generate([prompt], params)


@pytest.mark.parametrize("name", PARAMS)
async def test_two_services_give_what_one_engine_gives(redis_url: str, name: str) -> None:
    params, prompt = PARAMS[name], text(200)
    expected = await local(prompt, params)
    async with running(redis_url) as cluster, cluster.client() as client:
        found = await client.generate([prompt], params)
    assert essence(found) == essence(expected)
    assert all(len(each.token_ids) > 0 for each in found)
    assert found[0].prefilled == "remote"
    assert found[0].usage.handed_over_tokens == 199


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 48, 49, 100, 1000])
async def test_every_prompt_length_is_handed_over_right(redis_url: str, length: int) -> None:
    prompt = [random.Random(length).randrange(256) for _ in range(length)]
    params = SamplingParams(temperature=0, max_tokens=12)
    async with running(redis_url, min_remote_tokens=1) as cluster, cluster.client() as client:
        found = await client.generate([prompt], params)
    assert essence(found) == essence(await local(prompt, params))
    assert found[0].usage.handed_over_tokens == length - 1


async def test_without_a_prefill_service_the_same_tokens_come_out(redis_url: str) -> None:
    params, prompt = SamplingParams(temperature=1.0, seed=1, max_tokens=30), text(300)
    async with running(redis_url, num_prefill=0) as cluster, cluster.client() as client:
        found = await client.generate([prompt], params)
    assert essence(found) == essence(await local(prompt, params))
    assert found[0].prefilled == "local"


async def test_a_short_prompt_is_prefilled_where_it_is_decoded(redis_url: str) -> None:
    async with running(redis_url, min_remote_tokens=64) as cluster, cluster.client() as client:
        found = await client.generate([text(60)], SamplingParams(temperature=0, max_tokens=3))
        assert found[0].prefilled == "local"
        assert cluster.prefill[0].model.num_steps == 0


def mixed_requests(count: int) -> Iterator[tuple[str, SamplingParams]]:
    rng = random.Random(11)
    for number in range(count):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            seed=number,
            max_tokens=rng.randint(1, 40),
            logprobs=rng.choice([None, 2]),
            presence_penalty=rng.choice([0.0, 0.9]),
            n=rng.choice([1, 1, 2]),
        )
        yield text(rng.randint(1, 400), seed=rng.randrange(6)), params


async def one_by_one(
    client: AsyncClient, requests: list[tuple[str, SamplingParams]]
) -> list[tuple[object, ...]]:
    results = [await client.generate([prompt], params) for prompt, params in requests]
    return essence([each for completions in results for each in completions])


async def test_32_concurrent_requests_equal_the_same_ones_one_by_one(redis_url: str) -> None:
    requests = list(mixed_requests(32))
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        expected = await one_by_one(engine, requests)
    async with running(redis_url) as cluster, cluster.client() as client:
        found = await client.generate([p for p, _ in requests], [s for _, s in requests])
        assert essence(found) == expected
        assert await one_by_one(client, requests) == expected


async def test_preempted_sequences_give_the_same_tokens(redis_url: str) -> None:
    requests = [(text(100, seed=i), SamplingParams(seed=i, max_tokens=120)) for i in range(8)]
    requests = [
        (p, SamplingParams(seed=s.seed, max_tokens=120, ignore_eos=True)) for p, s in requests
    ]
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        expected = await one_by_one(engine, requests)
    async with (
        running(redis_url, decode={"pool_tokens": 640}) as cluster,
        cluster.client() as client,
    ):
        found = await client.generate([p for p, _ in requests], [s for _, s in requests])
    assert essence(found) == expected
    assert sum(each.usage.preemptions for each in found) > 0


@pytest.mark.parametrize("chunk", [16, 37, 128, 512])
async def test_the_size_of_chunks_changes_nothing(redis_url: str, chunk: int) -> None:
    prompt, params = text(700), SamplingParams(temperature=0, max_tokens=10, logprobs=3)
    expected = await local(prompt, params, limits=SchedulerLimits(max_step_tokens=1024))
    limits = {"chunk_tokens": chunk, "max_step_tokens": 512}
    async with running(redis_url, **limits) as cluster, cluster.client() as client:
        found = await client.generate([prompt], params)
        assert cluster.prefill[0].model.num_steps >= 700 // chunk
    assert essence(found) == essence(expected)


async def test_a_prefix_hit_gives_what_a_cold_start_gives(redis_url: str) -> None:
    prefix, params = text(256), SamplingParams(temperature=1.0, seed=2, max_tokens=25)
    prompt = prefix + text(90, seed=1)
    expected = await local(prompt, params)
    async with running(redis_url) as cluster, cluster.client() as client:
        await client.generate([prefix + "other"], SamplingParams(temperature=0, max_tokens=2))
        found = await client.generate([prompt], params)
        again = await client.generate([prompt], params)
    assert essence(found) == essence(again) == essence(expected)
    assert found[0].usage.cached_tokens == 256
    assert found[0].usage.handed_over_tokens == 345 - 256
    assert again[0].prefilled == "cached"


async def test_tenants_do_not_share_their_pages(redis_url: str) -> None:
    prompt, params = text(200), SamplingParams(temperature=0, max_tokens=2)
    async with running(redis_url) as cluster:
        async with cluster.client(tenant="one") as client:
            await client.generate([prompt], params)
        async with cluster.client(tenant="two") as client:
            found = await client.generate([prompt], params)
    assert found[0].usage.cached_tokens == 0


async def test_several_prompts_are_in_one_step_of_the_prefill_service(redis_url: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    async with running(redis_url, max_step_tokens=512) as cluster, cluster.client() as client:
        model = cluster.prefill[0].model
        model.gate.clear()
        work = asyncio.create_task(client.generate([text(100, seed=i) for i in range(5)], params))
        await until(lambda: cluster.prefill[0].worker.queued_tokens() == 500)
        model.gate.set()
        await work
        assert model.num_steps <= 3


async def test_two_decode_services_share_a_prefill_service(redis_url: str) -> None:
    prompts = [text(150, seed=i) for i in range(6)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=20)
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        expected = await engine.generate(prompts, params)
    async with running(redis_url, num_decode=2) as cluster, cluster.client() as client:
        found = await client.generate(prompts, params)
        assert all(node.model.num_steps for node in cluster.nodes)
        peers = (await client.model()).peers
        assert {peer.endpoint for peer in peers} < {node.endpoint for node in cluster.decode}
    assert essence(found) == essence(expected)


async def test_the_page_index_names_the_pages_both_services_hold(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        await client.generate([text(200)], SamplingParams(temperature=0, max_tokens=2))
        for node in cluster.nodes:
            await node.worker._registration.beat(all_pages=True)
        core = cluster.decode[0].core
        names = core._hasher("").full_pages(tuple(text(200).encode()[:199]))
        holders = await cluster.decode[0].worker.index.lookup(core.fingerprint.digest.hex(), names)
        assert len(holders) == 12
        boots = {node.worker.boot_id.hex() for node in cluster.nodes}
        assert all(each == boots for each in holders)


@pytest.mark.parametrize("where", ["local", "remote"])
async def test_a_stream_brings_the_deltas_that_add_up_to_the_completion(
    redis_url: str, where: str
) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30)
    async with running(redis_url, num_prefill=0) as cluster, cluster.client() as remote:
        async with AsyncLocalEngine("hash", page_size=16) as engine:
            client: AsyncClient = remote if where == "remote" else engine
            (whole,) = await client.generate([text(50)], params)
            deltas = [delta async for delta in client.stream(text(50), params)]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == whole.token_ids
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [whole.finish_reason]
    assert [delta.first_index for delta in deltas] == list(range(len(deltas)))

"""A stream resumed from its prompt and the tokens it has = the same stream unbroken."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from engine.client import AsyncClient
from engine.completion import Delta, Finished, Started, StreamItem
from engine.errors import InvalidRequest
from engine.finish import FinishReason
from engine.local import AsyncLocalEngine
from engine.resume import ChoiceSoFar
from engine.sampling_params import SamplingParams
from kvstore.ledger import PageState
from tests.integration.cluster import running
from tests.integration.streams import KINDS, PROMPT, collected, deltas_of, essence

SAMPLED = SamplingParams(temperature=1.0, seed=1, max_tokens=8, n=2)


@asynccontextmanager
async def client_of(where: str, redis_url: str) -> AsyncIterator[AsyncClient]:
    if where == "local":
        async with AsyncLocalEngine("hash", page_size=16, check_pages=True) as engine:
            yield engine
            pool = engine.engine.core.pool
            assert pool.ledger.count(PageState.FREE) + pool.num_idle == pool.num_pages
    else:
        async with running(redis_url) as cluster, cluster.client() as client:
            yield client


async def all_of(
    client: AsyncClient,
    params: SamplingParams,
    resume: list[ChoiceSoFar] | None = None,
    prompt: list[int] | None = None,
) -> list[StreamItem]:
    return [item async for item in client.items(prompt or PROMPT, params, resume or ())]


@pytest.mark.parametrize("kind", KINDS)
async def test_resumed_at_every_token_index_a_stream_goes_on_as_unbroken(
    redis_url: str, kind: str
) -> None:
    """In one process; ``test_failover`` has the same over two services."""
    params = KINDS[kind]
    async with client_of("local", redis_url) as client:
        unbroken = await all_of(client, params)
        whole = collected(unbroken, params).completions()
        assert len(unbroken) > 10
        for cut in range(1, len(unbroken)):
            before = collected(unbroken[:cut], params)
            after = await all_of(client, params, before.so_far())
            for choice in range(params.n):
                expected = deltas_of(unbroken[cut:], choice)
                assert deltas_of(after, choice) == expected, f"cut before item {cut}"
            for item in after:
                before.add(item)
            assert essence(before.completions()) == essence(whole)
            finished = after[-1]
            assert isinstance(finished, Finished)
            assert finished.usage.output_tokens == sum(len(each.token_ids) for each in whole)
            assert finished.usage.resumed_tokens == sum(
                isinstance(item, Delta) for item in unbroken[:cut]
            )


async def test_a_long_resumed_output_is_prefilled_by_the_prefill_service(redis_url: str) -> None:
    params = SamplingParams(temperature=1.0, seed=4, ignore_eos=True, max_tokens=300)
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        unbroken = await all_of(engine, params)
    async with running(redis_url) as cluster, cluster.client() as client:
        resume = collected(unbroken[:250], params).so_far()
        after = await all_of(client, params, resume)
    assert deltas_of(after, 0) == deltas_of(unbroken[250:], 0)
    finished = after[-1]
    assert isinstance(finished, Finished)
    assert finished.prefilled == "remote"
    assert finished.usage.handed_over_tokens == len(PROMPT) + 249 - 1


async def test_choices_that_have_ended_or_not_begun_may_be_among_the_resumed(
    redis_url: str,
) -> None:
    """The first choice is over, so another one leads; a third has no token yet."""
    params = replace(SAMPLED, n=3, max_tokens=12)
    async with running(redis_url) as cluster, cluster.client() as client:
        unbroken = await all_of(client, params)
        ids = [tuple(d.token_ids[0] for d in deltas_of(unbroken, choice)) for choice in range(3)]
        resume = [ChoiceSoFar(2, ids[2][:5]), ChoiceSoFar(0, ids[0], finished=True)]
        after = await all_of(client, params, resume)
    assert deltas_of(after, 0) == []
    assert deltas_of(after, 1) == deltas_of(unbroken, 1)
    assert deltas_of(after, 2) == deltas_of(unbroken, 2)[5:]


async def test_started_tells_what_another_worker_needs_to_go_on(redis_url: str) -> None:
    async with running(redis_url, num_decode=2) as cluster, cluster.client() as client:
        first, second = [(await all_of(client, SAMPLED))[0] for _ in range(2)]
    assert isinstance(first, Started)
    assert isinstance(second, Started)
    assert first.boot_id != second.boot_id
    assert first.numerics_digest == second.numerics_digest
    assert len(first.numerics_digest) == 16
    assert first.max_tokens == 8


WRONG = {
    "an index out of range": ([ChoiceSoFar(2)], "resume[0].choice_index"),
    "an index twice": ([ChoiceSoFar(1), ChoiceSoFar(1)], "resume[1].choice_index"),
    "an id out of the vocabulary": ([ChoiceSoFar(0, (1, 999_999))], "resume[0].token_ids"),
    "more than max_tokens": ([ChoiceSoFar(0, (65,) * 9)], "resume[0].token_ids"),
    "tokens after the end": ([ChoiceSoFar(0, (65, 66, 67))], "resume[0].token_ids"),
    "an end that is not told": ([ChoiceSoFar(0), ChoiceSoFar(1, (65, 66))], "resume[1].finished"),
    "an end that is none": ([ChoiceSoFar(0, (65, 65), finished=True)], "resume[0].finished"),
    "an end before the first token": ([ChoiceSoFar(0, (), finished=True)], "resume[0].finished"),
    "all tokens and no end": ([ChoiceSoFar(0, (65,) * 8)], "resume[0].finished"),
}


@pytest.mark.parametrize("where", ["local", "remote"])
async def test_what_no_stream_can_be_is_refused_by_field(redis_url: str, where: str) -> None:
    params = replace(SAMPLED, stop_token_ids=(66,))
    async with client_of(where, redis_url) as client:
        for name, (resume, field) in WRONG.items():
            with pytest.raises(InvalidRequest) as caught:
                await all_of(client, params, resume)
            assert caught.value.field == field, name
        items = await all_of(client, params)
        assert isinstance(items[-1], Finished)


@pytest.mark.parametrize("where", ["local", "remote"])
async def test_a_sampled_stream_is_not_resumed_without_its_seed(redis_url: str, where: str) -> None:
    resume = [ChoiceSoFar(0, (65,))]
    async with client_of(where, redis_url) as client:
        with pytest.raises(InvalidRequest) as caught:
            await all_of(client, replace(SAMPLED, seed=None), resume)
        assert caught.value.field == "seed"
        greedy = SamplingParams(temperature=0, max_tokens=3)
        assert isinstance((await all_of(client, greedy, resume))[-1], Finished)


async def test_a_stream_resumed_after_its_last_token_tells_only_that_it_is_over(
    redis_url: str,
) -> None:
    ended = [ChoiceSoFar(index, (65,) * 8, finished=True) for index in range(2)]
    async with running(redis_url) as cluster, cluster.client() as client:
        started, finished = await all_of(client, SAMPLED, ended)
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert finished.usage.output_tokens == finished.usage.resumed_tokens == 16
    assert min(finished.timings.queue_s, finished.timings.first_token_s) == 0


async def test_a_resumed_sequence_that_is_preempted_gives_the_same_tokens(redis_url: str) -> None:
    """Four streams in a pool for two: resumed tokens are computed again like any others."""
    params = SamplingParams(temperature=1.0, seed=8, n=4, ignore_eos=True, max_tokens=120)
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        unbroken = await all_of(engine, params)
    resume = collected(unbroken[:200], params).so_far()
    async with running(redis_url, decode={"pool_tokens": 480}) as cluster:
        async with cluster.client() as client:
            after = await all_of(client, params, resume)
    for choice in range(4):
        assert deltas_of(after, choice) == deltas_of(unbroken[200:], choice)
    finished = after[-1]
    assert isinstance(finished, Finished)
    assert finished.usage.preemptions > 0
    assert all(d.finish_reason in (None, FinishReason.LENGTH) for d in deltas_of(after, 0))

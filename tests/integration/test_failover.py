"""A client continues the stream of a lost worker on another one; its caller notices nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import pytest
import torch

from decode_svc import servicer
from decode_svc.servicer import InferenceServicer
from engine.completion import Delta, Finished, Started, StreamItem
from engine.errors import DeadlineExceeded, EngineFault, PeerUnavailable, RequestCancelled
from engine.local import AsyncLocalEngine
from engine.mailbox import AsyncEngine
from engine.remote import AsyncRemoteEngine
from engine.sampling_params import SamplingParams
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch, Said
from quire.v1 import inference_pb2 as pb
from tests.faults.link import Link
from tests.integration.cluster import Node, keep_silent_connections, running, until
from tests.integration.streams import KINDS, PROMPT, collected, deltas_of, essence

LONG = SamplingParams(temperature=1.0, seed=2, ignore_eos=True, max_tokens=60)


@dataclass
class Hold:
    """Lets workers send so many deltas of their next stream and then nothing, until told."""

    after: dict[AsyncEngine, int] = field(default_factory=dict)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    num_released: int = 0

    def at(self, node: Node, num_deltas: int) -> None:
        self.after[node.worker.engine] = num_deltas

    def wrap(self, generate: Callable[..., AsyncGenerator[pb.GenerateResponse]]) -> object:
        async def held(
            servicer: InferenceServicer, *call: object
        ) -> AsyncIterator[pb.GenerateResponse]:
            left = self.after.pop(servicer._engine, None)
            async with aclosing(generate(servicer, *call)) as responses:
                async for response in responses:
                    is_delta = response.HasField("delta")
                    if left == 0 and (is_delta or response.HasField("finished")):
                        await self.release.wait()
                        self.num_released += 1
                    if left is not None and is_delta:
                        left -= 1
                    yield response

        return held


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Hold:
    """With it only the tests end connections."""
    keep_silent_connections(monkeypatch)
    hold = Hold()
    monkeypatch.setattr(InferenceServicer, "_generate", hold.wrap(InferenceServicer._generate))
    return hold


async def unbroken(params: SamplingParams) -> list[StreamItem]:
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        return [item async for item in engine.items(PROMPT, params)]


def check_same(found: list[StreamItem], expected: list[StreamItem], params: SamplingParams) -> None:
    """The same items, as far as a caller can tell."""
    for choice in range(params.n):
        assert deltas_of(found, choice) == deltas_of(expected, choice)
    assert [type(item) for item in found].count(Started) == 1
    assert isinstance(found[0], Started)
    assert isinstance(found[-1], Finished)
    whole, other = (collected(items, params).completions() for items in (found, expected))
    assert essence(whole) == essence(other)
    assert whole[0].prompt_ids == other[0].prompt_ids
    assert whole[0].usage.output_tokens == other[0].usage.output_tokens


def link_to(node: Node) -> Link:
    return Link(int(node.endpoint.rpartition(":")[2]))


@pytest.mark.parametrize("kind", KINDS)
async def test_cut_at_every_token_index_a_stream_goes_on_as_unbroken(
    redis_url: str, kind: str, hold: Hold
) -> None:
    """The connection is reset when the caller has so many tokens and no more are on their way."""
    params = KINDS[kind]
    expected = await unbroken(params)
    async with running(redis_url, num_decode=2) as cluster:
        doomed, heir = cluster.decode
        async with link_to(doomed) as proxy:
            for cut in range(len(expected) - 1):
                hold.at(doomed, cut)
                async with AsyncRemoteEngine([proxy.endpoint, heir.endpoint], idle_s=30) as client:
                    found = []
                    async for item in client.items(PROMPT, params):
                        found.append(item)
                        if len(found) == cut + 1:
                            await proxy.reset()
                check_same(found, expected, params)
                finished = found[-1]
                assert isinstance(finished, Finished)
                assert finished.usage.resumed_tokens == cut


async def test_two_workers_lost_one_after_the_other_cost_a_stream_nothing(
    redis_url: str, hold: Hold
) -> None:
    expected = await unbroken(LONG)
    async with running(redis_url, num_decode=3) as cluster:
        one, two, three = cluster.decode
        hold.at(one, 20)
        hold.at(two, 15)
        async with link_to(one) as first, link_to(two) as second:
            endpoints = [first.endpoint, second.endpoint, three.endpoint]
            async with AsyncRemoteEngine(endpoints, idle_s=30) as client:
                found = []
                async for item in client.items(PROMPT, LONG):
                    found.append(item)
                    if len(found) == 21:
                        await first.refuse()
                    if len(found) == 36:
                        await second.reset()
        assert three.model.num_steps
    check_same(found, expected, LONG)


async def test_a_client_of_one_endpoint_learns_of_the_others(redis_url: str, hold: Hold) -> None:
    expected = await unbroken(LONG)
    async with running(redis_url, num_decode=2) as cluster:
        hold.at(cluster.decode[0], 20)
        async with link_to(cluster.decode[0]) as proxy:
            async with AsyncRemoteEngine([proxy.endpoint], idle_s=30) as client:
                found = []
                async for item in client.items(PROMPT, LONG):
                    found.append(item)
                    if len(found) == 21:
                        await until(lambda: cluster.decode[1].endpoint in client._endpoints.known)
                        await proxy.refuse()
    check_same(found, expected, LONG)


async def test_with_no_worker_left_the_caller_hears_why_the_stream_broke(
    redis_url: str, hold: Hold
) -> None:
    async with running(redis_url) as cluster:
        hold.at(cluster.decode[0], 20)
        async with link_to(cluster.decode[0]) as proxy:
            async with AsyncRemoteEngine([proxy.endpoint], patience_s=0.2, idle_s=30) as client:
                items = client.items(PROMPT, LONG)
                found = [await anext(items) for _ in range(21)]
                client._endpoints.learn = lambda endpoints: None  # type: ignore[method-assign]
                await proxy.refuse()
                with pytest.raises(PeerUnavailable, match="no worker continues the stream"):
                    await anext(items)
    assert [type(item) for item in found] == [Started] + [Delta] * 20


async def test_a_worker_of_other_numerics_does_not_continue_a_stream(
    redis_url: str, hold: Hold
) -> None:
    async with running(redis_url, num_prefill=0, num_decode=2) as cluster:
        hold.at(cluster.decode[0], 20)
        first, other = cluster.decode
        other.core.fingerprint = replace(other.core.fingerprint, numerics="hash/other/1")
        async with link_to(first) as proxy:
            endpoints = [proxy.endpoint, other.endpoint]
            async with AsyncRemoteEngine(endpoints, patience_s=0.2, idle_s=30) as client:
                items = client.items(PROMPT, LONG)
                for _ in range(21):
                    await anext(items)
                await proxy.refuse()
                digest = other.core.fingerprint.numerics_digest.hex()
                with pytest.raises(PeerUnavailable, match=f"its numerics are {digest}, not "):
                    await anext(items)


async def test_a_silent_worker_is_given_up_and_what_it_sends_later_is_not_heard(
    redis_url: str, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection stands, its event loop hangs; later it goes on as if nothing had been."""
    monkeypatch.setattr(servicer, "WAITING_EVERY_S", 60.0)
    expected = await unbroken(LONG)
    async with running(redis_url, num_decode=2) as cluster:
        hold.at(cluster.decode[0], 20)
        async with cluster.client(idle_s=1.0) as client:
            found = []
            async for item in client.items(PROMPT, LONG):
                found.append(item)
                if len(found) == 30:
                    hold.release.set()
        check_same(found, expected, LONG)
    assert hold.num_released <= 1, "the old attempt was cancelled, not heard out"


async def test_a_request_that_waits_for_its_turn_is_not_given_up(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "WAITING_EVERY_S", 0.05)
    expected = await unbroken(LONG)
    async with running(redis_url, num_decode=2) as cluster:
        first, second = cluster.decode
        first.model.gate.clear()
        async with cluster.client(idle_s=1.0) as client:
            work = asyncio.create_task(_all(client, LONG))
            await until(lambda: first.core.scheduler.num_sequences > 0)
            await asyncio.sleep(2.0)  # longer than the idle limit: the time itself is tested
            assert not second.model.num_steps
            first.model.gate.set()
            check_same(await work, expected, LONG)


async def _all(client: AsyncRemoteEngine, params: SamplingParams) -> list[StreamItem]:
    return [item async for item in client.items(PROMPT, params)]


async def test_a_full_worker_sends_its_requests_to_another(redis_url: str) -> None:
    expected = await unbroken(LONG)
    async with running(redis_url, num_decode=2, decode={"max_requests": 1}) as cluster:
        first, _ = cluster.decode
        first.model.gate.clear()
        async with AsyncRemoteEngine([first.endpoint], idle_s=30) as other:
            busy = asyncio.create_task(_all(other, LONG))
            await until(lambda: first.core.scheduler.num_sequences > 0)
            async with cluster.client() as client:
                for _ in range(2):
                    check_same(await _all(client, LONG), expected, LONG)
            first.model.gate.set()
            await busy


async def test_the_deadline_is_the_callers_over_all_workers(redis_url: str, hold: Hold) -> None:
    async with running(redis_url, num_decode=2) as cluster:
        for node in cluster.decode:
            hold.at(node, 5)
        async with link_to(cluster.decode[0]) as proxy:
            endpoints = [proxy.endpoint, cluster.decode[1].endpoint]
            loop = asyncio.get_running_loop()
            began = loop.time()
            async with AsyncRemoteEngine(endpoints, timeout_s=2.0, idle_s=30) as client:
                items = client.items(PROMPT, LONG)
                for _ in range(6):
                    await anext(items)
                await asyncio.sleep(1.0)  # half of the time itself is what is tested
                await proxy.reset()
                with pytest.raises(DeadlineExceeded):
                    async for _ in items:
                        pass
            assert loop.time() - began < 3.0


async def test_a_worker_whose_engine_breaks_down_loses_no_stream(
    redis_url: str, hold: Hold
) -> None:
    expected = await unbroken(LONG)
    async with running(redis_url, num_decode=2) as cluster:
        hold.at(cluster.decode[0], 20)
        first, _ = cluster.decode
        async with cluster.client(idle_s=30) as client:
            found = []
            async for item in client.items(PROMPT, LONG):
                found.append(item)
                if len(found) == 21:
                    first.worker.engine._fail_all()
                    hold.release.set()
        check_same(found, expected, LONG)
        cluster.decode.remove(first)
        await first.task


async def test_at_the_bound_of_a_drain_running_streams_are_handed_to_another_worker(
    redis_url: str,
) -> None:
    params = replace(LONG, max_tokens=300)
    expected = await unbroken(params)
    async with running(redis_url, num_decode=2, drain_s=0.2) as cluster:
        leaving, _ = cluster.decode
        async with cluster.client(idle_s=30) as client:
            found = []
            async for item in client.items(PROMPT, params):
                found.append(item)
                if len(found) == 21:
                    leaving.model.gate.clear()  # it cannot finish in time
                    leaving.stop.set()
        check_same(found, expected, params)
        finished = found[-1]
        assert isinstance(finished, Finished)
        assert finished.usage.resumed_tokens >= 20
        cluster.decode.remove(leaving)
        await leaving.close()


async def test_a_draining_worker_sends_new_requests_elsewhere(redis_url: str, hold: Hold) -> None:
    expected = await unbroken(LONG)
    async with running(redis_url, num_decode=2, drain_s=60.0) as cluster:
        hold.at(cluster.decode[0], 20)
        leaving, _ = cluster.decode
        async with cluster.client(idle_s=30) as client:
            old = client.items(PROMPT, LONG)
            begun = [await anext(old) for _ in range(21)]
            leaving.stop.set()
            await until(lambda: leaving.worker.state == "draining")
            for _ in range(2):
                check_same(await _all(client, LONG), expected, LONG)
            hold.release.set()
            check_same([*begun, *[item async for item in old]], expected, LONG)
            cluster.decode.remove(leaving)
            await leaving.task


async def test_a_draining_prefill_service_stays_until_what_it_granted_has_landed(
    redis_url: str,
) -> None:
    expected = await unbroken(LONG)
    async with running(redis_url, drain_s=60.0) as cluster, cluster.client(idle_s=30) as client:
        leaving = cluster.prefill.pop()
        leaving.model.gate.clear()
        work = asyncio.create_task(_all(client, LONG))
        await until(lambda: leaving.core.scheduler.num_sequences > 0)
        leaving.stop.set()
        await until(lambda: leaving.worker.state == "draining")
        late = asyncio.create_task(_all(client, replace(LONG, max_tokens=2)))
        finished = (await late)[-1]
        assert isinstance(finished, Finished)
        assert finished.prefilled == "local"
        assert not leaving.task.done()
        leaving.model.gate.set()
        found = await work
        check_same(found, expected, LONG)
        last = found[-1]
        assert isinstance(last, Finished)
        assert last.prefilled == "remote"
        await leaving.task


class Crash(BaseException):
    """What no guard around one request catches: the engine's loop ends, and its process with it."""


async def test_a_request_that_brings_two_workers_down_is_not_tried_on_a_third(
    redis_url: str,
) -> None:
    async with running(redis_url, num_decode=3, num_prefill=0) as cluster:
        third = cluster.decode[2]
        for node in cluster.decode:
            _crash_on(node, token=77)
        async with cluster.client(idle_s=30) as client:
            with pytest.raises(EngineFault, match="two workers died at token 0"):
                await client.generate([[76, 77, 78]], LONG)
            assert not third.model.num_steps
            others = replace(LONG, banned_token_ids=(77,))
            check_same(await _all(client, others), await unbroken(others), others)
        for node in (cluster.decode.pop(0), cluster.decode.pop(0)):
            await node.task
            assert node.worker.broken


def _crash_on(node: Node, token: int) -> None:
    forward = node.model.forward

    def crashing(batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        if bool((batch.token_ids == token).any()):
            raise Crash
        return forward(batch, kv, layout)

    node.model.forward = crashing  # type: ignore[method-assign]


async def test_a_client_closed_under_its_stream_looks_no_further(redis_url: str) -> None:
    async with running(redis_url, num_decode=2) as cluster:
        client = cluster.client(idle_s=30)
        items = client.items(PROMPT, replace(LONG, max_tokens=1000))
        await anext(items)
        await client.close()
        with pytest.raises(RequestCancelled):
            async for _ in items:
                pass

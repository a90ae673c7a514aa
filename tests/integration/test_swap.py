"""Swap with the real model and in real services: other sequences notice nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.core import CoreSettings, EngineCore
from engine.generation import GenerateTask
from engine.local import AsyncLocalEngine
from engine.model.load import load_model
from engine.outputs import Output, TokenOutput
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits
from engine.serving.admin import swapped_pages
from quire.v1 import admin_pb2 as pb
from quire.v1 import admin_pb2_grpc
from tests.integration.cluster import Node, running

LIMITS = SchedulerLimits(max_sequences=4, max_step_tokens=64, chunk_tokens=32)
PROMPTS = [[100 * n + i for i in range(40)] for n in range(1, 5)]


def tasks(max_tokens: int) -> list[GenerateTask]:
    params = SamplingParams(temperature=0.8, seed=3, ignore_eos=True)
    return [
        GenerateTask(f"s{n}", tuple(prompt), params, 3, max_tokens)
        for n, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("mode", ["fp32/fp32", "int8/int8"])
def test_smollm2_brings_the_tokens_of_an_undisturbed_engine_after_a_swap(mode: str) -> None:
    weights, kv = mode.split("/")
    loaded = load_model("smollm2", weights=weights, kv=kv)
    page_bytes = loaded.model.spec.page_layout(16).page_bytes

    def run(num_pages: int, swap_bytes: int) -> tuple[dict[str, list[int]], EngineCore]:
        settings = CoreSettings(num_pages, 16, LIMITS, check_pages=True, swap_bytes=swap_bytes)
        core = EngineCore(loaded.model, loaded.tokenizer.token_bytes, settings, bytes(16))
        core.submit(tasks(40))
        outputs: list[Output] = []
        while core.step(outputs.extend) or core.scheduler.num_sequences:
            pass
        tokens: dict[str, list[int]] = {}
        for output in outputs:
            if isinstance(output, TokenOutput):
                tokens.setdefault(output.name, []).append(output.token_id)
        return tokens, core

    undisturbed, _ = run(40, 0)
    swapped, core = run(16, 40 * page_bytes)
    assert core.totals.swapped_in > 0
    assert core.totals.swap_lost == 0
    assert swapped == undisturbed


def test_swapped_pages_are_listed_with_their_owner() -> None:
    loaded = load_model("hash")
    settings = CoreSettings(14, 16, LIMITS, check_pages=True, swap_bytes=1 << 20)
    core = EngineCore(loaded.model, loaded.tokenizer.token_bytes, settings, bytes(16))
    core.submit(tasks(60))
    while not core.scheduler.swap.num_held:
        assert core.step(lambda outputs: None)
    swapped = swapped_pages(core)
    assert len(swapped) == core.scheduler.swap.num_held
    assert {owner for page in swapped for owner in page.owners} <= {"s0", "s1", "s2", "s3"}
    assert all(page.owners for page in swapped)
    assert all("swapped out" in page.reason for page in swapped)


async def test_services_swap_to_a_file_and_count_it(redis_url: str, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=60, ignore_eos=True)
    prompts = [[number % 250 for number in prompt] for prompt in PROMPTS]
    async with AsyncLocalEngine("hash", page_size=16, pool_tokens=4096) as local:
        expected = await local.generate(prompts, params)
    swap = {"pool_tokens": 224, "swap_bytes": 1 << 20, "swap_dir": tmp_path}
    async with running(redis_url, decode=swap) as cluster, cluster.client() as client:
        found = await client.generate(prompts, params)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        node = cluster.decode[0]
        registry = node.worker.metrics.registry
        assert registry.get_sample_value("quire_swapped_out_total") > 0  # type: ignore[operator]
        assert registry.get_sample_value("quire_pages", {"state": "swapped"}) == 0
        streams = [client.stream(prompt, params) for prompt in prompts]
        await asyncio.gather(*[anext(stream) for stream in streams])
        await asyncio.gather(*[stream.aclose() for stream in streams])
        await cluster.balanced()
        assert node.core.scheduler.swap.num_held == 0


async def test_operators_see_whose_swapped_pages_nobody_frees(redis_url: str) -> None:
    """And the check of the books finds swap slots that are lost."""
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=60, ignore_eos=True)
    # The check at every step would end the process at the first wrong book.
    swap = {"pool_tokens": 224, "swap_bytes": 1 << 20, "check_pages": False}
    async with running(redis_url, num_prefill=0, decode=swap) as cluster:
        (node,) = cluster.decode
        async with cluster.client() as client, node_admin(node) as admin:
            assert list((await admin.CheckPages(pb.CheckPagesRequest())).problems) == []
            await node.worker.engine.call(lambda core: core.scheduler.swap.hold("stray", 1))
            checked = await admin.CheckPages(pb.CheckPagesRequest())
            assert ["stray" in problem for problem in checked.problems] == [True]
            listed = await admin.ListPages(pb.ListPagesRequest())
            (page,) = [page for page in listed.pages if page.state == "swapped"]
            assert "whom nobody answers for" in page.orphan
            await node.worker.engine.call(lambda core: core.scheduler.swap.free("stray"))
            prompts = [[number % 250 for number in prompt] for prompt in PROMPTS]
            work = asyncio.create_task(client.generate(prompts, params))
            while not work.done():
                listed = await admin.ListPages(pb.ListPagesRequest())
                assert not any(page.orphan for page in listed.pages)
                assert not (await admin.CheckPages(pb.CheckPagesRequest())).problems
            await work
            assert node.core.totals.swapped_out > 0


@asynccontextmanager
async def node_admin(node: Node) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(node.endpoint) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)

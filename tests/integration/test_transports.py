"""Pages by every transport: the same tokens, and one clear failure where something is wrong."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.telemetry.trace_tree import read_spans
from kernels.layout import PageLayout
from kvstore.page import PageFrame
from kvstore.shared_pool import SharedPool
from kvstore.transports import shm
from kvstore.transports.choice import problem_of
from prefill_svc import servicer
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings
from quire.v1 import pages_pb2
from tests.integration.cluster import Cluster, Node, running, settings_for, start, until
from tests.integration.test_faults import LONG, PARAMS, expected_tokens, failures

ROOT = Path(__file__).parents[2]
LAYOUT = PageLayout(num_layers=6, num_kv_heads=1, head_dim=16, page_size=16)
OWNER = b"o" * 16


@pytest.mark.parametrize("transport", ["grpc", "shm"])
async def test_every_transport_brings_the_same_tokens(redis_url: str, transport: str) -> None:
    async with running(redis_url, transports=(transport,)) as cluster, cluster.client() as client:
        (found,) = await client.generate([LONG], PARAMS)
        assert found.prefilled == "remote"
        assert found.token_ids == await expected_tokens()
        assert moved(cluster.prefill[0]) == moved(cluster.decode[0])
        assert moved(cluster.decode[0]).keys() == {transport}


async def test_nixl_brings_the_same_tokens_or_is_refused_with_the_reason(redis_url: str) -> None:
    problem = problem_of("nixl")
    if problem is not None:
        settings = PrefillSettings(**settings_for(redis_url, transports=("nixl",)))
        with pytest.raises(InvalidRequest, match="transports: NIXL cannot be loaded"):
            await start(PrefillWorker, settings)
        return
    async with running(redis_url, transports=("nixl",)) as cluster, cluster.client() as client:
        (found,) = await client.generate([LONG], PARAMS)
        assert found.prefilled == "remote", failures(cluster)
        assert found.token_ids == await expected_tokens()
        assert moved(cluster.decode[0]).keys() == {"nixl"}


async def test_a_transport_whose_library_is_missing_is_refused_by_name_with_the_reason(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    assert "NIXL cannot be loaded" in str(problem_of("nixl"))
    settings = PrefillSettings(**settings_for(redis_url, transports=("nixl", "grpc")))
    with pytest.raises(InvalidRequest, match="transports: NIXL cannot be loaded"):
        await start(PrefillWorker, settings)


def moved(node: Node) -> dict[str, float]:
    """Bytes by transport, as the service counts them."""
    (family,) = node.worker.metrics.handover_bytes.collect()
    totals = [sample for sample in family.samples if sample.name.endswith("_total")]
    return {sample.labels["transport"]: sample.value for sample in totals}


@pytest.mark.parametrize(
    ("prefill", "decode", "used"),
    [
        (("auto",), ("auto",), "shm"),
        (("auto",), ("grpc", "shm"), "grpc"),
        (("grpc",), ("auto",), "grpc"),
        (("shm", "grpc"), ("grpc",), "grpc"),
    ],
)
async def test_the_receivers_first_way_that_the_owner_has_is_taken(
    redis_url: str, prefill: tuple[str, ...], decode: tuple[str, ...], used: str
) -> None:
    async with running(
        redis_url, prefill={"transports": prefill}, decode={"transports": decode}
    ) as cluster:
        async with cluster.client() as client:
            (found,) = await client.generate([LONG], PARAMS)
        assert found.prefilled == "remote"
        assert moved(cluster.decode[0]).keys() == {used}


async def test_where_no_way_is_common_the_prompt_is_computed_here_and_the_log_says_why(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(
        redis_url, prefill={"transports": ("grpc",)}, decode={"transports": ("shm",)}
    ) as cluster:
        async with cluster.client() as client:
            (found,) = await client.generate([LONG], PARAMS)
        assert found.prefilled == "local"
        assert found.token_ids == await expected_tokens()
        assert failures(cluster) == {"invalid_argument": 1}
    (failed,) = [vars(each)["fields"] for each in caplog.records if "computed here" in each.message]
    assert "the receiver reads by shm, here is grpc" in str(failed["failure"])


async def test_a_receiver_on_another_host_is_not_offered_this_ones_memory(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        transports = cluster.decode[0].worker.transports
        transports._by_name["shm"].reach = b"elsewhere"  # type: ignore[misc]
        (found,) = await client.generate([LONG], PARAMS)
        assert found.prefilled == "remote"
        assert moved(cluster.decode[0]).keys() == {"grpc"}


async def test_the_trace_shows_every_layer_group_leaving_landing_and_what_was_exposed(
    redis_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "spans.jsonl"
    async with running(redis_url, trace_file=file) as cluster:
        async with cluster.client() as client:
            await client.generate([LONG], PARAMS)
        await until(lambda: any(span.name == "exposed" for span in read_spans(file)))
        metrics = cluster.decode[0].worker.metrics.registry
        exposed_s = metrics.get_sample_value("quire_handover_exposed_seconds_sum")
    spans = read_spans(file)
    for name in ("leave", "land"):
        seen = {
            (page, span.attributes["quire.layer_group"])
            for span in spans
            if span.name == name
            for page in range(
                span.attributes["quire.first_page"],
                span.attributes["quire.first_page"] + span.attributes["quire.pages"],
            )
        }
        assert seen == {(page, group) for page in range(38) for group in range(2)}, name
    (handover,) = [span for span in spans if span.name == "handover"]
    (exposed,) = [span for span in spans if span.name == "exposed"]
    assert handover.attributes["quire.transport"] == "shm"
    assert exposed.end_ns >= handover.end_ns
    assert exposed.duration_ns < handover.duration_ns
    assert exposed.duration_ns == pytest.approx(exposed_s * 1e9, abs=1000)


async def test_pages_leave_while_later_layers_are_computed(redis_url: str) -> None:
    """The last layer's computation waits until the first layer's pages have landed."""
    async with running(redis_url) as cluster, cluster.client() as client:
        progress = cluster.prefill[0].core.progress
        layer_done, landed = type(progress).layer_done, asyncio.Event()
        loop = asyncio.get_running_loop()

        def held(base: int, layer: int, num_layers: int) -> None:
            if layer == num_layers - 1 and not landed.is_set():
                asyncio.run_coroutine_threadsafe(landed.wait(), loop).result(60)
            layer_done(progress, base, layer, num_layers)

        progress.layer_done = held  # type: ignore[method-assign]
        work = asyncio.create_task(client.generate([LONG], PARAMS))
        await until(lambda: sum(moved(cluster.prefill[0]).values()) > 0)
        landed.set()
        (found,) = await work
        assert found.prefilled == "remote"
        assert found.token_ids == await expected_tokens()


def on_frame(
    monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[PageFrame], None]
) -> None:
    """Runs ``act`` once the numbered frame has its digest, before it is sent."""
    original = servicer.frame_to_wire
    seen: list[PageFrame] = []

    def acting(frame: PageFrame) -> pages_pb2.PageFrame:
        seen.append(frame)
        if len(seen) == number:
            act(frame)
        return original(frame)

    monkeypatch.setattr(servicer, "frame_to_wire", acting)


async def local_after(cluster: Cluster, reason: str) -> None:
    async with cluster.client() as client:
        (found,) = await client.generate([LONG], PARAMS)
    assert found.token_ids == await expected_tokens()
    assert found.prefilled == "local"
    assert failures(cluster) == {reason: 1}


async def test_bytes_that_were_damaged_in_the_shared_pool_are_never_used(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(redis_url, transports=("shm",)) as cluster:

        def damage(frame: PageFrame) -> None:
            memory = cluster.prefill[0].core.memory
            memory.group(frame.identity.reference.slot, frame.layer_group)[5] ^= 1

        on_frame(monkeypatch, 3, damage)
        await local_after(cluster, "digest")


async def test_a_page_that_moved_on_during_the_copy_is_never_used(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shm.copy_group
    async with running(redis_url, transports=("shm",)) as cluster:

        def copy_late(pool: SharedPool, slot: int, *rest: Any) -> None:
            copy(pool, slot, *rest)
            cluster.prefill[0].core.memory.generations[slot] += 1

        monkeypatch.setattr(shm, "copy_group", copy_late)
        await local_after(cluster, "generation")


async def test_a_reference_beyond_the_pool_is_refused(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = servicer.frame_to_wire

    def beyond(frame: PageFrame) -> pages_pb2.PageFrame:
        reference = replace(frame.identity.reference, slot=100_000)
        return original(replace(frame, identity=replace(frame.identity, reference=reference)))

    monkeypatch.setattr(servicer, "frame_to_wire", beyond)
    async with running(redis_url, transports=("shm",)) as cluster:
        await local_after(cluster, "slot")


async def test_a_pool_that_cannot_be_had_is_not_asked_for_again(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prompt is computed here, the next ones come another way."""
    monkeypatch.setattr("decode_svc.workers.AVOID_S", 0.0)
    async with running(redis_url) as cluster, cluster.client() as client:
        cluster.prefill[0].worker.transports._by_name["shm"].address = b"\0nobody"  # type: ignore[misc]
        prefilled = []
        for number in range(2):
            (found,) = await client.generate([[number, *LONG]], PARAMS)
            prefilled.append(found.prefilled)
        assert prefilled == ["local", "remote"]
        assert failures(cluster) == {"transport": 1, "landed": 1}

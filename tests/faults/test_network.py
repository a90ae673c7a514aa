"""The network between decode and prefill: slow, cut anywhere, corrupted, flapping, parted.

Both services run in this process, with a breakable link between them; the same tokens come out
whatever the link does, and every page comes back (``running`` looks at the end).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from decode_svc import workers
from engine import registration
from engine.client import AsyncClient
from engine.completion import Completion
from engine.sampling_params import SamplingParams
from kvstore.page import Commit
from prefill_svc import export
from tests.faults.fleet import fresh_prompt
from tests.faults.link import Flow, Link, free_port
from tests.faults.truth import Truth
from tests.integration.cluster import (
    Cluster,
    Node,
    eventually,
    keep_silent_connections,
    running,
    until,
)
from tests.integration.test_faults import failures

pytestmark = pytest.mark.asyncio(loop_scope="session")

PARAMS = SamplingParams(temperature=1.0, seed=1, max_tokens=4)
IDLE_S = 2.0  # longer than a busy prefill worker is silent
CUT_TOKENS = 40
FRAME_HEADER = 9


@asynccontextmanager
async def linked(redis_url: str, **settings: Any) -> AsyncIterator[tuple[Cluster, Link]]:
    """One prefill and one decode service, and the link that the pages cross."""
    async with await Link.to(free_port()) as link:
        prefill = {"port": link.target, "advertise_port": link.port, "lease_s": 1.0}
        decode = {"handover_idle_s": IDLE_S} | settings.pop("decode", {})
        prefill |= settings.pop("prefill", {})
        both = {"transports": ("grpc",)} | settings
        async with running(redis_url, prefill=prefill, decode=decode, **both) as cluster:
            yield cluster, link
            await link.heal()


@pytest.fixture(autouse=True)
def _forgive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request of these tests tries the prefill worker, whatever became of the last."""
    monkeypatch.setattr(workers, "AVOID_S", 0.0)


async def forget_connections(node: Node) -> None:
    """The decode service connects anew for its next handover."""
    known = node.worker._workers  # type: ignore[attr-defined]
    for peer in known._peers.values():
        await peer.close()
    known._peers.clear()


async def right(client: AsyncClient, truth: Truth, num_tokens: int = 100) -> Completion:
    """A fresh prompt's completion, checked."""
    prompt = fresh_prompt(num_tokens)
    (found,) = await client.generate([prompt], PARAMS)
    assert found.token_ids == await truth.tokens(prompt, PARAMS)
    return found


# -- slow


@pytest.mark.parametrize("way", ["to_server", "to_client", "both"])
async def test_latency_and_jitter_make_a_handover_slower_and_nothing_else(
    redis_url: str, truth: Truth, way: str
) -> None:
    async with linked(redis_url) as (cluster, link), cluster.client() as client:
        for name in ("to_server", "to_client") if way == "both" else (way,):
            flow: Flow = getattr(link, name)
            flow.delay_s, flow.jitter_s = 0.2, 0.1
        found = await right(client, truth, 300)
        assert found.prefilled == "remote"
        assert found.timings.prefill_s > 0.1


async def test_a_link_of_single_bytes_or_little_bandwidth_holds_up_nobody_else(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_silent_connections(monkeypatch)
    patient: dict[str, Any] = {"handover_idle_s": 60.0}
    async with linked(redis_url, decode=patient) as (cluster, link), cluster.client() as client:
        link.to_client.slice_bytes, link.to_client.bytes_per_s = 100, 2_000
        slow = asyncio.create_task(right(client, truth, 200))
        await until(lambda: link.to_client.num_bytes > 1_000)  # of 30,000
        for _ in range(5):
            prompt = fresh_prompt(16)[:12]
            (found,) = await client.generate([prompt], PARAMS)
            assert found.token_ids == await truth.tokens(prompt, PARAMS)
        assert not slow.done()
        link.to_client.slice_bytes, link.to_client.bytes_per_s = 1, None
        assert (await slow).prefilled == "remote", failures(cluster)
        assert (await right(client, truth, 40)).prefilled == "remote"


# -- cut


def frame_ends(recorded: bytes) -> list[int]:
    """Where HTTP/2 frames end in what a server sent."""
    ends, position = [], 0
    while position + FRAME_HEADER <= len(recorded):
        position += FRAME_HEADER + int.from_bytes(recorded[position : position + 3], "big")
        ends.append(position)
    return ends


async def one_recorded(cluster: Cluster, link: Link, client: AsyncClient, truth: Truth) -> bytes:
    """What the prefill service sends in one handover over a new connection."""
    await forget_connections(cluster.decode[0])
    link.to_client.record = bytearray()
    assert (await right(client, truth, CUT_TOKENS)).prefilled == "remote"
    recorded, link.to_client.record = bytes(link.to_client.record), None
    return recorded


async def test_a_connection_cut_at_any_frame_boundary_changes_no_token(
    redis_url: str, truth: Truth
) -> None:
    """After every HTTP/2 frame, and one byte before and after."""
    async with linked(redis_url) as (cluster, link), cluster.client() as client:
        recorded = await one_recorded(cluster, link, client, truth)
        ends = frame_ends(recorded)
        assert len(ends) > 6
        outcomes = []
        for cut in sorted({end + shift for end in ends for shift in (-1, 0, 1)}):
            await forget_connections(cluster.decode[0])
            link.to_client.cut_after = cut
            found = await right(client, truth, CUT_TOKENS)
            outcomes.append(found.prefilled)
            await link.heal()
        assert outcomes.count("local") >= len(ends)
        await forget_connections(cluster.decode[0])
        assert (await right(client, truth, CUT_TOKENS)).prefilled == "remote"
        assert failures(cluster).keys() <= {"landed", "unavailable", "cancelled", "silent"}


async def test_a_request_cut_anywhere_on_its_way_changes_no_token(
    redis_url: str, truth: Truth
) -> None:
    async with linked(redis_url) as (cluster, link), cluster.client() as client:
        await forget_connections(cluster.decode[0])
        before = link.to_server.num_bytes
        await right(client, truth, CUT_TOKENS)
        size = link.to_server.num_bytes - before
        for cut in random.Random(17).sample(range(1, size), 20):
            await forget_connections(cluster.decode[0])
            link.to_server.cut_after = cut
            await right(client, truth, CUT_TOKENS)
            await link.heal()
        await cluster.balanced()


async def test_a_reset_or_refusing_link_leaves_the_prompt_to_decode_at_once(
    redis_url: str, truth: Truth
) -> None:
    async with linked(redis_url) as (cluster, link), cluster.client() as client:
        assert (await right(client, truth)).prefilled == "remote"
        for break_it in (link.reset, link.refuse):
            cluster.prefill[0].model.gate.clear()
            work = asyncio.create_task(right(client, truth))
            await until(lambda: cluster.prefill[0].core.scheduler.num_sequences > 0)
            began = time.monotonic()
            await break_it()
            assert (await work).prefilled == "local"
            assert time.monotonic() - began < IDLE_S
            cluster.prefill[0].model.gate.set()
            await cluster.balanced()
            await link.heal()


@pytest.mark.parametrize("way", ["to_server", "to_client", "both"])
async def test_a_black_hole_in_a_handover_is_given_up_in_seconds(
    redis_url: str, truth: Truth, way: str
) -> None:
    """Half-open or dead in both directions: nothing arrives, nothing is refused."""
    async with linked(redis_url) as (cluster, link), cluster.client() as client:
        cluster.prefill[0].model.gate.clear()
        work = asyncio.create_task(right(client, truth))
        await until(lambda: cluster.prefill[0].core.scheduler.num_sequences > 0)
        for name in ("to_server", "to_client") if way == "both" else (way,):
            getattr(link, name).hold()
        began = time.monotonic()
        if way == "to_server":  # answers still come, until the other side hears no ping
            cluster.prefill[0].model.gate.set()
            assert (await work).prefilled == "remote"
        else:
            assert (await work).prefilled == "local"
            cluster.prefill[0].model.gate.set()
        assert time.monotonic() - began < 10
        await cluster.balanced()


async def test_after_a_black_hole_the_way_is_used_again_within_seconds(
    redis_url: str, truth: Truth
) -> None:
    """A connection being opened into a black hole is not waited for any longer than that."""
    async with linked(redis_url) as (cluster, link), cluster.client() as client:
        await forget_connections(cluster.decode[0])
        link.hold()
        assert (await right(client, truth)).prefilled == "local"
        await link.reset()
        await link.heal()
        began = time.monotonic()

        async def remote() -> bool:
            return (await right(client, truth)).prefilled == "remote"

        await eventually(remote)
        assert time.monotonic() - began < 10


# -- corrupted


async def test_a_byte_flipped_anywhere_in_flight_changes_no_token(
    redis_url: str, truth: Truth
) -> None:
    async with linked(redis_url) as (cluster, link), cluster.client() as client:
        size = len(await one_recorded(cluster, link, client, truth))
        flips = random.Random(21).sample(range(size), 30)
        for flip in flips:
            await forget_connections(cluster.decode[0])
            link.to_client.flip_at = flip
            await right(client, truth, CUT_TOKENS)
            await link.heal()
        counted = failures(cluster)
        assert counted["digest"] >= len(flips) // 2, counted
        await forget_connections(cluster.decode[0])
        assert (await right(client, truth, CUT_TOKENS)).prefilled == "remote"


Messages = list[export.Message]
GRPC = {"transports": ("grpc",)}
Tampering = Callable[[Messages, Messages], Messages]


async def one_frame_each(messages: AsyncIterator[export.Message]) -> Messages:
    """All of an export but its progress, every frame in a message of its own."""
    found: Messages = []
    async for each in messages:
        if isinstance(each, list):
            found += [[frame] for frame in each]
        elif not isinstance(each, int):
            found.append(each)
    return found


def frames(messages: Messages) -> list[int]:
    return [place for place, each in enumerate(messages) if isinstance(each, list)]


def doubled(now: Messages, earlier: Messages) -> Messages:
    place = frames(now)[2]
    return [*now[: place + 1], *now[place:]]


def swapped(now: Messages, earlier: Messages) -> Messages:
    first, second = frames(now)[2:4]
    now[first], now[second] = now[second], now[first]
    return now


def lost(now: Messages, earlier: Messages) -> Messages:
    del now[frames(now)[2]]
    return now


def foreign(now: Messages, earlier: Messages) -> Messages:
    """A page of another request, valid in itself."""
    now[frames(now)[2]] = earlier[frames(earlier)[2]]
    return now


def replayed(now: Messages, earlier: Messages) -> Messages:
    """Everything of another request, commit included, after the acceptance of this one."""
    return [now[0], *earlier[1:]]


def committed_early(now: Messages, earlier: Messages) -> Messages:
    return [now[0], *[each for each in now if isinstance(each, Commit)], *now[1:-1]]


def foreign_commit(now: Messages, earlier: Messages) -> Messages:
    return [*now[:-1], earlier[-1]]


TAMPERINGS: dict[str, tuple[Tampering, str]] = {
    "a frame twice": (doubled, "order"),
    "two frames swapped": (swapped, "landed"),  # each says where it belongs
    "a frame lost": (lost, "incomplete"),
    "a frame of another request": (foreign, "hash"),
    "the stream of another request": (replayed, "hash"),
    "the commit before the pages": (committed_early, "incomplete"),
    "the commit of another request": (foreign_commit, "commit"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
async def test_frames_that_are_not_this_requests_once_each_are_refused(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tamper, reason = TAMPERINGS[name]
    sent: list[Messages] = []
    original = export.Export.messages

    async def tampered(self: export.Export) -> AsyncIterator[export.Message]:
        messages = await one_frame_each(original(self))
        sent.append(list(messages))
        for each in messages if len(sent) == 1 else tamper(messages, sent[0]):
            yield each

    monkeypatch.setattr(export.Export, "messages", tampered)
    landed = reason == "landed"
    async with running(redis_url, **GRPC) as cluster, cluster.client() as client:
        assert (await right(client, truth)).prefilled == "remote"
        assert (await right(client, truth)).prefilled == ("remote" if landed else "local")
        assert failures(cluster) == ({"landed": 2} if landed else {"landed": 1, reason: 1})


async def test_a_stream_replayed_after_a_restart_is_refused(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt, the same pages, every digest right: but their owner has died."""
    sent: list[Messages] = []
    original = export.Export.messages

    async def replaying(self: export.Export) -> AsyncIterator[export.Message]:
        messages = await one_frame_each(original(self))
        sent.append(messages)
        for each in messages if len(sent) == 1 else [messages[0], *sent[0][1:]]:
            yield each

    monkeypatch.setattr(export.Export, "messages", replaying)
    prompt = fresh_prompt(60)
    for where in ("remote", "local"):
        async with running(redis_url, **GRPC) as cluster, cluster.client() as client:
            (found,) = await client.generate([prompt], PARAMS)
            assert found.token_ids == await truth.tokens(prompt, PARAMS)
            assert found.prefilled == where
    assert failures(cluster) == {"boot_id": 1}


async def test_pages_of_an_older_attempt_do_not_pass_for_the_newer_ones(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens in the same slots, one generation ago: the commit does not fit them."""
    sent: list[Messages] = []
    original = export.Export.messages

    async def stale(self: export.Export) -> AsyncIterator[export.Message]:
        messages = await one_frame_each(original(self))
        sent.append(messages)
        if len(sent) > 1:
            messages = [messages[0], *[sent[0][place] for place in frames(sent[0])], messages[-1]]
        for each in messages:
            yield each

    monkeypatch.setattr(export.Export, "messages", stale)
    prompt = fresh_prompt(60)
    async with running(redis_url, **GRPC) as cluster, cluster.client() as client:
        for where in ("remote", "local"):
            (found,) = await client.generate([prompt], PARAMS)
            assert found.token_ids == await truth.tokens(prompt, PARAMS)
            assert found.prefilled == where
            await until_released(cluster)
            for node in cluster.nodes:
                await node.worker.engine.call(lambda core: core.pool.clear_cache())
        assert failures(cluster) == {"landed": 1, "commit": 1}


async def until_released(cluster: Cluster) -> None:
    for node in cluster.nodes:
        await eventually(node.in_balance)


# -- flapping and parted


@pytest.mark.parametrize("flapping_s", [4.0, pytest.param(30.0, marks=pytest.mark.slow)])
async def test_a_flapping_link_opens_the_circuit_and_makes_no_storm(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch, flapping_s: float
) -> None:
    """One failed handover, then the worker is left alone for a while: failures are bounded."""
    avoid_s = 1.0
    monkeypatch.setattr(workers, "AVOID_S", avoid_s)
    async with linked(redis_url) as (cluster, link), cluster.client() as client:

        async def flap() -> None:
            while True:
                await link.refuse()
                await asyncio.sleep(0.2)
                await link.heal()
                await asyncio.sleep(0.2)

        flapping = asyncio.create_task(flap())
        ends = time.monotonic() + flapping_s
        num_requests = 0
        while time.monotonic() < ends:
            await right(client, truth)
            num_requests += 1
        flapping.cancel()
        await asyncio.gather(flapping, return_exceptions=True)
        await link.heal()
        counted = failures(cluster)
        broken = sum(counted.values()) - counted.get("landed", 0) - counted.get("no_worker", 0)
        assert broken <= flapping_s / avoid_s + 2, counted
        assert num_requests > broken

        async def remote() -> bool:
            return (await right(client, truth)).prefilled == "remote"

        await eventually(remote)


async def test_a_parted_pair_that_both_see_redis_gives_every_stream_once(
    redis_url: str, truth: Truth
) -> None:
    async with linked(redis_url) as (cluster, link), cluster.client() as client:
        link.hold()
        found = await asyncio.gather(*[right(client, truth) for _ in range(4)])
        assert {each.prefilled for each in found} == {"local"}
        await link.reset()
        await link.heal()

        async def remote() -> bool:
            return (await right(client, truth)).prefilled == "remote"

        await eventually(remote)


@pytest.mark.parametrize("who", ["prefill", "decode"])
async def test_a_service_that_alone_lost_redis_serves_on_and_is_found_again(
    redis_url: str, truth: Truth, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """The prefill worker is forgotten and its prompts computed by decode; decode goes on with the
    workers it knew. Both for as long as it lasts, and no longer."""
    for module, name, seconds in [
        (registration, "WORKER_TTL_S", 0.8),
        (registration, "HEARTBEAT_S", 0.1),
        (workers, "KEEP_S", 0.3),
        (workers, "REFRESH_S", 0.1),
    ]:
        monkeypatch.setattr(module, name, seconds)
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    async with await Link.to(port) as link:
        lost: dict[str, Any] = {who: {"redis": f"redis://{link.endpoint}"}}
        async with running(redis_url, **lost) as cluster, cluster.client() as client:
            assert (await right(client, truth)).prefilled == "remote"
            await link.refuse()
            known = cluster.decode[0].worker._workers  # type: ignore[attr-defined]
            if who == "prefill":
                await until(lambda: known.choose() is None)
                assert (await right(client, truth)).prefilled == "local"
            else:
                await asyncio.sleep(1.0)  # longer than anybody is remembered without Redis
                assert (await right(client, truth)).prefilled == "remote"
            await link.listen()
            await until(lambda: known.choose() is not None)

            async def remote() -> bool:
                return (await right(client, truth)).prefilled == "remote"

            await eventually(remote)


# -- forced races


@pytest.mark.parametrize("transport", ["grpc", "shm"])
async def test_tiny_leases_long_delays_and_a_tiny_pool_never_give_anothers_pages(
    redis_url: str, truth: Truth, transport: str
) -> None:
    """The lease is over long before the pages arrive, and their slots are given away at once."""
    tiny = {"pool_tokens": 24 * 16}
    async with (
        linked(
            redis_url,
            prefill={"lease_s": 0.05} | tiny,
            decode=tiny,
            transports=(transport,),
        ) as (cluster, link),
        cluster.client() as client,
    ):
        link.to_client.delay_s, link.to_client.jitter_s = 0.15, 0.1
        for _ in range(5):
            await asyncio.gather(*[right(client, truth, 90) for _ in range(8)])
        assert sum(failures(cluster).values()) == 40

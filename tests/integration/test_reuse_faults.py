"""Faults between a reader and the holder the index names: dead, wrong, restarted, evicting, slow.

After each: the same tokens, computed instead, and every page back on both sides.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import redis

from engine.core import EngineCore
from engine.serving import pages as page_service
from kvstore.index import WorkerRecord
from kvstore.page import PageFrame
from quire.v1 import pages_pb2
from tests.integration.cluster import Cluster, Node, running, until
from tests.integration.reuse import (
    LONG,
    NUM_PAGES,
    PARAMS,
    answer,
    counted,
    expected_tokens,
    num_computed,
    page_names,
    published,
)

PULL = {"prefill": "pull"}


@pytest.fixture
async def pair(redis_url: str) -> AsyncIterator[Cluster]:
    """Two decode services; the first keeps the pages of LONG, and the second knows it.

    Payloads travel in the messages, where tests can get at them.
    """
    async with running(
        redis_url, num_prefill=0, num_decode=2, decode=PULL, transports=("grpc",)
    ) as cluster:
        owner, reader = cluster.decode
        await answer(owner)
        await published(owner, to=reader)
        yield cluster


async def check_computed(reader: Node, **pulls: int) -> None:
    """The reader computes LONG by itself, to the same tokens, after pulls that failed."""
    assert await answer(reader) == await expected_tokens()
    assert counted(reader, "pulls") == pulls
    assert num_computed(reader) == len(LONG) - 1


async def named_as_holder(node: Node, record: WorkerRecord) -> None:
    """The index says that a worker of this record holds all pages of LONG."""
    index, fingerprint = node.worker.index, node.core.fingerprint.digest.hex()
    await index.register(record, 60.0)
    await index.publish(fingerprint, page_names(node), record.boot_id, 60.0)
    await node.worker._workers.refresh()  # type: ignore[attr-defined]


async def record_like(node: Node, **changes: str) -> WorkerRecord:
    record = replace(await node.worker._record(node.endpoint), state="serving")
    return replace(record, **changes)  # type: ignore[arg-type]


async def keep_silent(owner: Node) -> None:
    """The index hears of no page that the owner evicts."""
    registration = owner.worker._registration
    assert registration is not None
    await registration._telling.acquire()


async def test_a_holder_that_is_dead_is_left_alone_after_one_try(redis_url: str) -> None:
    async with running(redis_url, num_prefill=0, decode=PULL) as cluster:
        (reader,) = cluster.decode
        dead = await record_like(reader, boot_id="de" * 16, endpoint="127.0.0.1:1")
        await named_as_holder(reader, dead)
        await check_computed(reader, unavailable=1)
        await reader.worker.engine.call(lambda core: core.pool.clear_cache())
        await answer(reader)
        assert counted(reader, "pulls") == {"unavailable": 1}


async def test_a_holder_that_is_somebody_else_by_now_is_not_believed(pair: Cluster) -> None:
    """Its process was restarted: the endpoint answers, under a new identity."""
    owner, reader = pair.decode
    await owner.worker.index.unregister(owner.worker.boot_id.hex())
    before = await record_like(owner, boot_id="0b" * 16)
    known = reader.worker._workers  # type: ignore[attr-defined]
    known._known.clear()
    await named_as_holder(reader, before)
    await check_computed(reader, boot_id=1)


async def test_a_prefill_worker_takes_over_when_the_holder_fails(redis_url: str) -> None:
    async with running(redis_url, decode=PULL) as cluster:
        (reader,) = cluster.decode
        dead = await record_like(reader, boot_id="de" * 16, endpoint="127.0.0.1:1")
        await named_as_holder(reader, dead)
        assert await answer(reader) == await expected_tokens()
        assert counted(reader, "pulls") == {"unavailable": 1}
        assert counted(reader, "handovers") == {"landed": 1}


async def test_pages_evicted_since_they_were_published_are_computed(pair: Cluster) -> None:
    owner, reader = pair.decode
    await keep_silent(owner)
    await owner.worker.engine.call(lambda core: core.pool.clear_cache())
    await check_computed(reader, absent=1)


async def test_of_a_prefix_evicted_in_part_the_rest_is_read(pair: Cluster) -> None:
    owner, reader = pair.decode

    def evict_ten(core: EngineCore) -> None:
        """The page that ends in the output goes first, then the last of the prompt."""
        for _ in range(10):
            core.pool._evict()

    await keep_silent(owner)
    await owner.worker.engine.call(evict_ten)
    assert await answer(reader) == await expected_tokens()
    assert counted(reader, "pulled_pages") == {"": NUM_PAGES - 9}
    assert counted(owner, "leases") == {"absent": 1}


async def test_a_lease_that_ends_while_the_holder_reads_brings_no_page(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = pair.decode
    leases = owner.worker.page_leases
    clock, late = leases._clock, [0.0]
    leases._clock = lambda: clock() + late[0]

    def at_frame(number: int, frame: pages_pb2.PageFrame) -> None:
        if number == 5:
            late[0] = leases.lease_s

    on_frames(monkeypatch, at_frame)
    await check_computed(reader, failed_precondition=1)


async def test_a_lease_that_is_over_after_the_read_brings_no_page(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader was stopped in between: everything arrived in order, but nobody vouches for it."""
    _, reader = pair.decode
    fetcher = reader.worker._desk._fetcher  # type: ignore[attr-defined]
    clock, late = fetcher._clock, [0.0]
    fetcher._clock = lambda: clock() + late[0]

    def at_frame(number: int, frame: pages_pb2.PageFrame) -> None:
        late[0] = 10.0

    on_frames(monkeypatch, at_frame)
    await check_computed(reader, lease_over=1)


def on_frames(
    monkeypatch: pytest.MonkeyPatch, see: Callable[[int, pages_pb2.PageFrame], None]
) -> None:
    """``see`` gets every frame a holder sends, with its number from 1, and may change it."""
    original = page_service.frame_to_wire
    sent: list[int] = []

    def seen(frame: PageFrame) -> pages_pb2.PageFrame:
        message = original(frame)
        sent.append(1)
        see(len(sent), message)
        return message

    monkeypatch.setattr(page_service, "frame_to_wire", seen)


def flip_payload(frame: pages_pb2.PageFrame) -> None:
    payload = bytearray(frame.payload)
    payload[len(payload) // 2] ^= 1
    frame.payload = bytes(payload)


def next_generation(frame: pages_pb2.PageFrame) -> None:
    frame.reference.generation += 1


def other_digest(frame: pages_pb2.PageFrame) -> None:
    frame.digest = bytes(16)


def other_group(frame: pages_pb2.PageFrame) -> None:
    frame.layer_group = 7


CORRUPTIONS = {
    flip_payload: "digest",
    next_generation: "not_granted",
    other_digest: "not_granted",
    other_group: "not_granted",
}


@pytest.mark.parametrize("change", CORRUPTIONS)
async def test_a_page_that_is_not_the_one_granted_is_never_used(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch, change: Callable[[pages_pb2.PageFrame], None]
) -> None:
    def at_frame(number: int, frame: pages_pb2.PageFrame) -> None:
        if number == 3:
            change(frame)

    on_frames(monkeypatch, at_frame)
    await check_computed(pair.decode[1], **{CORRUPTIONS[change]: 1})


@pytest.mark.parametrize("field", ["num_pages", "num_tokens", "pages_digest", "prompt_hash"])
async def test_without_a_valid_commit_no_pulled_page_is_used(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    original = page_service.commit_to_wire

    def corrupted(commit: object) -> pages_pb2.Commit:
        message = original(commit)  # type: ignore[arg-type]
        setattr(message, field, 1 if field.startswith("num") else b"x" * 16)
        return message

    monkeypatch.setattr(page_service, "commit_to_wire", corrupted)
    await check_computed(pair.decode[1], commit=1)


async def test_a_holder_that_falls_silent_is_given_up(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken = asyncio.Event()

    async def stuck(self: object, request: object, context: object) -> None:
        await woken.wait()

    monkeypatch.setattr(page_service.PageServicer, "ReadPages", stuck)
    decode = PULL | {"handover_idle_s": 2.0}
    async with running(redis_url, num_prefill=0, num_decode=2, decode=decode) as cluster:
        owner, reader = cluster.decode
        await answer(owner)
        await published(owner, to=reader)
        await check_computed(reader, silent=1)
        woken.set()


async def test_a_reader_whose_client_leaves_gives_everything_back(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = pair.decode
    works: list[asyncio.Task[object]] = []

    def at_frame(number: int, frame: pages_pb2.PageFrame) -> None:
        if number == 3:
            works[0].cancel()

    on_frames(monkeypatch, at_frame)
    async with reader.client() as client:
        works.append(asyncio.create_task(client.generate([LONG], PARAMS)))
        await asyncio.wait(works)
        await until(lambda: len(owner.worker.page_leases) == 0)
        await pair.balanced()


async def test_whatever_the_index_says_of_holders_the_tokens_are_the_same(
    pair: Cluster, redis_url: str
) -> None:
    _, reader = pair.decode
    with redis.Redis.from_url(redis_url) as client:
        keys = sorted(client.scan_iter("*pages:*"))
        assert len(keys) > NUM_PAGES
        for number, key in enumerate(keys):
            match number % 5:
                case 0:
                    client.delete(key)
                case 1:
                    client.set(key, secrets.token_bytes(100))
                case 2:
                    client.zadd(key, {secrets.token_bytes(16): 1e15, "ff" * 16: 1e15})
                case 3:
                    client.zadd(key, {reader.worker.boot_id.hex(): 1e15})
    assert await answer(reader) == await expected_tokens()


async def test_with_every_holder_made_up_the_tokens_are_the_same(redis_url: str) -> None:
    async with running(redis_url, num_prefill=0, decode=PULL) as cluster:
        (reader,) = cluster.decode
        fingerprint = reader.core.fingerprint.digest.hex()
        for boot_id in ("ff" * 16, reader.worker.boot_id.hex()):
            await reader.worker.index.publish(fingerprint, page_names(reader), boot_id, 60.0)
        await check_computed(reader)

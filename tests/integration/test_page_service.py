"""PageService by itself: who gets a lease, what it protects, when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.serving import pages as page_service
from engine.serving.status import from_rpc_error
from kvstore.transports.grpc_wire import fingerprint_to_wire
from quire.v1 import page_service_pb2 as pb
from quire.v1 import page_service_pb2_grpc
from tests.integration.cluster import Node, running, until
from tests.integration.reuse import LONG, NUM_PAGES, PAGE, answer, page_names

Stub = page_service_pb2_grpc.PageServiceStub


@pytest.fixture
async def owner(redis_url: str) -> AsyncIterator[Node]:
    """A decode service that keeps the pages of LONG; checked for balance at the end."""
    async with running(redis_url, num_prefill=0) as cluster:
        await answer(cluster.decode[0])
        yield cluster.decode[0]


@pytest.fixture
async def stub(owner: Node) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(owner.endpoint) as channel:
        yield Stub(channel)


def lease_request(owner: Node, attempt: int = 1, **changes: object) -> pb.LeasePagesRequest:
    fields: dict[str, object] = {
        "request_id": bytes(16),
        "attempt": attempt,
        "fingerprint": fingerprint_to_wire(owner.core.fingerprint),
        "prefix_hashes": page_names(owner),
    }
    return pb.LeasePagesRequest(**(fields | changes))  # type: ignore[arg-type]


async def read(stub: Stub, attempt: int = 1) -> list[pb.ReadPagesResponse]:
    request = pb.ReadPagesRequest(request_id=bytes(16), attempt=attempt)
    return [message async for message in stub.ReadPages(request)]  # type: ignore[attr-defined]


async def release(stub: Stub, attempt: int = 1) -> bool:
    request = pb.ReleaseLeaseRequest(request_id=bytes(16), attempt=attempt)
    return (await stub.ReleaseLease(request)).released  # type: ignore[no-any-return, misc]


async def code_of(call: object) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code()


def num_leased(core: EngineCore) -> int:
    ledger = core.pool.ledger
    return sum(bool(ledger[slot].leases) for slot in range(len(ledger)))


async def test_a_leased_page_is_not_evicted_until_it_is_released(owner: Node, stub: Stub) -> None:
    granted = await stub.LeasePages(lease_request(owner))
    assert len(granted.pages) == NUM_PAGES
    assert granted.refusal == ""
    await owner.worker.engine.call(lambda core: core.pool.clear_cache())
    assert num_leased(owner.core) == NUM_PAGES
    *frames, last = await read(stub)
    read_slots = [message.frame.reference.slot for message in frames]
    assert list(dict.fromkeys(read_slots)) == [page.reference.slot for page in granted.pages]
    assert last.commit.num_tokens == NUM_PAGES * PAGE
    assert await release(stub)
    assert not await release(stub)
    await until(lambda: num_leased(owner.core) == 0)
    await owner.worker.engine.call(lambda core: core.pool.clear_cache())
    assert (await stub.LeasePages(lease_request(owner))).refusal == "absent"


async def test_pages_nobody_releases_come_back_when_the_lease_ends(redis_url: str) -> None:
    async with running(redis_url, num_prefill=0, page_lease_s=0.2) as cluster:
        (owner,) = cluster.decode
        await answer(owner)
        async with grpc.aio.insecure_channel(owner.endpoint) as channel:
            stub = Stub(channel)
            granted = await stub.LeasePages(lease_request(owner))
            assert granted.lease_s == 0.2
            await until(lambda: num_leased(owner.core) == 0)
            assert await code_of(read(stub)) is grpc.StatusCode.FAILED_PRECONDITION
            assert not await release(stub)


async def test_a_lease_past_its_time_is_not_read_though_the_pages_are_still_there(
    owner: Node, stub: Stub
) -> None:
    now = [0.0]
    owner.worker.page_leases._clock = lambda: now[0]
    await stub.LeasePages(lease_request(owner))
    now[0] = owner.worker.page_leases.lease_s
    assert num_leased(owner.core) == NUM_PAGES
    assert await code_of(read(stub)) is grpc.StatusCode.FAILED_PRECONDITION


async def test_older_attempts_have_no_effect_and_a_newer_one_ends_them(
    owner: Node, stub: Stub
) -> None:
    await stub.LeasePages(lease_request(owner, 1))
    await stub.LeasePages(lease_request(owner, 2))
    stale = (stub.LeasePages(lease_request(owner, 1)), stub.LeasePages(lease_request(owner, 2)))
    for call in (*stale, read(stub, 1), release(stub, 1)):
        assert await code_of(call) is grpc.StatusCode.ABORTED
    holders = await owner.worker.engine.call(lambda core: core.pool.ledger[0].leases)
    assert {name[-2:] for name in holders} == {"/2"}
    *_, last = await read(stub, 2)
    assert last.commit.num_pages == NUM_PAGES
    assert await release(stub, 2)


async def test_an_attempt_replaced_while_it_waits_for_its_grant_leaves_nothing(
    owner: Node, stub: Stub
) -> None:
    owner.model.gate.clear()
    work = asyncio.create_task(answer(owner, [9, *LONG]))
    steps = owner.model.num_steps
    await until(lambda: owner.model.num_steps > steps)
    first = asyncio.create_task(code_of(stub.LeasePages(lease_request(owner, 1))))
    await until(lambda: len(owner.worker.page_leases) == 1)
    second = asyncio.ensure_future(stub.LeasePages(lease_request(owner, 2)))
    assert await first is grpc.StatusCode.ABORTED
    owner.model.gate.set()
    await work
    assert len((await second).pages) == NUM_PAGES
    assert await release(stub, 2)


async def test_a_caller_that_leaves_before_its_grant_leaves_nothing(
    owner: Node, stub: Stub
) -> None:
    owner.model.gate.clear()
    work = asyncio.create_task(answer(owner, [9, *LONG]))
    steps = owner.model.num_steps
    await until(lambda: owner.model.num_steps > steps)
    call = stub.LeasePages(lease_request(owner))
    pending = asyncio.ensure_future(call)  # type: ignore[arg-type]
    await until(lambda: len(owner.worker.page_leases) == 1)
    pending.cancel()
    await until(lambda: len(owner.worker.page_leases) == 0)
    owner.model.gate.set()
    await work
    await until(lambda: num_leased(owner.core) == 0)


async def test_only_what_sequences_can_spare_is_lent(redis_url: str) -> None:
    """Of 50 pages the first prompt leaves 38 in the cache, and the second takes 40: of the 10 that
    are left, one stays for the sequence that runs."""
    async with running(redis_url, num_prefill=0, pool_tokens=50 * PAGE) as cluster:
        (owner,) = cluster.decode
        await answer(owner)
        owner.model.gate.clear()
        work = asyncio.create_task(answer(owner, [7] * (40 * PAGE)))
        steps = owner.model.num_steps
        async with grpc.aio.insecure_channel(owner.endpoint) as channel:
            stub = Stub(channel)
            await until(lambda: owner.model.num_steps > steps)
            asked = asyncio.ensure_future(stub.LeasePages(lease_request(owner)))
            await until(lambda: len(owner.worker.page_leases) == 1)
            owner.model.gate.set()
            granted = await asked
            assert len(granted.pages) == 9
            assert granted.refusal == "busy"
            await release(stub)
            await work


BAD_LEASES: dict[str, dict[str, object]] = {
    "request_id": {"request_id": b"short"},
    "attempt": {"attempt": 0},
    "first_page": {"first_page": 2**32 - 1},
    "prefix_hashes": {"prefix_hashes": []},
}


@pytest.mark.parametrize("field", BAD_LEASES)
async def test_a_wrong_field_is_named(owner: Node, stub: Stub, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.LeasePages(lease_request(owner, **BAD_LEASES[field]))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == field


@pytest.mark.parametrize("hashes", [[b"short"], [bytes(16)] * 4097])
async def test_names_of_impossible_size_or_number_are_refused(
    owner: Node, stub: Stub, hashes: list[bytes]
) -> None:
    call = stub.LeasePages(lease_request(owner, prefix_hashes=hashes))
    assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("field", ["model_digest", "numerics", "digest"])
async def test_pages_of_another_fingerprint_are_not_lent(
    owner: Node, stub: Stub, field: str
) -> None:
    request = lease_request(owner)
    setattr(request.fingerprint, field, bytes(16) if field == "digest" else "other")
    assert await code_of(stub.LeasePages(request)) is grpc.StatusCode.FAILED_PRECONDITION


async def test_beyond_its_limit_of_leases_a_worker_refuses(
    owner: Node, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_service, "MAX_LEASES", 1)
    await stub.LeasePages(lease_request(owner))
    other = lease_request(owner, request_id=b"another request!")
    assert await code_of(stub.LeasePages(other)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    await release(stub)


async def test_a_drain_waits_for_the_readers_of_cached_pages(owner: Node, stub: Stub) -> None:
    await stub.LeasePages(lease_request(owner))
    draining = asyncio.create_task(owner.worker.drain(60.0))
    await until(lambda: owner.worker.state == "draining")
    *_, last = await read(stub)
    assert last.HasField("commit")
    assert not draining.done()
    await release(stub)
    await draining


async def test_a_draining_worker_grants_no_more_leases(owner: Node, stub: Stub) -> None:
    owner.worker.state = "draining"
    assert await code_of(stub.LeasePages(lease_request(owner))) is grpc.StatusCode.UNAVAILABLE

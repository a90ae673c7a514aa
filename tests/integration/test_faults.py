"""Faults on the way: vanished clients, deadlines, corrupt pages, false references, dead workers.

After each: the same tokens or one clear error, a service that lives on, and every page back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from decode_svc import intake, workers
from engine.completion import Started
from engine.errors import DeadlineExceeded, EngineFault, ResourceExhausted
from engine.local import AsyncLocalEngine
from engine.sampling_params import SamplingParams
from engine.telemetry.trace_tree import read_spans
from kvstore.page import group_digest
from kvstore.transports.grpc_wire import fingerprint_to_wire, frame_from_wire
from prefill_svc import export
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings
from quire.v1 import pages_pb2, prefill_pb2, prefill_pb2_grpc
from tests.integration.cluster import (
    Cluster,
    Node,
    eventually,
    running,
    settings_for,
    start,
    until,
)

LONG = list(range(200)) * 3
PARAMS = SamplingParams(temperature=1.0, seed=1, max_tokens=20, logprobs=1)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


async def expected_tokens() -> tuple[int, ...]:
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        (completion,) = await engine.generate([LONG], PARAMS)
        return completion.token_ids


async def until_busy(node: Node) -> None:
    await until(lambda: node.core.scheduler.num_sequences > 0)


async def test_a_client_that_vanishes_in_prefill_frees_both_sides(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        cluster.prefill[0].model.gate.clear()
        work = asyncio.create_task(client.generate([LONG], PARAMS))
        await until_busy(cluster.prefill[0])
        work.cancel()
        await until(lambda: cluster.decode[0].core.scheduler.num_sequences == 0)
        cluster.prefill[0].model.gate.set()
        await cluster.balanced()
        (found,) = await client.generate([LONG], PARAMS)
        assert found.token_ids == await expected_tokens()


async def test_a_client_that_vanishes_in_decode_frees_its_pages(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        stream = client.stream(LONG, ENDLESS)
        for _ in range(5):
            await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await cluster.balanced()


async def test_a_client_killed_without_a_word_frees_its_pages(redis_url: str) -> None:
    """The connection breaks; no cancellation is ever sent."""
    async with running(redis_url) as cluster:
        client = cluster.client()
        stream = client.stream(LONG, ENDLESS)
        await anext(stream)
        await client._channels.close()
        await cluster.balanced()
        await stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("where", ["prefill", "decode"])
async def test_a_deadline_that_passes_frees_both_sides(redis_url: str, where: str) -> None:
    async with running(redis_url) as cluster:
        node: Node = getattr(cluster, where)[0]
        node.model.gate.clear()
        async with cluster.client(timeout_s=0.5) as client:
            with pytest.raises(DeadlineExceeded):
                async for _ in client.stream(LONG, PARAMS):
                    pass
        node.model.gate.set()
        await cluster.balanced()


async def test_the_services_own_limit_ends_a_request_without_deadline(redis_url: str) -> None:
    async with running(redis_url, decode={"max_request_s": 0.3}) as cluster:
        cluster.decode[0].model.gate.clear()
        async with cluster.client() as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate([LONG], ENDLESS)
        cluster.decode[0].model.gate.set()
        await cluster.balanced()


FrameChange = Callable[[pages_pb2.PageFrame], None]


def flip_payload(frame: pages_pb2.PageFrame) -> None:
    payload = bytearray(frame.payload)
    payload[len(payload) // 2] ^= 1
    frame.payload = bytes(payload)


def resigned(change: FrameChange) -> FrameChange:
    """The change, with a digest that fits it: only the claim itself is wrong."""

    def changed(frame: pages_pb2.PageFrame) -> None:
        change(frame)
        parsed = frame_from_wire(frame)
        frame.digest = group_digest(
            parsed.identity, parsed.layer_group, parsed.num_layer_groups, parsed.payload
        )

    return changed


def set_reference(**fields: object) -> FrameChange:
    def change(frame: pages_pb2.PageFrame) -> None:
        for name, value in fields.items():
            setattr(frame.reference, name, value)

    return change


def set_frame(**fields: object) -> FrameChange:
    def change(frame: pages_pb2.PageFrame) -> None:
        for name, value in fields.items():
            setattr(frame, name, value)

    return change


CORRUPTIONS: dict[str, tuple[FrameChange, str]] = {
    "a flipped bit": (flip_payload, "digest"),
    "a truncated payload": (lambda frame: set_frame(payload=frame.payload[:-1])(frame), "size"),
    "another boot identity": (resigned(set_reference(boot_id=b"b" * 16)), "boot_id"),
    "another generation": (set_reference(generation=99), "digest"),
    "another slot": (set_reference(slot=99), "digest"),
    "another prefix hash": (resigned(set_reference(prefix_hash=b"h" * 16)), "hash"),
    "another fingerprint": (resigned(set_reference(fingerprint=b"f" * 16)), "fingerprint"),
    "another kv group": (resigned(set_reference(kv_group=1)), "fingerprint"),
    "another page": (resigned(set_frame(page_index=7)), "hash"),
    "another layer group": (resigned(set_frame(layer_group=5)), "order"),
    "other layer groups": (resigned(set_frame(num_layer_groups=9)), "layout"),
    "another number of tokens": (resigned(set_frame(num_tokens=3)), "hash"),
    "a short hash": (set_reference(prefix_hash=b"h"), "malformed"),
    "no digest": (set_frame(digest=b""), "malformed"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
async def test_a_page_that_is_not_what_was_asked_for_is_never_used(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, reason = CORRUPTIONS[name]
    from prefill_svc import servicer

    original = servicer.frame_to_wire
    sent: list[int] = []

    def corrupted(frame: object) -> pages_pb2.PageFrame:
        message = original(frame)  # type: ignore[arg-type]
        sent.append(message.page_index)
        if len(sent) == 3:
            change(message)
        return message

    monkeypatch.setattr(servicer, "frame_to_wire", corrupted)
    async with running(redis_url, transports=("grpc",)) as cluster, cluster.client() as client:
        (found,) = await client.generate([LONG], PARAMS)
        assert len(sent) >= 3
        assert found.token_ids == await expected_tokens()
        assert found.prefilled == "local"
        assert failures(cluster) == {reason: 1}


def failures(cluster: Cluster) -> dict[str, int]:
    """Handovers by outcome, as the decode service counts them."""
    (family,) = cluster.decode[0].worker.metrics.handovers.collect()
    return {
        sample.labels["outcome"]: int(sample.value)
        for sample in family.samples
        if sample.name.endswith("_total")
    }


@pytest.mark.parametrize("field", ["num_pages", "num_tokens", "pages_digest", "prompt_hash"])
async def test_without_a_valid_commit_no_token_comes_from_the_pages(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    from prefill_svc import servicer

    original = servicer.commit_to_wire

    def corrupted(commit: object) -> pages_pb2.Commit:
        message = original(commit)  # type: ignore[arg-type]
        setattr(message, field, 1 if field.startswith("num") else b"x" * 16)
        return message

    monkeypatch.setattr(servicer, "commit_to_wire", corrupted)
    async with running(redis_url) as cluster, cluster.client() as client:
        (found,) = await client.generate([LONG], PARAMS)
        assert found.token_ids == await expected_tokens()
        assert failures(cluster) == {"commit": 1}


async def test_a_stream_that_ends_without_a_commit_is_no_handover(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_short(self: export.Export) -> AsyncIterator[object]:
        async for message in original(self):
            if not isinstance(message, export.Commit):
                yield message

    original = export.Export.messages
    monkeypatch.setattr(export.Export, "messages", cut_short)
    async with running(redis_url) as cluster, cluster.client() as client:
        (found,) = await client.generate([LONG], PARAMS)
        assert found.token_ids == await expected_tokens()
        assert failures(cluster) == {"incomplete": 1}


async def test_a_prefill_worker_that_falls_silent_is_given_up(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event loop hangs: no progress message comes, though the connection stands."""
    monkeypatch.setattr(export, "PROGRESS_EVERY_S", 60.0)
    async with running(redis_url, decode={"handover_idle_s": 0.3}) as cluster:
        async with cluster.client() as client:
            cluster.prefill[0].model.gate.clear()
            (found,) = await client.generate([LONG], PARAMS)
            cluster.prefill[0].model.gate.set()
        assert found.token_ids == await expected_tokens()
        assert failures(cluster) == {"silent": 1}


async def test_a_busy_prefill_worker_tells_progress_and_is_waited_for(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PROGRESS_EVERY_S", 0.05)
    async with running(redis_url, decode={"handover_idle_s": 1.5}) as cluster:
        async with cluster.client() as client:
            cluster.prefill[0].model.gate.clear()
            work = asyncio.create_task(client.generate([LONG], PARAMS))
            await until_busy(cluster.prefill[0])
            await asyncio.sleep(2.5)  # longer than the idle limit: the time itself is tested
            cluster.prefill[0].model.gate.set()
            (found,) = await work
        assert found.prefilled == "remote"


async def test_pages_nobody_acknowledges_are_freed_when_their_lease_ends(redis_url: str) -> None:
    async with running(redis_url, num_decode=0, prefill={"lease_s": 2.0}) as cluster:
        node = cluster.prefill[0]
        await pull(node, attempt=1)
        assert node.core.pool.ledger[0].leases
        await cluster.balanced()
        released = await release(node, attempt=1)
        assert not released


async def test_release_is_idempotent_and_stale_attempts_have_no_effect(redis_url: str) -> None:
    async with running(redis_url, num_decode=0) as cluster:
        node = cluster.prefill[0]
        await pull(node, attempt=1)
        await pull(node, attempt=2)
        for call in (pull(node, attempt=1), pull(node, attempt=2), release(node, attempt=1)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.ABORTED
        assert any(node.core.pool.ledger[slot].leases for slot in range(80))
        assert await release(node, attempt=2)
        assert not await release(node, attempt=2)


async def test_released_pages_make_room_before_the_engine_has_heard_of_it(redis_url: str) -> None:
    """All pages but a few were leased, and the next prompt comes right after their release."""
    async with running(redis_url, num_decode=0, pool_tokens=640) as cluster:
        node = cluster.prefill[0]
        await pull(node, attempt=1)
        goes_on = threading.Event()
        node.worker.engine.worker.call(lambda _: goes_on.wait(60))
        try:
            assert await release(node, attempt=1)
            work = asyncio.create_task(pull(node, attempt=2))
            await until(lambda: node.worker.queued_tokens() > 0 or work.done())
        finally:
            goes_on.set()
        assert await work > 0
        assert await release(node, attempt=2)


async def pull(node: Node, attempt: int) -> int:
    """Runs a handover to its end without releasing it; returns the number of frames."""
    request = prefill_pb2.PrefillRequest(
        request_id=bytes(16),
        attempt=attempt,
        token_ids=LONG,
        fingerprint=fingerprint_to_wire(node.core.fingerprint),
    )
    frames = 0
    async with grpc.aio.insecure_channel(node.endpoint) as channel:
        async for message in prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(request):
            frames += len(message.frames.frames)
    return frames


async def release(node: Node, attempt: int) -> bool:
    async with grpc.aio.insecure_channel(node.endpoint) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        request = prefill_pb2.ReleasePagesRequest(request_id=bytes(16), attempt=attempt)
        return (await stub.ReleasePages(request)).released


async def test_the_bytes_after_the_last_token_are_sent_as_zeros(redis_url: str) -> None:
    prompt = [*range(16), 1, 2, 3]
    async with running(redis_url, num_decode=0) as cluster:
        node = cluster.prefill[0]
        request = prefill_pb2.PrefillRequest(
            request_id=bytes(16),
            attempt=1,
            token_ids=prompt,
            fingerprint=fingerprint_to_wire(node.core.fingerprint),
        )
        async with grpc.aio.insecure_channel(node.endpoint) as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            frames = [frame async for m in stub.Prefill(request) for frame in m.frames.frames]
        last = frames[-1]
        assert last.num_tokens == 2
        assert last.payload.count(0) > len(last.payload) * 13 // 16
        assert b"\xff\xff\xff\xff" not in last.payload
        await release(node, attempt=1)


async def test_a_request_that_the_model_fails_on_ends_alone(redis_url: str) -> None:
    poison = [5, 6, 259, 7]
    async with running(redis_url, num_prefill=0) as cluster, cluster.client() as client:
        cluster.decode[0].model.fail_on = 259
        good = asyncio.create_task(client.generate([LONG], PARAMS))
        with pytest.raises(EngineFault):
            await client.generate([poison], PARAMS)
        (found,) = await good
        assert found.token_ids == await expected_tokens()


async def test_a_slow_reader_is_cut_off_and_the_others_are_not(redis_url: str) -> None:
    queue = 2 * PARAMS.max_tokens  # the others' answers fit, however late they are read
    async with running(redis_url, decode={"output_queue": queue}) as cluster:
        async with cluster.client() as client:
            engine = cluster.decode[0].worker.engine
            stream = client.stream(LONG, ENDLESS)
            await anext(stream)
            mailbox = next(iter(engine._mailboxes.values()))
            get = mailbox.get

            async def stuck() -> list[object]:
                await until(lambda: mailbox._error is not None)
                return await get()  # type: ignore[return-value]

            mailbox.get = stuck  # type: ignore[method-assign, assignment]
            with pytest.raises(ResourceExhausted):
                async for _ in stream:
                    pass
            (found,) = await client.generate([LONG], PARAMS)
            assert found.token_ids == await expected_tokens()


async def test_beyond_its_limits_a_service_refuses_at_once_with_a_hint(redis_url: str) -> None:
    async with running(redis_url, decode={"max_requests": 2}) as cluster:
        cluster.decode[0].model.gate.clear()
        async with cluster.client() as client:
            busy = [asyncio.create_task(client.generate([LONG], PARAMS)) for _ in range(2)]
            await until(lambda: cluster.decode[0].worker._admission.num_requests == 2)  # type: ignore[attr-defined]
            with pytest.raises(ResourceExhausted) as caught:
                async for _ in client.stream(LONG, PARAMS):
                    pass
            assert caught.value.retry_after_s > 0
            cluster.decode[0].model.gate.set()
            await asyncio.gather(*busy)


async def test_a_prefill_worker_that_is_gone_costs_nothing_but_time(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        gone = cluster.prefill.pop()
        gone.stop.set()
        await gone.task
        (found,) = await client.generate([LONG], PARAMS)
        assert found.token_ids == await expected_tokens()
        assert found.prefilled == "local"


async def test_why_a_prompt_is_computed_by_the_decode_service_is_in_its_log_and_trace(
    redis_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    for name in ("KEEP_S", "AVOID_S"):
        monkeypatch.setattr(workers, name, 60.0)
    trace = tmp_path / "trace.jsonl"
    async with running(redis_url, decode={"trace_file": trace}) as cluster:
        gone = cluster.prefill.pop()
        await gone.close()
        async with cluster.client() as client:
            for prompt in (LONG, [7, *LONG]):
                (found,) = await client.generate([prompt], PARAMS)
                assert found.prefilled == "local"
    failed, none = [
        vars(record)["fields"] for record in caplog.records if "computed here" in record.message
    ]
    assert failed["endpoint"] == gone.endpoint
    assert str(failed["failure"]).startswith("unavailable: ")
    assert none["known"] == f"{gone.endpoint} failed lately"
    (handover,) = [span for span in read_spans(trace) if span.name == "handover"]
    assert handover.attributes["quire.failure"] == "unavailable"


async def test_a_prefill_worker_killed_and_restarted_at_its_endpoint_takes_all_prompts_again(
    redis_url: str,
) -> None:
    """The dead one is still listed, lower in order, and the way to it has failed just now."""
    async with running(redis_url) as cluster, cluster.client() as client:
        decode, dead = cluster.decode[0].worker, cluster.prefill.pop()
        await dead.close()
        endpoint = dead.endpoint
        lowest = replace(await dead.worker._record(endpoint), boot_id="00" * 16, state="serving")
        await decode.index.register(lowest, 60.0)
        known = decode._workers  # type: ignore[attr-defined]
        await until(lambda: known.choose() == lowest)
        (found,) = await client.generate([[0, *LONG]], PARAMS)
        assert found.prefilled == "local"

        port = int(endpoint.rpartition(":")[2])
        settings = PrefillSettings(**settings_for(redis_url, port=port))
        cluster.prefill.append(heir := await start(PrefillWorker, settings))
        await until(lambda: heir.worker.boot_id.hex() in known._known)
        known._avoid.clear()
        for number in range(1, 5):
            (found,) = await client.generate([[number, *LONG]], PARAMS)
            assert found.prefilled == "remote", failures(cluster)


async def test_an_answer_of_another_worker_than_the_index_named_is_refused(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        workers = cluster.decode[0].worker._workers  # type: ignore[attr-defined]
        record = workers.choose()
        workers.choose = lambda *_: _renamed(record)
        (found,) = await client.generate([LONG], PARAMS)
        assert found.token_ids == await expected_tokens()
        assert failures(cluster) == {"boot_id": 1}


def _renamed(record: intake.WorkerRecord) -> intake.WorkerRecord:
    return replace(record, boot_id="ab" * 16)


async def test_a_channel_that_closes_under_a_handover_leaves_the_prompt_to_decode(
    redis_url: str,
) -> None:
    """gRPC tells the reader that it was cancelled, though nobody cancelled the request."""
    async with running(redis_url) as cluster, cluster.client() as client:
        cluster.prefill[0].model.gate.clear()
        work = asyncio.create_task(client.generate([LONG], PARAMS))
        await until_busy(cluster.prefill[0])
        workers = cluster.decode[0].worker._workers  # type: ignore[attr-defined]
        for peer in workers._peers.values():
            await peer.close()
        workers._peers.clear()
        (found,) = await work
        cluster.prefill[0].model.gate.set()
        assert found.token_ids == await expected_tokens()
        assert found.prefilled == "local"


async def test_redis_is_told_how_every_handover_ended(redis_url: str) -> None:
    async with running(redis_url) as cluster, cluster.client() as client:
        decode = cluster.decode[0].worker
        landed = client.items(LONG, PARAMS)
        first = await anext(landed)
        async for _ in landed:
            pass
        cluster.prefill[0].model.gate.clear()
        cancelled = client.items([7, *LONG], PARAMS)
        second = await anext(cancelled)
        await until_busy(cluster.prefill[0])
        await cancelled.aclose()
        states = {}
        for item in (first, second):
            assert isinstance(item, Started)
            name = item.request_id.hex()

            async def ended(name: str = name) -> bool:
                record = await decode.index.handover(name)
                if record is not None:
                    states[name] = str(record.state)
                return record is not None and record.state != "offered"

            await eventually(ended)
        assert list(states.values()) == ["landed", "cancelled"]
        cluster.prefill[0].model.gate.set()

"""Pages by every transport: the same tokens, and one clear failure where something is wrong."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.errors import InvalidRequest
from engine.telemetry.trace_tree import read_spans
from kernels.layout import PageLayout
from kvstore.landing import LandingError
from kvstore.memory import PageMemory
from kvstore.page import PageFrame, PageIdentity, PageReference
from kvstore.shared_pool import SharedMemoryUnavailable, SharedPool
from kvstore.transports import TransportAddress, TransportUnavailable, nixl, shm
from kvstore.transports.choice import Transports, open_memory, problem_of
from kvstore.transports.grpc_wire import (
    fingerprint_to_wire,
    frame_from_wire,
    transport_from_wire,
    transport_to_wire,
)
from kvstore.transports.shm import SharedMemoryTransport
from prefill_svc import servicer
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings
from quire.v1 import pages_pb2, prefill_pb2, prefill_pb2_grpc
from tests.integration.cluster import Cluster, Node, running, settings_for, start, until
from tests.integration.test_faults import LONG, PARAMS, expected_tokens, failures, release

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


async def test_a_late_reader_of_slots_given_to_another_prompt_gets_nothing(redis_url: str) -> None:
    """It was granted pages, slept, and reads after they were released and filled anew."""
    async with running(redis_url, num_decode=0, pool_tokens=640) as cluster:
        node = cluster.prefill[0]
        frames, chosen = await granted(node, 1, LONG[:500])
        frames = [frame for frame in frames if frame.identity.page_index == 20]
        async with reading(node.core.layout) as reader:
            source = await reader.connect(chosen.address, node.worker.boot_id, node.core.layout)
            size = node.core.memory.groups.num_bytes(frames[0].layer_group)
            target = memoryview(bytearray(size))
            await source.read(frames[:1], [target])
            await release(node, attempt=1)
            await granted(node, 2, [7] * 500)
            with pytest.raises(LandingError) as caught:
                await source.read(frames[:1], [target])
            assert caught.value.reason == "generation"
            await release(node, attempt=2)


async def granted(
    node: Node, attempt: int, prompt: list[int]
) -> tuple[list[PageFrame], TransportAddress]:
    """Runs a handover by reference to its commit; its frames, and where their bytes are."""
    wanted = TransportAddress("shm", shm.host_identity())
    request = prefill_pb2.PrefillRequest(
        request_id=bytes(16),
        attempt=attempt,
        token_ids=prompt,
        fingerprint=fingerprint_to_wire(node.core.fingerprint),
        transports=[transport_to_wire(wanted)],
    )
    frames: list[PageFrame] = []
    chosen = TransportAddress("none")
    async with grpc.aio.insecure_channel(node.endpoint) as channel:
        async for message in prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(request):
            frames += map(frame_from_wire, message.frames.frames)
            if message.HasField("accepted"):
                chosen = transport_from_wire(message.accepted.transport)
    return frames, chosen


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


def names_in_shared_memory() -> list[Path]:
    return list(Path("/dev/shm").glob("*quire*"))


def frame_of(slot: int, group: int) -> PageFrame:
    reference = PageReference(OWNER, slot, 0, bytes(16), bytes(16))
    return PageFrame(PageIdentity(reference, 0, 16), group, 6, None, bytes(16))


OWNER_PROCESS = """
import asyncio
from kvstore.memory import PageMemory
from kvstore.shared_pool import SharedPool
from kvstore.transports.shm import SharedMemoryTransport
from tests.integration.test_transports import LAYOUT, OWNER

async def main():
    memory = PageMemory(LAYOUT, 4, SharedPool.create(4, LAYOUT.page_bytes))
    memory.bytes.fill_(7)
    print(SharedMemoryTransport(memory, OWNER).address.hex(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def owner_running(script: str) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """A process with a pool, and the address of the pool; it is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process:
        try:
            yield process, bytes.fromhex(process.stdout.readline())
        finally:
            process.kill()


@pytest.fixture
def owner() -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    with owner_running(OWNER_PROCESS) as running_owner:
        yield running_owner


@pytest.fixture
async def reader() -> AsyncIterator[SharedMemoryTransport]:
    async with reading(LAYOUT) as transport:
        yield transport


@asynccontextmanager
async def reading(layout: PageLayout) -> AsyncIterator[SharedMemoryTransport]:
    """A worker's end that reads pages of others, of this layout."""
    memory = PageMemory(layout, 1, SharedPool.create(1, layout.page_bytes))
    transport = SharedMemoryTransport(memory, b"r" * 16)
    try:
        yield transport
    finally:
        await transport.close()


async def test_an_owner_killed_in_the_middle_of_a_copy_takes_nothing_down(
    owner: tuple[subprocess.Popen[str], bytes],
    reader: SharedMemoryTransport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, address = owner
    source = await reader.connect(address, OWNER, LAYOUT)
    copy = shm.copy_group

    def killing(*arguments: Any) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        copy(*arguments)

    monkeypatch.setattr(shm, "copy_group", killing)
    frames = [frame_of(slot, group) for slot in range(4) for group in range(6)]
    targets = [memoryview(bytearray(LAYOUT.layer_bytes)) for _ in frames]
    await source.read(frames, targets)
    assert {byte for target in targets for byte in target} == {7}
    await until(lambda: source.lost)
    with pytest.raises(LandingError) as caught:
        await source.read(frames, targets)
    assert caught.value.reason == "transport"
    assert not names_in_shared_memory()
    with pytest.raises(TransportUnavailable):
        await reader.connect(address, OWNER, LAYOUT)


@pytest.mark.parametrize(
    ("owner_id", "layout"),
    [(b"x" * 16, LAYOUT), (OWNER, replace(LAYOUT, page_size=32))],
)
async def test_only_the_pool_that_was_meant_is_mapped(
    owner: tuple[subprocess.Popen[str], bytes],
    reader: SharedMemoryTransport,
    owner_id: bytes,
    layout: PageLayout,
) -> None:
    with pytest.raises(TransportUnavailable):
        await reader.connect(owner[1], owner_id, layout)


async def test_a_pool_is_given_to_processes_of_its_own_user_only(
    owner: tuple[subprocess.Popen[str], bytes],
    reader: SharedMemoryTransport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shm.os, "geteuid", lambda: 4_000_000)
    with pytest.raises(TransportUnavailable, match="another user"):
        await reader.connect(owner[1], OWNER, LAYOUT)


def test_a_reader_can_neither_write_nor_shrink_a_pool() -> None:
    pool = SharedPool.create(2, 4096)
    mapped = SharedPool.attach(pool.file, 2, 4096)
    with pytest.raises(ValueError, match="read-only"):
        mapped.pages[0, 0] = 1
    with pytest.raises(PermissionError):
        os.ftruncate(pool.file, 4096)
    with pytest.raises(PermissionError):
        os.pwrite(pool.file, b"x", 5000)
    pool.pages[1, 3] = 9
    pool.generations[1] = 5
    assert (mapped.pages[1, 3], mapped.generations[1]) == (9, 5)
    pool.close()


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses this process larger files: as if shared memory were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_lack_of_shared_memory_shows_when_the_pool_is_made() -> None:
    with files_of_at_most(1 << 20):
        SharedPool.create(4, 4096).close()
        with pytest.raises(SharedMemoryUnavailable, match="too large"):
            SharedPool.create(1024, 4096)


async def test_without_shared_memory_pages_come_another_way_unless_it_was_asked_for(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with files_of_at_most(1 << 20):
        memory = open_memory(LAYOUT, 1024, ("auto",))
        with pytest.raises(TransportUnavailable, match="shm: no shared memory for the pool"):
            open_memory(LAYOUT, 1024, ("shm", "grpc"))
        settings = PrefillSettings(
            **settings_for(redis_url, transports=("shm",), pool_tokens=1 << 20)
        )
        with pytest.raises(InvalidRequest, match="transports: shm"):
            await start(PrefillWorker, settings)
    assert memory.shared is None
    assert any("not offered through shared memory" in each.message for each in caplog.records)
    transports = await Transports.start(("auto",), memory, OWNER)
    assert transports.names == ("grpc",)
    await transports.close()


IN_A_SMALL_SHM = """
mount -t tmpfs -o size=1m tmpfs /dev/shm && dd if=/dev/zero of=/dev/shm/full bs=1M 2>/dev/null
exec "$0" -c "$1"
"""
POOL_IN_USE = """
from kvstore.shared_pool import SharedPool
pool = SharedPool.create(1024, 65536)
pool.pages.fill(1)
print(int(pool.pages.sum()))
"""


def test_a_full_dev_shm_is_no_bus_error() -> None:
    """The pool is not in that file system at all; where mounts are not allowed, it is not full."""
    command = ["sh", "-c", IN_A_SMALL_SHM, sys.executable, POOL_IN_USE]
    may_mount = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    command = ["unshare", "-m", *command] if may_mount else [sys.executable, "-c", POOL_IN_USE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, str(1024 * 65536)), result.stderr


NIXL_OWNER_PROCESS = """
import asyncio
import numpy as np
from kvstore.memory import PageMemory
from kvstore.transports import nixl
from tests.integration.test_transports import LAYOUT, OWNER

async def main():
    memory = PageMemory(LAYOUT, 4)
    memory.bytes.fill_(7)
    memory.generations[:] = np.arange(4)
    transport = await nixl.start(memory, OWNER)
    print(transport.address.hex(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_nixl_reads_what_was_announced_or_fails_and_outlives_a_killed_owner() -> None:
    if problem_of("nixl") is not None:
        with pytest.raises(TransportUnavailable, match="NIXL cannot be loaded"):
            await Transports.start(("nixl",), PageMemory(LAYOUT, 1), OWNER)
        return
    transport = await nixl.start(PageMemory(LAYOUT, 1), b"r" * 16)
    with owner_running(NIXL_OWNER_PROCESS) as (process, address):
        source = await transport.connect(address, OWNER, LAYOUT)
        frames = [frame_of(slot, group) for slot in range(4) for group in range(6)]
        targets = [memoryview(bytearray(LAYOUT.layer_bytes)) for _ in frames]
        await source.read(frames[:6], targets[:6])
        assert {byte for target in targets[:6] for byte in target} == {7}
        with pytest.raises(LandingError) as caught:
            await source.read(frames, targets)
        assert caught.value.reason == "generation"
        assert {byte for target in targets[6:] for byte in target} == {0}
        process.kill()
        process.wait()
        with pytest.raises(LandingError) as caught:
            await source.read(frames[:6], targets[:6])
        assert caught.value.reason == "transport"
        assert source.lost
    await transport.close()


async def test_a_handover_given_up_while_it_looks_for_the_pool_leaves_nothing_open(
    owner: tuple[subprocess.Popen[str], bytes],
    reader: SharedMemoryTransport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attach, found, may_end = shm._attach, threading.Event(), threading.Event()
    attached: list[Any] = []

    def slow(*arguments: Any) -> Any:
        attached.append(attach(*arguments))
        found.set()
        assert may_end.wait(60)
        return attached[0]

    monkeypatch.setattr(shm, "_attach", slow)
    work = asyncio.create_task(reader.connect(owner[1], OWNER, LAYOUT))
    await asyncio.to_thread(found.wait, 60)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    may_end.set()
    await until(lambda: attached[0][0].fileno() < 0)


async def test_two_handovers_from_a_new_owner_share_one_way_to_its_pool(
    owner: tuple[subprocess.Popen[str], bytes],
) -> None:
    memory = PageMemory(LAYOUT, 1, SharedPool.create(1, LAYOUT.page_bytes))
    async with AsyncExitStack() as stack:
        transports = await Transports.start(("shm",), memory, b"r" * 16)
        stack.push_async_callback(transports.close)
        chosen = TransportAddress("shm", owner[1])
        first, second = await asyncio.gather(
            *(transports.source(chosen, OWNER, LAYOUT) for _ in range(2))
        )
        assert first is second
        transports.forget(OWNER)
        assert first.lost
        assert await transports.source(chosen, OWNER, LAYOUT) is not first


async def test_a_transport_that_cannot_start_leaves_no_other_one_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it fails with, be it that nobody waits for it any more."""
    listen, listeners = shm._listener, []

    def listening(address: bytes) -> socket.socket:
        listeners.append(listen(address))
        return listeners[-1]

    monkeypatch.setattr(shm, "_listener", listening)

    async def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(nixl, "start", cancelled)
    memory = PageMemory(LAYOUT, 1, SharedPool.create(1, LAYOUT.page_bytes))
    with pytest.raises(asyncio.CancelledError):
        await Transports.start(("shm", "nixl"), memory, OWNER)
    assert [each.fileno() for each in listeners] == [-1]

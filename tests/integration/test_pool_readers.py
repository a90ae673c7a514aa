"""Reading the pool of another process: what is mapped, who may, and how it ends."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.errors import InvalidRequest
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
from prefill_svc.__main__ import PrefillWorker
from prefill_svc.config import PrefillSettings
from quire.v1 import prefill_pb2, prefill_pb2_grpc
from tests.integration.cluster import Node, running, settings_for, start, until
from tests.integration.test_faults import LONG, release

ROOT = Path(__file__).parents[2]
LAYOUT = PageLayout(num_layers=6, num_kv_heads=1, head_dim=16, page_size=16)
OWNER = b"o" * 16


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
from tests.integration.test_pool_readers import LAYOUT, OWNER

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
from tests.integration.test_pool_readers import LAYOUT, OWNER

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

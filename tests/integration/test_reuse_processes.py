"""A holder that is a process of its own, killed or stopped in the middle of a read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from decode_svc import fetch
from engine.remote import AsyncRemoteEngine
from engine.state import ServiceEntry
from engine.supervisor import ServicePlan, Supervisor
from kvstore.page import PageFrame
from kvstore.transports.grpc_wire import frame_from_wire
from quire.v1 import admin_pb2, admin_pb2_grpc, pages_pb2
from tests.integration.cluster import Node, eventually, running
from tests.integration.reuse import (
    PAGE,
    PARAMS,
    answer,
    counted,
    expected_tokens,
    num_computed,
    page_names,
)

# A megabyte of pages: where bytes travel in messages that is more than fits in buffers on the way,
# so the read is cut off in the middle. Mapped pages may still be read when the holder is dead.
MAPPED = {"landed", "transport"}
PROMPT = [(7 * number) % 251 for number in range(4000)]


@pytest.fixture
def holder(transport: str, redis_url: str, tmp_path: Path) -> Iterator[ServiceEntry]:
    """A decode service in a process of its own."""
    flags = (
        f"--redis={redis_url}",
        "--model=hash",
        f"--page-size={PAGE}",
        "--pool-tokens=8192",
        "--page-lease-s=1",
        f"--transports={transport}",
    )
    plan = ServicePlan("decode", "decode_svc", flags)
    supervisor = Supervisor(tmp_path, lambda _: [plan], redis_url, drain_s=5.0)
    try:
        supervisor.start(lambda: False)
        (service,) = supervisor.state.services
        yield service
    finally:
        supervisor.stop()


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_holder_cut_off_in_the_middle_of_a_read_changes_no_token(
    holder: ServiceEntry,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    how: signal.Signals,
) -> None:
    read: list[int] = []

    def cut_off(message: pages_pb2.PageFrame) -> PageFrame:
        read.append(message.page_index)
        if len(read) == 3:
            os.kill(holder.pid, how)
        return frame_from_wire(message)

    monkeypatch.setattr(fetch, "frame_from_wire", cut_off)
    decode = {"prefill": "pull", "handover_idle_s": 2.0, "pool_tokens": 8192}
    async with running(redis_url, num_prefill=0, decode=decode) as cluster:
        (reader,) = cluster.decode
        await fill(holder, reader)
        assert await answer(reader, PROMPT) == await expected_tokens(PROMPT)
        assert len(read) >= 3
        (outcome,) = counted(reader, "pulls")
        assert outcome in {"silent", "unavailable"} | (MAPPED if transport == "shm" else set())
        rest = (len(PROMPT) - 1) % PAGE
        assert num_computed(reader) == (rest if outcome == "landed" else len(PROMPT) - 1)
    if how is signal.SIGSTOP:
        os.kill(holder.pid, signal.SIGCONT)
        await eventually(lambda: nothing_leased(holder))


async def fill(holder: ServiceEntry, reader: Node) -> None:
    """The holder has computed the prompt, and the reader knows both it and its pages."""
    async with AsyncRemoteEngine([holder.endpoint]) as client:
        await client.generate([PROMPT], PARAMS)
    names = page_names(reader, PROMPT)

    async def published() -> bool:
        fingerprint = reader.core.fingerprint.digest.hex()
        return len(await reader.worker.index.lookup(fingerprint, names)) == len(names)

    await eventually(published)
    await reader.worker._workers.refresh()  # type: ignore[attr-defined]


async def nothing_leased(holder: ServiceEntry) -> bool:
    async with grpc.aio.insecure_channel(holder.endpoint) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        pages = (await stub.ListPages(admin_pb2.ListPagesRequest())).pages
        return bool(pages) and not any(page.num_leases for page in pages)

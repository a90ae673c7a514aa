"""AdminService, served by both services: state, pages, drain."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

from engine.core import EngineCore
from engine.mailbox import AsyncEngine
from engine.serving.status import maps_errors
from kvstore.ledger import PageRecord, PageState
from kvstore.pool import PagePool
from kvstore.transports.grpc_wire import fingerprint_to_wire
from quire.v1 import admin_pb2 as pb
from quire.v1 import admin_pb2_grpc


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Looks into one worker. ``drain`` starts its way out; ``state`` names where it is."""

    def __init__(
        self,
        engine: AsyncEngine,
        role: str,
        state: Callable[[], str],
        drain: Callable[[], None],
        index_reachable: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._role = role
        self._state = state
        self._drain = drain
        self._index_reachable = index_reachable

    @maps_errors
    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DrainResponse:
        running = await self._engine.call(lambda core: core.scheduler.num_sequences)
        self._drain()
        return pb.DrainResponse(num_running=running)

    @maps_errors
    async def GetState(
        self, request: pb.GetStateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStateResponse:
        response = await self._engine.call(_state_of)
        response.role = self._role
        response.state = self._state()
        response.index_reachable = self._index_reachable()
        return response

    @maps_errors
    async def ListPages(
        self, request: pb.ListPagesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListPagesResponse:
        return await self._engine.call(_pages_of)


def _state_of(core: EngineCore) -> pb.GetStateResponse:
    return pb.GetStateResponse(
        boot_id=core.boot_id,
        fingerprint=fingerprint_to_wire(core.fingerprint),
        num_running=core.scheduler.num_running,
        num_waiting=core.scheduler.num_waiting,
        pages=_counts_of(core.pool),
        model=core.model.spec.name,
    )


def _pages_of(core: EngineCore) -> pb.ListPagesResponse:
    ledger, now = core.pool.ledger, time.monotonic()
    records = [ledger[slot] for slot in range(len(ledger))]
    return pb.ListPagesResponse(
        boot_id=core.boot_id,
        counts=_counts_of(core.pool),
        pages=[_record_of(each, now) for each in records if each.state is not PageState.FREE],
    )


def _counts_of(pool: PagePool) -> pb.PageCounts:
    return pb.PageCounts(
        total=pool.num_pages,
        free=pool.ledger.count(PageState.FREE),
        filling=pool.ledger.count(PageState.FILLING),
        sealed=pool.ledger.count(PageState.SEALED),
        quarantined=pool.ledger.count(PageState.QUARANTINED),
        cached_only=pool.num_idle,
    )


def _record_of(record: PageRecord, now: float) -> pb.PageRecord:
    return pb.PageRecord(
        slot=record.slot,
        generation=record.generation,
        state=str(record.state),
        owners=sorted(record.owners),
        num_readers=record.num_readers,
        num_writers=record.num_writers,
        num_leases=len(record.leases),
        cached=record.cached,
        prefix_hash=record.prefix_hash or b"",
        num_tokens=record.num_tokens,
        held_s=now - record.since,
        reason=record.reason,
    )

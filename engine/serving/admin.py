"""AdminService, served by both services: state, pages, drain."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from engine.audit import Holders, broken_laws, broken_swap, orphans, snapshot
from engine.core import EngineCore
from engine.mailbox import AsyncEngine
from engine.serving.status import maps_errors
from kvstore.ledger import PageRecord, PageState
from kvstore.pool import PagePool
from kvstore.transports.grpc_wire import fingerprint_to_wire
from quire.v1 import admin_pb2 as pb
from quire.v1 import admin_pb2_grpc


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Looks into one worker. ``drain`` starts its way out; ``state`` names where it is; ``callers``
    are the names that a request or lease here answers for."""

    def __init__(
        self,
        engine: AsyncEngine,
        role: str,
        state: Callable[[], str],
        drain: Callable[[], None],
        callers: Callable[[], set[str]],
        index_reachable: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._role = role
        self._state = state
        self._drain = drain
        self._callers = callers
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
        # Who came while we looked is known after it, who went was known before: neither is missed.
        before = self._callers()
        books = await self._engine.call(_books_of)
        callers = before | self._callers()
        strays = orphans(books.records, books.holders, callers | books.leaving)
        now = time.monotonic()
        return pb.ListPagesResponse(
            boot_id=self._engine.core.boot_id,
            counts=books.counts,
            pages=[_record_of(each, now, strays.get(each.slot, "")) for each in books.records]
            + [_orphaned(each, callers | books.leaving) for each in books.swapped],
            callers=sorted(callers),
        )

    @maps_errors
    async def CheckPages(
        self, request: pb.CheckPagesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CheckPagesResponse:
        problems = await self._engine.call(_problems_of)
        return pb.CheckPagesResponse(
            boot_id=self._engine.core.boot_id,
            num_pages=self._engine.core.pool.num_pages,
            problems=problems,
        )


def _problems_of(core: EngineCore) -> list[str]:
    holders = core.scheduler.holders
    return broken_laws(core.pool, holders) + broken_swap(core.scheduler.swap, holders)


def _state_of(core: EngineCore) -> pb.GetStateResponse:
    return pb.GetStateResponse(
        boot_id=core.boot_id,
        fingerprint=fingerprint_to_wire(core.fingerprint),
        num_running=core.scheduler.num_running,
        num_waiting=core.scheduler.num_waiting,
        pages=_counts_of(core.pool),
        model=core.model.spec.name,
    )


@dataclass(frozen=True, slots=True)
class _Books:
    """What a worker's thread knows of its pages at one moment."""

    records: list[PageRecord]
    counts: pb.PageCounts
    holders: Holders
    leaving: set[str]
    swapped: list[pb.PageRecord]


def _books_of(core: EngineCore) -> _Books:
    pool = core.pool
    holders = core.scheduler.holders
    return _Books(
        snapshot(pool.ledger), _counts_of(pool), holders, core.leaving, swapped_pages(core)
    )


def _orphaned(page: pb.PageRecord, callers: set[str]) -> pb.PageRecord:
    """A swapped page, with the reason why nobody will free it if there is one."""
    (owner,) = page.owners
    if owner not in callers:
        page.orphan = f"swap slot {page.slot} is held for {owner}, whom nobody answers for"
    return page


def swapped_pages(core: EngineCore) -> list[pb.PageRecord]:
    """Pages outside the pool; their slots are slots of the swap room."""
    return [
        pb.PageRecord(
            slot=slot,
            state="swapped",
            owners=[owner],
            num_tokens=core.pool.page_size,
            reason=f"swapped out until {owner} has pages again",
        )
        for owner, slots in core.scheduler.swap.holders().items()
        for slot in slots
    ]


def _counts_of(pool: PagePool) -> pb.PageCounts:
    return pb.PageCounts(
        total=pool.num_pages,
        free=pool.ledger.count(PageState.FREE),
        filling=pool.ledger.count(PageState.FILLING),
        sealed=pool.ledger.count(PageState.SEALED),
        quarantined=pool.ledger.count(PageState.QUARANTINED),
        cached_only=pool.num_idle,
    )


def _record_of(record: PageRecord, now: float, orphan: str) -> pb.PageRecord:
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
        lease_holders=sorted(record.leases),
        writers=sorted(record.writers),
        readers=sorted(record.readers),
        orphan=orphan,
    )

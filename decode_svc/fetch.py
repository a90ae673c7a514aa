"""Pulling cached pages out of another worker's pool: lease, read, verify, release (law 4).

Nothing that fails here fails the request: the pages are computed instead. Of a read that ends
without a valid commit, or after the lease, nothing is used.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from decode_svc.decider import Decider
from decode_svc.failures import PullFailed, telling_why
from decode_svc.wanted import Wanted
from decode_svc.workers import KnownWorkers
from engine.core import EngineCore
from engine.lifecycle import Lifecycle
from engine.plan import Reservation
from engine.telemetry.logs import fields
from engine.telemetry.metrics import Metrics
from engine.telemetry.tracing import stage_span
from kvstore.index import WorkerRecord
from kvstore.landing import Landing
from kvstore.page import PageFrame
from kvstore.prefix_hash import PrefixHasher
from kvstore.transports import PageSource, receive
from kvstore.transports.choice import Transports
from kvstore.transports.grpc_wire import (
    commit_from_wire,
    fingerprint_to_wire,
    frame_from_wire,
    transport_from_wire,
    transport_to_wire,
)
from kvstore.transports.lease_wire import granted_from_wire, lease_s_from_wire
from quire.v1 import page_service_pb2 as pb
from quire.v1 import page_service_pb2_grpc

FIRST_ATTEMPT = 1
RELEASE_TIMEOUT_S = 2.0
REFUSALS = ("absent", "busy")
# Reasons that say nothing about the holder's health: it is asked again by the next request.
HARMLESS = (*REFUSALS, "resource_exhausted", "lease_over")
log = logging.getLogger(__name__)

if TYPE_CHECKING:
    PageStub = page_service_pb2_grpc.PageServiceAsyncStub


@dataclass(frozen=True, slots=True)
class Lease:
    """Pages of a holder, readable by ``source`` until ``until`` on this process's monotonic clock,
    which is earlier than the holder's own end of the lease: it is counted from before the question.

    ``frames`` are what may come, without payload.
    """

    num_pages: int
    frames: frozenset[PageFrame]
    source: PageSource
    until: float
    delay_s: float


class Fetcher:
    """Pulls pages into reserved slots. ``tell`` runs what need not be waited for."""

    def __init__(
        self,
        core: EngineCore,
        workers: KnownWorkers,
        transports: Transports,
        decider: Decider,
        metrics: Metrics,
        idle_s: float,
        tell: Callable[[Awaitable[None]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._workers = workers
        self._transports = transports
        self._decider = decider
        self._metrics = metrics
        self._idle_s = idle_s
        self._tell = tell
        self._clock = clock

    async def pull(
        self, wanted: Wanted, reservation: Reservation, holder: WorkerRecord, num_pages: int
    ) -> int:
        """Fills the first reserved slots with up to ``num_pages`` pages; returns how many."""
        try:
            with stage_span(Lifecycle.PULL, {"quire.holder": holder.boot_id}) as span:
                try:
                    lease, num_bytes = await self._pull(wanted, reservation, holder, num_pages)
                except PullFailed as failure:
                    span.set_attribute("quire.failure", failure.reason)
                    raise
                span.set_attributes({"quire.pages": lease.num_pages, "quire.bytes": num_bytes})
        except PullFailed as failure:
            self._failed(failure, wanted, holder)
            return 0
        self._metrics.pulls.labels("landed").inc()
        self._metrics.pulled_pages.inc(lease.num_pages)
        self._metrics.pulled_bytes.inc(num_bytes)
        return lease.num_pages

    async def _pull(
        self, wanted: Wanted, reservation: Reservation, holder: WorkerRecord, num_pages: int
    ) -> tuple[Lease, int]:
        with telling_why(PullFailed, self._idle_s):
            stub = await self._stub(holder, self._idle_s)
            try:
                return await self._lease_and_read(stub, wanted, reservation, holder, num_pages)
            finally:
                self._tell(self._release(wanted, holder))

    async def _lease_and_read(
        self,
        stub: PageStub,
        wanted: Wanted,
        reservation: Reservation,
        holder: WorkerRecord,
        num_pages: int,
    ) -> tuple[Lease, int]:
        core, first = self._core, reservation.num_cached_pages
        size = core.settings.page_size
        hasher = PrefixHasher(wanted.tenant, core.fingerprint.digest, size)
        names = hasher.full_pages(wanted.prompt_ids[: (first + num_pages) * size])
        lease = await self._ask(stub, wanted, holder, first, names[first:])
        began = self._clock()
        landing = Landing(
            memory=core.memory,
            hasher=hasher,
            prompt_ids=wanted.prompt_ids[: (first + lease.num_pages) * size + 1],
            first_page=first,
            slots=reservation.slots[: lease.num_pages],
            fingerprint=core.fingerprint.digest,
            owner=bytes.fromhex(holder.boot_id),
        )
        num_bytes = await self._read(stub, wanted, lease, landing)
        self._decider.saw_pull(holder.boot_id, lease.delay_s, self._clock() - began, num_bytes)
        return lease, num_bytes

    async def _ask(
        self,
        stub: PageStub,
        wanted: Wanted,
        holder: WorkerRecord,
        first_page: int,
        names: list[bytes],
    ) -> Lease:
        """A lease on the first of the pages, at least one."""
        request = pb.LeasePagesRequest(
            request_id=wanted.request_id,
            attempt=FIRST_ATTEMPT,
            fingerprint=fingerprint_to_wire(self._core.fingerprint),
            first_page=first_page,
            prefix_hashes=names,
            transports=map(
                transport_to_wire, self._transports.readable(bytes.fromhex(holder.boot_id))
            ),
        )
        asked = self._clock()
        timeout_s = min(self._idle_s, wanted.remaining_s)
        response = await stub.LeasePages(request, timeout=timeout_s)
        if response.boot_id.hex() != holder.boot_id:
            raise PullFailed("boot_id", "another worker answered")
        if not response.pages:
            refusal = response.refusal
            raise PullFailed(refusal if refusal in REFUSALS else "refused", "no page is lent")
        pages = response.pages[: len(names)]
        frames = granted_from_wire(pages, first_page, self._core.settings.page_size)
        delay_s = self._clock() - asked
        source = await self._transports.source(
            transport_from_wire(response.transport), response.boot_id, self._core.layout
        )
        until = asked + lease_s_from_wire(response)
        return Lease(len(pages), frozenset(frames), source, until, delay_s)

    async def _read(self, stub: PageStub, wanted: Wanted, lease: Lease, landing: Landing) -> int:
        """Copies and verifies everything leased; returns its bytes."""
        request = pb.ReadPagesRequest(request_id=wanted.request_id, attempt=FIRST_ATTEMPT)
        call = stub.ReadPages(request, timeout=wanted.remaining_s)
        num_bytes = 0
        try:
            while True:
                async with asyncio.timeout(self._idle_s):
                    response = await call.read()
                if not isinstance(response, pb.ReadPagesResponse):  # grpc.aio.EOF
                    raise PullFailed("incomplete", "the stream ended without a commit")
                match response.WhichOneof("message"):
                    case "frame":
                        frame = frame_from_wire(response.frame)
                        if replace(frame, payload=None) not in lease.frames:
                            raise PullFailed("not_granted", "a page other than those granted")
                        num_bytes += await receive([frame], landing, lease.source)
                    case "commit":
                        landing.finish(commit_from_wire(response.commit))
                        self._check_still_leased(lease)
                        return num_bytes
                    case _:
                        pass
        finally:
            call.cancel()

    def _check_still_leased(self, lease: Lease) -> None:
        """After the last byte was read: before it, nobody knows what was read."""
        if self._clock() >= lease.until:
            raise PullFailed("lease_over", "the lease ended during the read")

    async def _release(self, wanted: Wanted, holder: WorkerRecord) -> None:
        request = pb.ReleaseLeaseRequest(request_id=wanted.request_id, attempt=FIRST_ATTEMPT)
        try:
            with telling_why(PullFailed, RELEASE_TIMEOUT_S):
                stub = await self._stub(holder, RELEASE_TIMEOUT_S)
                await stub.ReleaseLease(request, timeout=RELEASE_TIMEOUT_S)
        except PullFailed as failure:
            log.info("release not delivered, the lease will run out: %s", failure)

    def _failed(self, failure: PullFailed, wanted: Wanted, holder: WorkerRecord) -> None:
        facts = fields(
            request=wanted.request_id.hex(),
            holder=holder.boot_id,
            endpoint=holder.endpoint,
            failure=failure,
        )
        log.warning("cached pages not pulled", extra=facts)
        self._metrics.pulls.labels(failure.reason).inc()
        if failure.reason not in HARMLESS:
            self._workers.failed(holder)

    async def _stub(self, holder: WorkerRecord, timeout_s: float) -> PageStub:
        channel = await self._workers.channel(holder, timeout_s)
        return page_service_pb2_grpc.PageServiceStub(channel)

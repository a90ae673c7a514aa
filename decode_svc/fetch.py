"""Pulling cached pages out of another worker's pool: lease, read, verify, release (law 4).

Nothing that fails here fails the request: the pages are computed instead. Of a read that ends
without a valid commit, or after the lease, nothing is used.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc

from decode_svc.decider import Decider
from decode_svc.wanted import Wanted
from decode_svc.workers import KnownWorkers
from engine.core import EngineCore
from engine.lifecycle import Lifecycle
from engine.plan import Reservation
from engine.telemetry.logs import fields
from engine.telemetry.metrics import Metrics
from engine.telemetry.tracing import stage_span
from kvstore.index import WorkerRecord
from kvstore.landing import Landing, LandingError
from kvstore.page import PageFrame
from kvstore.prefix_hash import PrefixHasher
from kvstore.transports import PageSource, TransportUnavailable, receive
from kvstore.transports.choice import Transports
from kvstore.transports.grpc_wire import (
    WireError,
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


class PullFailed(Exception):
    """No page was taken over; ``reason`` is a short fixed word for metrics."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


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
        finally:
            self._tell(self._release(wanted, holder))
        self._metrics.pulls.labels("landed").inc()
        self._metrics.pulled_pages.inc(lease.num_pages)
        self._metrics.pulled_bytes.inc(num_bytes)
        return lease.num_pages

    async def _pull(
        self, wanted: Wanted, reservation: Reservation, holder: WorkerRecord, num_pages: int
    ) -> tuple[Lease, int]:
        core, first = self._core, reservation.num_cached_pages
        size = core.settings.page_size
        hasher = PrefixHasher(wanted.tenant, core.fingerprint.digest, size)
        names = hasher.full_pages(wanted.prompt_ids[: (first + num_pages) * size])
        async with self._telling_why():
            lease = await self._ask(wanted, holder, first, names[first:])
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
            num_bytes = await self._read(wanted, holder, lease, landing)
        self._decider.saw_pull(lease.delay_s, self._clock() - began, num_bytes)
        return lease, num_bytes

    async def _ask(
        self, wanted: Wanted, holder: WorkerRecord, first_page: int, names: list[bytes]
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
        response = await self._stub(holder).LeasePages(
            request, timeout=min(self._idle_s, wanted.remaining_s)
        )
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

    async def _read(
        self, wanted: Wanted, holder: WorkerRecord, lease: Lease, landing: Landing
    ) -> int:
        """Copies and verifies everything leased; returns its bytes."""
        request = pb.ReadPagesRequest(request_id=wanted.request_id, attempt=FIRST_ATTEMPT)
        call = self._stub(holder).ReadPages(request, timeout=wanted.remaining_s)
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

    @asynccontextmanager
    async def _telling_why(self) -> AsyncIterator[None]:
        """Whatever goes wrong between two workers is a PullFailed."""
        try:
            yield
        except LandingError as error:
            raise PullFailed(error.reason, str(error)) from error
        except TransportUnavailable as error:
            raise PullFailed("transport", str(error)) from error
        except WireError as error:
            raise PullFailed("malformed", str(error)) from error
        except TimeoutError as error:
            raise PullFailed("silent", f"no message for {self._idle_s} s") from error
        except grpc.aio.AioRpcError as error:
            raise PullFailed(error.code().name.lower(), error.details() or "") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise PullFailed("cancelled", "the channel was closed") from None

    async def _release(self, wanted: Wanted, holder: WorkerRecord) -> None:
        request = pb.ReleaseLeaseRequest(request_id=wanted.request_id, attempt=FIRST_ATTEMPT)
        try:
            await self._stub(holder).ReleaseLease(request, timeout=RELEASE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.info("release not delivered, the lease will run out: %s", error.code())

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

    def _stub(self, holder: WorkerRecord) -> page_service_pb2_grpc.PageServiceAsyncStub:
        return page_service_pb2_grpc.PageServiceStub(self._workers.channel(holder))

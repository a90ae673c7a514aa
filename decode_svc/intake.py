"""Intake of pages: reserved slots, where their pages come from, and what comes of it.

Whatever happens (no worker, a refusal, a broken or silent stream, a page that does not verify), the
sequence joins the batch: with all pages of a transfer after a valid commit, otherwise with none of
them, and they are computed here (the same tokens come out, law 1). Only cancellation leaves the
sequence alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc
from opentelemetry.trace import Span, get_current_span

from decode_svc.decider import Decider
from decode_svc.failures import HandoverFailed, telling_why
from decode_svc.fetch import Fetcher
from decode_svc.places import conversion_facts, landing_of
from decode_svc.sources import Sources
from decode_svc.wanted import Wanted
from decode_svc.workers import KnownWorkers
from engine.lifecycle import Lifecycle
from engine.mailbox import AsyncEngine
from engine.outputs import Reserved
from engine.plan import Landed, Reservation
from engine.request import Brought
from engine.telemetry.clock import now_ns
from engine.telemetry.group_spans import GroupSpans
from engine.telemetry.logs import fields
from engine.telemetry.metrics import Metrics
from engine.telemetry.tracing import current_context, record_stage, stage_span
from kvstore.converting_landing import ConvertingLanding
from kvstore.index import HandoverRecord, HandoverState, PageIndex, PageIndexError, WorkerRecord
from kvstore.landing import Landing, LandingError
from kvstore.transports import DEFAULT, PageSource, receive
from kvstore.transports.choice import Transports
from kvstore.transports.grpc_wire import (
    commit_from_wire,
    fingerprint_to_wire,
    frames_from_wire,
    transport_from_wire,
    transport_to_wire,
)
from quire.v1 import prefill_pb2 as pb
from quire.v1 import prefill_pb2_grpc

FIRST_ATTEMPT = 1
RELEASE_TIMEOUT_S = 2.0
HANDOVER_TTL_S = 60.0
log = logging.getLogger(__name__)

if TYPE_CHECKING:
    PrefillCall = grpc.aio.UnaryStreamCall[pb.PrefillRequest, pb.PrefillResponse]


@dataclass(slots=True)
class _Clocked:
    """What a handover took, on this process's monotonic clock."""

    called: float
    accepted: float = 0.0
    num_cached: int = 0


@dataclass(slots=True)
class _Pulled:
    """What a handover brought, and when its computation ended, by this process's clock.

    ``foreign`` is what the pages stand under if their numbers are not this worker's own.
    """

    foreign: bytes
    transport: str = DEFAULT
    num_bytes: int = 0
    computed_ns: int = 0


class IntakeDesk:
    """Runs pulls and handovers into this service's pool."""

    def __init__(
        self,
        engine: AsyncEngine,
        workers: KnownWorkers,
        transports: Transports,
        index: PageIndex,
        decider: Decider,
        metrics: Metrics,
        idle_s: float,
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._transports = transports
        self._index = index
        self._decider = decider
        self._metrics = metrics
        self._idle_s = idle_s
        self._sources = Sources(engine.core, index, workers, decider, metrics)
        self._fetcher = Fetcher(
            engine.core, workers, transports, decider, metrics, idle_s, self._tell
        )
        self._background: set[asyncio.Task[None]] = set()

    async def fill(self, wanted: Wanted, reserved: Reserved) -> Brought:
        """Fills reserved pages from other workers; returns what came that way."""
        reservation = reserved.reservation
        rest, prefill = await self._pull_first(wanted, reservation)
        page_size = self._engine.core.settings.page_size
        pulled = None
        if prefill is not None:
            num_sent = rest.num_tokens - rest.num_cached_pages * page_size
            with self._workers.sending(prefill, num_sent):
                pulled = await self._hand_over(wanted, rest, prefill)
        num_here = rest.num_cached_pages * page_size
        num_tokens = num_here if pulled is None else rest.num_tokens
        foreign = b"" if pulled is None else pulled.foreign
        self._engine.worker.post(Landed(reserved.name, num_tokens, foreign))
        if pulled is not None:
            self._watch_join(pulled.computed_ns)
        return Brought(num_tokens - reservation.num_cached_pages * page_size, foreign)

    async def close(self) -> None:
        """Waits for what is still being told to others."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _pull_first(
        self, wanted: Wanted, reservation: Reservation
    ) -> tuple[Reservation, WorkerRecord | None]:
        """Pulls what is to be pulled; what is left then, and the prefill worker to hand it over, or
        None if the rest is to be computed here."""
        route = await self._sources.route(wanted, reservation)
        if route.holder is None:
            return reservation, route.prefill
        num_pulled = await self._fetcher.pull(wanted, reservation, route.holder, route.num_pulled)
        if num_pulled:
            return _without_first(reservation, num_pulled), route.prefill
        route = await self._sources.route(wanted, reservation, may_pull=False)
        return reservation, route.prefill

    async def _hand_over(
        self, wanted: Wanted, reservation: Reservation, worker: WorkerRecord
    ) -> _Pulled | None:
        """Brings the pages here, verified and committed. None if they are not here."""
        try:
            landing = self._landing(wanted, reservation, worker)
        except LandingError as error:
            self._failed(HandoverFailed(error.reason, str(error)), wanted, worker)
            return None
        self._tell(self._offer(wanted, reservation, worker))
        call: PrefillCall | None = None
        try:
            with stage_span(Lifecycle.HANDOVER) as span, self._metrics.handover_seconds.time():
                span.set_attribute("quire.worker", worker.boot_id)
                with _reason_told(span), telling_why(HandoverFailed, self._idle_s):
                    channel = await self._workers.channel(worker, self._idle_s)
                    call = self._call(channel, wanted, landing, worker)
                    pulled = await self._pull(call, wanted, landing, worker)
                span.set_attribute("quire.bytes", pulled.num_bytes)
                span.set_attributes(conversion_facts(landing))
        except HandoverFailed as failure:
            self._failed(failure, wanted, worker)
            self._tell(self._settle(call, wanted, worker, HandoverState.FAILED))
            return None
        except asyncio.CancelledError:
            self._tell(self._settle(call, wanted, worker, HandoverState.CANCELLED))
            raise
        self._metrics.handovers.labels("landed").inc()
        self._metrics.handover_bytes.labels(pulled.transport).inc(pulled.num_bytes)
        log.debug(
            "handover landed",
            extra=fields(
                request=wanted.request_id.hex(),
                worker=worker.boot_id,
                transport=pulled.transport,
                bytes=pulled.num_bytes,
            ),
        )
        self._tell(self._settle(call, wanted, worker, HandoverState.LANDED))
        return pulled

    def _watch_join(self, computed_ns: int) -> None:
        """Measures until the engine takes the sequence in: what the requester waited for beyond
        the prefill itself."""
        trace = current_context()

        def joined(ended: Future[int]) -> None:
            if not ended.cancelled():
                ended_ns = ended.result()
                self._metrics.handover_exposed_seconds.observe((ended_ns - computed_ns) / 1e9)
                record_stage(Lifecycle.EXPOSED, computed_ns, ended_ns, trace)

        self._engine.worker.call(lambda _: now_ns()).add_done_callback(joined)

    def _failed(self, failure: HandoverFailed, wanted: Wanted, worker: WorkerRecord) -> None:
        facts = fields(
            request=wanted.request_id.hex(),
            worker=worker.boot_id,
            endpoint=worker.endpoint,
            failure=failure,
        )
        log.warning("handover failed, the prompt is computed here", extra=facts)
        self._metrics.handovers.labels(failure.reason).inc()
        if failure.reason != "resource_exhausted":
            self._workers.failed(worker)

    def _landing(
        self, wanted: Wanted, reservation: Reservation, worker: WorkerRecord
    ) -> Landing | ConvertingLanding:
        """Where the worker's pages go. Raises LandingError if they can have no place here."""
        return landing_of(
            reader=self._workers.reader,
            worker=worker,
            memory=self._engine.core.memory,
            tenant=wanted.tenant,
            prompt_ids=wanted.prompt_ids,
            first_page=reservation.num_cached_pages,
            slots=reservation.slots,
        )

    def _call(
        self,
        channel: grpc.aio.Channel,
        wanted: Wanted,
        landing: Landing | ConvertingLanding,
        worker: WorkerRecord,
    ) -> PrefillCall:
        reader = self._workers.reader
        request = pb.PrefillRequest(
            request_id=wanted.request_id,
            attempt=FIRST_ATTEMPT,
            token_ids=wanted.prompt_ids,
            num_pages_present=landing.first_source_page,
            fingerprint=fingerprint_to_wire(reader.fingerprint),
            source_fingerprint=reader.source(worker).digest,
            allow_foreign_kv=reader.allow_foreign,
            tenant=wanted.tenant,
            transports=map(
                transport_to_wire, self._transports.readable(bytes.fromhex(worker.boot_id))
            ),
        )
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        return stub.Prefill(request, timeout=wanted.remaining_s)

    async def _pull(
        self,
        call: PrefillCall,
        wanted: Wanted,
        landing: Landing | ConvertingLanding,
        worker: WorkerRecord,
    ) -> _Pulled:
        """Pulls all pages and the commit."""
        clocked = _Clocked(called=time.monotonic())
        pulled = await self._read(call, landing, worker, clocked)
        self._decider.saw_handover(
            worker=worker.boot_id,
            queued=worker.load.queued_tokens,
            delay_s=clocked.accepted - clocked.called,
            seconds=time.monotonic() - clocked.accepted,
            num_computed=len(wanted.prompt_ids) - 1 - clocked.num_cached,
            num_bytes=pulled.num_bytes,
        )
        return pulled

    async def _read(
        self,
        call: PrefillCall,
        landing: Landing | ConvertingLanding,
        worker: WorkerRecord,
        clocked: _Clocked,
    ) -> _Pulled:
        pulled = _Pulled(foreign=self._workers.reader.foreign(worker))
        spans = GroupSpans(Lifecycle.LAND, current_context())
        source: PageSource | None = None
        while True:
            async with asyncio.timeout(self._idle_s):
                response = await call.read()
            if not isinstance(response, pb.PrefillResponse):  # grpc.aio.EOF
                break
            match response.WhichOneof("message"):
                case "accepted":
                    if response.accepted.boot_id.hex() != worker.boot_id:
                        raise HandoverFailed("boot_id", "another worker answered")
                    clocked.accepted = time.monotonic()
                    clocked.num_cached = response.accepted.cached_tokens
                    chosen = transport_from_wire(response.accepted.transport)
                    pulled.transport = chosen.name
                    get_current_span().set_attribute("quire.transport", chosen.name)
                    source = await self._transports.source(
                        chosen, response.accepted.boot_id, landing.layout
                    )
                case "frames":
                    began = now_ns()
                    if source is None:
                        raise HandoverFailed("malformed", "pages before the request was accepted")
                    frames = frames_from_wire(response.frames)
                    num_bytes = await receive(frames, landing, source)
                    spans.record(frames, began, num_bytes)
                    pulled.num_bytes += num_bytes
                case "commit":
                    commit = commit_from_wire(response.commit)
                    pulled.computed_ns = now_ns() - round(commit.since_computed_s * 1e9)
                    spans.end()
                    with stage_span(Lifecycle.VERIFY) as span:
                        span.set_attribute("quire.pages", landing.num_landed_pages)
                        landing.finish(commit)
                    break
                case _:
                    pass
        landing.check_committed()
        return pulled

    async def _offer(self, wanted: Wanted, reservation: Reservation, worker: WorkerRecord) -> None:
        record = HandoverRecord(
            request_id=wanted.request_id.hex(),
            attempt=FIRST_ATTEMPT,
            state=HandoverState.OFFERED,
            prefill_boot_id=worker.boot_id,
            decode_boot_id=self._engine.core.boot_id.hex(),
            num_pages=len(reservation.slots),
            remaining_s=wanted.remaining_s,
        )
        await self._index.offer_handover(record, HANDOVER_TTL_S)

    async def _settle(
        self, call: PrefillCall | None, wanted: Wanted, worker: WorkerRecord, state: HandoverState
    ) -> None:
        """Ends the call, tells the owner to drop its lease, and Redis how it ended."""
        if call is not None:
            await _end(call, landed=state is HandoverState.LANDED)
            await self._release(wanted, worker, landed=state is HandoverState.LANDED)
        await self._index.move_handover(wanted.request_id.hex(), FIRST_ATTEMPT, state)

    async def _release(self, wanted: Wanted, worker: WorkerRecord, *, landed: bool) -> None:
        release = pb.ReleasePagesRequest(
            request_id=wanted.request_id,
            attempt=FIRST_ATTEMPT,
            landed=landed,
        )
        try:
            with telling_why(HandoverFailed, RELEASE_TIMEOUT_S):
                channel = await self._workers.channel(worker, RELEASE_TIMEOUT_S)
                stub = prefill_pb2_grpc.PrefillServiceStub(channel)
                await stub.ReleasePages(release, timeout=RELEASE_TIMEOUT_S)
        except HandoverFailed as failure:
            log.info("release not delivered, the lease will run out: %s", failure)

    def _tell(self, message: Awaitable[None]) -> None:
        """Off the request's path: a failure is logged and changes nothing."""
        task = asyncio.ensure_future(self._told(message))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _told(self, message: Awaitable[None]) -> None:
        try:
            await message
        except PageIndexError as error:
            log.debug("page index not told: %s", error)


def _without_first(reservation: Reservation, num_pages: int) -> Reservation:
    """What is left to fill when the first pages of a reservation are here."""
    return replace(
        reservation,
        slots=reservation.slots[num_pages:],
        num_cached_pages=reservation.num_cached_pages + num_pages,
    )


@contextmanager
def _reason_told(span: Span) -> Iterator[None]:
    """The span of a failed handover tells why it failed."""
    try:
        yield
    except HandoverFailed as failure:
        span.set_attribute("quire.failure", failure.reason)
        raise


async def _end(call: PrefillCall, *, landed: bool) -> None:
    """After a commit the owner ends the stream itself; anything else is cut off."""
    if landed:
        with suppress(TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await call.read()
    call.cancel()

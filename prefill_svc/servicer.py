"""PrefillService over gRPC: protobuf to domain values and back, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from engine.admission import Capacity, check_prompt
from engine.errors import (
    HandoverRejected,
    InvalidRequest,
    ResourceExhausted,
    ShuttingDown,
    StaleAttempt,
)
from engine.generation import PrefillTask
from engine.mailbox import AsyncEngine, Mailbox
from engine.outputs import Admitted
from engine.serving.leases import Leases, sequence_name
from engine.serving.status import maps_errors
from engine.telemetry.metrics import Metrics
from kvstore.fingerprint import LayoutFingerprint
from kvstore.page import Commit
from kvstore.transports import TransportAddress, TransportUnavailable
from kvstore.transports.choice import Transports
from kvstore.transports.grpc_wire import (
    WireError,
    commit_to_wire,
    fingerprint_from_wire,
    frame_to_wire,
    transport_from_wire,
    transport_to_wire,
)
from prefill_svc.config import PrefillSettings
from prefill_svc.export import Export, Message, num_bytes
from quire.v1 import pages_pb2, prefill_pb2_grpc
from quire.v1 import prefill_pb2 as pb

_REQUEST_ID_BYTES = 16
_MAX_TENANT = 128
_MAX_OUTPUTS = 1_000_000  # bounded by the prompt's own length


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Runs prompts and streams their pages.

    ``callers`` are the names under which pages are held that something here still answers for.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        capacity: Capacity,
        settings: PrefillSettings,
        handovers: Leases,
        callers: Callable[[], set[str]],
        transports: Transports,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._capacity = capacity
        self._settings = settings
        self._handovers = handovers
        self._callers = callers
        self._transports = transports
        self._metrics = metrics
        self.draining = False
        self.num_active = 0
        self.queued_tokens = 0

    @maps_errors
    async def Prefill(
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.PrefillResponse]:
        prompt_ids = self._admit(request)
        transport = self._transport(request)
        name = sequence_name(request.request_id, request.attempt)
        replaced = StaleAttempt(f"attempt {request.attempt} was replaced or released")
        self._handovers.begin(
            request.request_id, request.attempt, lambda: self._engine.abort(name, replaced)
        )
        mailbox = self._engine.open([name], _MAX_OUTPUTS)
        self.num_active += 1
        self.queued_tokens += len(prompt_ids)
        try:
            self._engine.submit([PrefillTask(name, prompt_ids, request.tenant)])
            async with aclosing(self._responses(request, mailbox, transport)) as responses:
                async for response in responses:
                    with self._patience():
                        yield response
            self._handovers.granted(request.request_id, request.attempt)
            self._engine.detach(mailbox)
        finally:
            self.num_active -= 1
            self.queued_tokens -= len(prompt_ids)
            self._engine.close(mailbox)
            self._handovers.abandon(request.request_id, request.attempt)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """A receiver that takes nothing, though its connection stands, does not keep pages."""
        task = asyncio.current_task()
        assert task is not None
        watch = asyncio.get_running_loop().call_later(self._settings.receiver_idle_s, task.cancel)
        try:
            yield
        finally:
            watch.cancel()

    @maps_errors
    async def ReleasePages(
        self, request: pb.ReleasePagesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReleasePagesResponse:
        released = self._handovers.release(request.request_id, request.attempt)
        return pb.ReleasePagesResponse(released=released)

    def _admit(self, request: pb.PrefillRequest) -> tuple[int, ...]:
        """The prompt, if this worker can and may run it now."""
        if len(request.request_id) != _REQUEST_ID_BYTES:
            raise InvalidRequest(
                "request_id", f"it has {len(request.request_id)} bytes", f"{_REQUEST_ID_BYTES}"
            )
        if request.attempt < 1:
            raise InvalidRequest("attempt", "it is 0", "1 or more")
        if len(request.tenant) > _MAX_TENANT:
            raise InvalidRequest("tenant", "it is too long", f"0 to {_MAX_TENANT} characters")
        if request.kv_group != 0:
            raise InvalidRequest("kv_group", f"it is {request.kv_group}", "0")
        self._check_fingerprint(request)
        check_prompt(request.token_ids, self._capacity)
        present = request.num_pages_present * self._engine.core.settings.page_size
        if present > len(request.token_ids) - 1:
            raise InvalidRequest(
                "num_pages_present", f"{request.num_pages_present}", "full pages of the prompt"
            )
        self._check_load(len(request.token_ids))
        return tuple(request.token_ids)

    def _transport(self, request: pb.PrefillRequest) -> TransportAddress:
        readable = [transport_from_wire(each) for each in request.transports]
        try:
            return self._transports.choose(readable)
        except TransportUnavailable as error:
            allowed = ", ".join(self._transports.names)
            raise InvalidRequest("transports", str(error), allowed) from None

    def _check_fingerprint(self, request: pb.PrefillRequest) -> None:
        try:
            theirs: LayoutFingerprint = fingerprint_from_wire(request.fingerprint)
        except WireError as error:
            raise HandoverRejected(str(error)) from None
        ours = self._engine.core.fingerprint
        fit = ours.compatibility(theirs)
        if not fit.readable(allow_foreign=request.allow_foreign_kv):
            raise HandoverRejected(f"{fit} layout fingerprints: {ours.differences(theirs)}")
        if (request.source_fingerprint or theirs.digest) != ours.digest:
            raise HandoverRejected(
                f"pages of another layout fingerprint expected: {ours.differences(theirs)}"
            )

    def _check_load(self, num_tokens: int) -> None:
        settings = self._settings
        if self.draining:
            raise ShuttingDown("the service is draining")
        if self.num_active >= settings.max_requests:
            raise ResourceExhausted(f"{self.num_active} prompts are in progress")
        if self.num_active and self.queued_tokens + num_tokens > settings.max_queued_tokens:
            raise ResourceExhausted(f"{self.queued_tokens} prompt tokens are in progress")
        self._check_leases()

    def _check_leases(self) -> None:
        """Pages that nobody fetches or acknowledges must leave room for those of others. What was
        released leaves it at once, before the engine's thread has heard of that."""
        pool = self._engine.core.pool
        num_leased = pool.ledger.num_leased
        if num_leased * 2 > pool.num_pages:
            num_leased = pool.ledger.num_leased_to(self._callers())
        if num_leased * 2 > pool.num_pages:
            raise ResourceExhausted(
                f"{num_leased} of {pool.num_pages} pages wait for an acknowledgement",
                self._handovers.lease_s,
            )

    async def _responses(
        self, request: pb.PrefillRequest, mailbox: Mailbox, transport: TransportAddress
    ) -> AsyncGenerator[pb.PrefillResponse, None]:
        export = Export(
            self._engine,
            mailbox,
            len(request.token_ids) - 1,
            request.num_pages_present,
            with_payload=self._transports.carries_payload(transport),
        )
        messages = export.messages()
        try:
            async for message in messages:
                yield self._to_wire(message, transport)
        finally:
            await messages.aclose()

    def _to_wire(self, message: Message, transport: TransportAddress) -> pb.PrefillResponse:
        match message:
            case Admitted():
                accepted = pb.PrefillAccepted(
                    boot_id=self._engine.core.boot_id,
                    cached_tokens=message.cached_tokens,
                    lease_s=self._handovers.lease_s,
                    transport=transport_to_wire(transport),
                )
                return pb.PrefillResponse(accepted=accepted)
            case Commit():
                self._metrics.handovers.labels("committed").inc()
                return pb.PrefillResponse(commit=commit_to_wire(message))
            case int():
                return pb.PrefillResponse(progress=pb.PrefillProgress(num_tokens=message))
            case _:
                moved = num_bytes(message, self._engine.core.memory.groups)
                self._metrics.handover_bytes.labels(transport.name).inc(moved)
                frames = pages_pb2.PageFrames(frames=map(frame_to_wire, message))
                return pb.PrefillResponse(frames=frames)

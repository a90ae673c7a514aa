"""PageService, served by every worker: cached pages, lent to whoever can name them.

::

    LeasePages ──▶ the scheduler leases what is here ──▶ granted until released or out of time
    ReadPages  ──▶ per layer group: lease still held? copy, send ──▶ lease still held? commit

A lease that ends, however it ends, ends on this event loop; a layer group is copied without giving
the loop away, so no page can be taken from under a copy. Where the reader copies by itself, it
looks at the page's generation after the copy.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import grpc

from engine.errors import (
    HandoverRejected,
    InvalidRequest,
    ResourceExhausted,
    ShuttingDown,
    StaleAttempt,
)
from engine.lending import Lend
from engine.mailbox import AsyncEngine, Mailbox
from engine.outputs import Lent
from engine.serving.leases import Leases, sequence_name
from engine.serving.status import maps_errors
from engine.telemetry.metrics import Metrics
from kvstore.fingerprint import LayoutFingerprint
from kvstore.page import Commit, PageFrame, PageIdentity, digest_of
from kvstore.prefix_hash import HASH_BYTES
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
from kvstore.transports.lease_wire import granted_to_wire
from quire.v1 import page_service_pb2 as pb
from quire.v1 import page_service_pb2_grpc

MAX_LEASES = 1024
MAX_PAGES = 4096
MAX_FIRST_PAGE = 2**31 - 1
_REQUEST_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Lease:
    """What is lent: announcements in order of page and group, and whether bytes go with them."""

    frames: tuple[PageFrame, ...]
    with_payload: bool


class PageServicer(page_service_pb2_grpc.PageServiceServicer):
    """Tells who is here and lends this worker's cached pages; ``draining`` tells that it grants no
    more leases."""

    def __init__(
        self,
        engine: AsyncEngine,
        role: str,
        leases: Leases,
        transports: Transports,
        metrics: Metrics,
        draining: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._role = role
        self._leases = leases
        self._transports = transports
        self._metrics = metrics
        self._draining = draining
        self._asking: dict[str, Mailbox] = {}
        self._lent: dict[str, _Lease] = {}

    @maps_errors
    async def Identify(
        self, request: pb.IdentifyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.IdentifyResponse:
        core = self._engine.core
        return pb.IdentifyResponse(
            boot_id=core.boot_id, role=self._role, fingerprint=core.fingerprint.digest
        )

    @maps_errors
    async def LeasePages(
        self, request: pb.LeasePagesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.LeasePagesResponse:
        self._check(request)
        transport = self._transport(request)
        name = _name(request)
        self._leases.begin(request.request_id, request.attempt, lambda: self._end(name))
        try:
            lent = await self._lend(name, request)
            frames = [frame for page in lent.pages for frame in self._announced(page)]
            if frames:
                with_payload = self._transports.carries_payload(transport)
                self._lent[name] = _Lease(tuple(frames), with_payload)
                self._leases.granted(request.request_id, request.attempt)
        finally:
            self._leases.abandon(request.request_id, request.attempt)
        self._metrics.leases.labels(lent.refusal or "granted").inc()
        return pb.LeasePagesResponse(
            boot_id=self._engine.core.boot_id,
            pages=granted_to_wire(frames),
            lease_s=self._leases.lease_s,
            refusal=lent.refusal,
            transport=transport_to_wire(transport),
        )

    @maps_errors
    async def ReadPages(
        self, request: pb.ReadPagesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ReadPagesResponse]:
        lease = self._lease(request)
        groups = self._engine.core.memory.groups
        for frame in lease.frames:
            sent = self._with_payload(frame) if self._lease(request).with_payload else frame
            self._metrics.lent_bytes.inc(groups.num_bytes(frame.layer_group))
            yield pb.ReadPagesResponse(frame=frame_to_wire(sent))
        self._lease(request)
        yield pb.ReadPagesResponse(commit=commit_to_wire(_commit(lease.frames)))

    @maps_errors
    async def ReleaseLease(
        self, request: pb.ReleaseLeaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReleaseLeaseResponse:
        released = self._leases.release(request.request_id, request.attempt)
        return pb.ReleaseLeaseResponse(released=released)

    async def _lend(self, name: str, request: pb.LeasePagesRequest) -> Lent:
        """What the scheduler lends; nothing stays leased if the caller leaves meanwhile."""
        self._asking[name] = mailbox = self._engine.open([name], limit=1)
        try:
            lend = Lend(name, tuple(request.prefix_hashes), request.first_page)
            self._engine.worker.post(lend)
            (lent,) = await mailbox.get()
            assert isinstance(lent, Lent), lent
            if lent.pages:
                self._engine.detach(mailbox)
            return lent
        finally:
            del self._asking[name]
            self._engine.close(mailbox)

    def _end(self, name: str) -> None:
        """The attempt was released, replaced, or ran out of time."""
        if name in self._asking:
            self._asking[name].fail(StaleAttempt("the attempt was released or replaced"))
        self._lent.pop(name, None)
        self._engine.worker.cancel(name)

    def _lease(self, request: pb.ReadPagesRequest) -> _Lease:
        """What may be read at this moment. Raises HandoverRejected, StaleAttempt."""
        if not self._leases.holds(request.request_id, request.attempt):
            raise HandoverRejected("the lease is over, or was never granted")
        return self._lent[_name(request)]

    def _announced(self, page: PageIdentity) -> list[PageFrame]:
        """The frames of a leased page, without its bytes."""
        digests, count = self._engine.digests, self._engine.core.memory.groups.count
        return [
            PageFrame(page, group, count, None, digests.of(page, group)) for group in range(count)
        ]

    def _with_payload(self, frame: PageFrame) -> PageFrame:
        memory = self._engine.core.memory
        slot = frame.identity.reference.slot
        return replace(frame, payload=bytes(memory.group(slot, frame.layer_group)))

    def _transport(self, request: pb.LeasePagesRequest) -> TransportAddress:
        readable = [transport_from_wire(each) for each in request.transports]
        try:
            return self._transports.choose(readable)
        except TransportUnavailable as error:
            allowed = ", ".join(self._transports.names)
            raise InvalidRequest("transports", str(error), allowed) from None

    def _check(self, request: pb.LeasePagesRequest) -> None:
        """Raises unless pages may be asked for in this way."""
        if self._draining():
            raise ShuttingDown("the service is draining")
        if len(self._leases) >= MAX_LEASES:
            raise ResourceExhausted(f"{len(self._leases)} leases are held")
        if len(request.request_id) != _REQUEST_ID_BYTES:
            raise InvalidRequest(
                "request_id", f"it has {len(request.request_id)} bytes", f"{_REQUEST_ID_BYTES}"
            )
        if request.attempt < 1:
            raise InvalidRequest("attempt", "it is 0", "1 or more")
        if request.first_page > MAX_FIRST_PAGE:
            raise InvalidRequest("first_page", f"{request.first_page}", f"0 to {MAX_FIRST_PAGE}")
        if not 1 <= len(request.prefix_hashes) <= MAX_PAGES:
            raise InvalidRequest(
                "prefix_hashes", f"there are {len(request.prefix_hashes)}", f"1 to {MAX_PAGES}"
            )
        if any(len(each) != HASH_BYTES for each in request.prefix_hashes):
            raise InvalidRequest("prefix_hashes", "one is too short or long", f"{HASH_BYTES} bytes")
        self._check_fingerprint(request)

    def _check_fingerprint(self, request: pb.LeasePagesRequest) -> None:
        try:
            theirs: LayoutFingerprint = fingerprint_from_wire(request.fingerprint)
        except WireError as error:
            raise HandoverRejected(str(error)) from None
        ours = self._engine.core.fingerprint
        if theirs != ours:
            raise HandoverRejected(f"layout fingerprints differ: {ours.differences(theirs)}")


def lent_name(name: str) -> str:
    """Of a lease on cached pages: apart from the names of sequences, so that a request may borrow
    from its own worker."""
    return f"lent {name}"


def _name(request: pb.LeasePagesRequest | pb.ReadPagesRequest) -> str:
    return lent_name(sequence_name(request.request_id, request.attempt))


def _commit(frames: Sequence[PageFrame]) -> Commit:
    last = frames[-1].identity
    num_pages = last.page_index + 1
    pages = groupby(frames, key=lambda frame: frame.identity)
    return Commit(
        num_pages=num_pages,
        num_tokens=num_pages * last.num_tokens,
        pages_digest=digest_of(digest_of(frame.digest for frame in page) for _, page in pages),
        prompt_hash=last.reference.prefix_hash,
    )

"""One call between two simulated processes, from both ends, and what may happen on the way."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from tests.simulation.process import Process, current_process

if TYPE_CHECKING:
    from tests.simulation.network import Channel, Network

ROUTES = {
    "/quire.v1.PrefillService/Prefill": "prefill",
    "/quire.v1.PrefillService/ReleasePages": "release",
    "/quire.v1.InferenceService/Generate": "generate",
    "/quire.v1.PageService/Identify": "identify",
    "/quire.v1.PageService/LeasePages": "lease",
    "/quire.v1.PageService/ReadPages": "read",
    "/quire.v1.PageService/ReleaseLease": "unlease",
}
WINDOW = 6  # messages that a server may be ahead of its reader
_TINY_S = 1e-6  # between two messages of one stream: timers of equal time have no order
_OK = (grpc.StatusCode.OK, "", ())
_BROKEN = (grpc.StatusCode.UNAVAILABLE, "the connection broke", ())
_REFUSED = (grpc.StatusCode.UNAVAILABLE, "connection refused", ())

Status = tuple[grpc.StatusCode, str, Any]


class Call:
    """One call, from both ends."""

    def __init__(
        self,
        network: Network,
        endpoint: str,
        path: str,
        request: bytes,
        timeout_s: float | None,
        deserialize: Callable[[bytes], Any],
        route: str = "",
        channel: Channel | None = None,
    ) -> None:
        self.route = route or ROUTES.get(path, path)
        self.number = network.num_calls[self.route]
        network.num_calls[self.route] += 1
        self.client = current_process()
        self.server: Process | None = None
        self._network = network
        self._channel = channel
        self._loop = network.loop
        self._endpoint = endpoint
        self._path = path
        self._timeout_s = timeout_s
        self._deserialize = deserialize
        self._inbox: deque[bytes] = deque()
        self._status: Status | None = None
        self._cancelled = False
        self._arrived = asyncio.Event()
        self._read = asyncio.Event()
        self._num_sent = 0
        self._severed = False
        self._last_arrival = 0.0
        self._held: list[Callable[[], None]] = []
        self._handler: asyncio.Task[None] | None = None
        network.begin(self)
        if timeout_s is not None:
            late = (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())
            self._timer = self._loop.later(timeout_s, self._finish, late)
        if self.client.alive:
            self._send(self.client, None, request, self._serve)
        else:
            self._finish(_BROKEN)

    # -- the client's end

    async def read(self) -> Any:
        """The next response, or EOF. Raises AioRpcError, or CancelledError after ``cancel``."""
        try:
            while not self._inbox and self._status is None:
                self._arrived.clear()
                await self._arrived.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._cancelled:
            raise asyncio.CancelledError
        if self._inbox:
            self._read.set()
            return self._parsed(self._inbox.popleft())
        assert self._status is not None
        code, details, trailing = self._status
        if code is grpc.StatusCode.OK:
            return grpc.aio.EOF
        raise grpc.aio.AioRpcError(code, None, grpc.aio.Metadata(*trailing), details)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._responses()

    async def _responses(self) -> AsyncIterator[Any]:
        while (response := await self.read()) is not grpc.aio.EOF:
            yield response

    def cancel(self) -> bool:
        if self._status is not None:
            return False
        self._cancelled = True
        self._finish((grpc.StatusCode.CANCELLED, "Locally cancelled", ()))
        return True

    def cancelled(self) -> bool:
        return self._cancelled

    def done(self) -> bool:
        return self._status is not None

    def _parsed(self, payload: bytes) -> Any:
        try:
            return self._deserialize(payload)
        except Exception as error:
            self._finish((grpc.StatusCode.INTERNAL, f"not parsed: {error}", ()))
            raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, None, None, str(error)) from None

    def _receive(self, payload: bytes) -> None:
        if self._status is None:
            self._network.trace("response", self.route, self.number, payload)
            self._inbox.append(payload)
            self._arrived.set()

    def _finish(self, status: Status) -> None:
        """The client has its answer; a server that goes on is told a little later."""
        if self._status is not None:
            return
        self._network.trace("status", self.route, self.number, status[0].name)
        self._network.end(self)
        self._status = status
        if self._timeout_s is not None:
            self._timer.cancel()
        self._arrived.set()
        self._loop.later(self._latency("end"), self._end_handler)

    # -- the wire

    def cut(self) -> None:
        """The connection is gone; both ends learn it."""
        self._loop.later(self._latency("cut"), self._finish, _BROKEN)
        if self._channel is not None:
            self._channel.disconnect()
        self._end_handler()

    def _send(
        self,
        sender: Process | None,
        receiver: Process | None,
        payload: bytes,
        deliver: Callable[[bytes], None],
    ) -> None:
        number = self._num_sent
        self._num_sent += 1
        sent = self._loop.now if sender is None else sender.thawed(self._loop.now)
        arrival = sent + self._latency(number)
        copies, hold = 1, False
        for fault in self._network.faults(self.route, self.number, number):
            self._network.reached(f"{fault.kind} in {self.route}")
            match fault.kind:
                case "cut":
                    self._severed = True
                    self._loop.at(arrival, self.cut)
                case "late":
                    arrival += fault.seconds
                case "twice":
                    copies = 2
                case "swap":
                    hold = True
                case "flip" if payload:
                    payload = _flipped(payload, fault.bit)
                case "again":
                    self._loop.at(sent + fault.seconds, self._repeat, payload, fault.bit)
        if self._severed:
            return
        if receiver is not None:
            arrival = receiver.thawed(arrival)
        self._last_arrival = arrival = max(arrival, self._last_arrival + _TINY_S)
        held, self._held = self._held, []
        if hold:
            self._held = [lambda: deliver(payload)]
            self._loop.at(arrival + self._latency("held"), self._let_go, self._held)
        else:
            self._loop.at(arrival, _all, [lambda: deliver(payload)] * copies + held)
            held.clear()

    def _let_go(self, held: list[Callable[[], None]]) -> None:
        """A message held back for the next one, which did not come."""
        if self._held is held:
            self._held = []
            _all(held)

    def _repeat(self, request: bytes, attempts: int) -> None:
        self._network.repeat(self._endpoint, self._path, request, attempts)

    def _latency(self, what: object) -> float:
        chance = self._network.chance
        if chance("slow", self.route, self.number, what) < 0.03:
            return 20 * self._network.max_latency_s
        return self._network.max_latency_s * chance("wire", self.route, self.number, what)

    # -- the server's end

    def _serve(self, request: bytes) -> None:
        process = self._network.listening.get(self._endpoint)
        if self._status is not None:
            return
        if process is None or not process.alive:
            self._finish(_REFUSED)
            return
        self.server = process
        if self._channel is not None:
            self._channel.connect(process)
        self._network.trace("request", self.route, self.number, request)
        wake = process.thawed(self._loop.now)
        if wake > self._loop.now:
            self._loop.at(wake, self._serve, request)
            return
        handler = process.handler(self._path)
        self._handler = process.run(self._handle(handler, request))

    async def _handle(self, handler: Any, request: bytes) -> None:
        context = ServerContext(self, handler.response_serializer)
        parse = handler.request_deserializer
        behaviour = handler.unary_stream or handler.unary_unary
        try:
            response = await behaviour(parse(request) if parse else request, context)
            if response is not None:
                await context.write(response)
            status: Status = _OK
        except grpc.aio.AbortError:
            assert context.status is not None
            status = context.status
        self.respond(b"", lambda _: self._finish(status))

    def respond(self, payload: bytes, deliver: Callable[[bytes], None] | None = None) -> None:
        assert self.server is not None
        if self.server.alive:
            self._send(self.server, self.client, payload, deliver or self._receive)

    async def room(self) -> None:
        """Waits while the client is too many messages behind."""
        while len(self._inbox) >= WINDOW:
            self._read.clear()
            await self._read.wait()

    @property
    def remaining_s(self) -> float | None:
        return None if self._timeout_s is None else self._timer.when() - self._loop.now

    def served_by(self, process: Process) -> bool:
        running = self._handler is not None and not self._handler.done()
        return running and self.server is process

    def _end_handler(self) -> None:
        if self._handler is not None and not self._handler.done():
            self._handler.cancel()


@dataclass
class ServerContext:
    """The part of ``grpc.aio.ServicerContext`` that handlers use."""

    call: Call
    serialize: Callable[[Any], bytes]
    status: Status | None = None

    async def write(self, message: Any) -> None:
        await self.call.room()
        self.call.respond(self.serialize(message))

    async def abort_with_status(self, status: Any) -> None:
        self.status = (status.code, status.details, status.trailing_metadata)
        raise grpc.aio.AbortError

    def time_remaining(self) -> float | None:
        return self.call.remaining_s


def _all(deliveries: list[Callable[[], None]]) -> None:
    for deliver in deliveries:
        deliver()


def _flipped(payload: bytes, bit: int) -> bytes:
    changed = bytearray(payload)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)

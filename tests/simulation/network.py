"""gRPC without sockets: calls between simulated processes, with everything that can go wrong.

Stubs and servicers are the real ones, and so are the bytes between them; this is the channel below
the stub and the server around the handler. Messages of a call keep their order unless a fault says
otherwise; those of different calls overtake each other.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from quire.v1 import page_service_pb2, prefill_pb2
from tests.simulation.call import ROUTES, Call
from tests.simulation.chance import Chance
from tests.simulation.process import Process
from tests.simulation.scenario import Fault
from tests.simulation.virtual_time import VirtualLoop

_MESSAGES = {
    "prefill": (prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse),
    "release": (prefill_pb2.ReleasePagesRequest, prefill_pb2.ReleasePagesResponse),
    "lease": (page_service_pb2.LeasePagesRequest, page_service_pb2.LeasePagesResponse),
    "unlease": (page_service_pb2.ReleaseLeaseRequest, page_service_pb2.ReleaseLeaseResponse),
}
_GHOST_S = 5.0


class Network:
    """Who listens where, and the faults of the wire."""

    def __init__(
        self, loop: VirtualLoop, chance: Chance, max_latency_s: float, faults: tuple[Fault, ...]
    ) -> None:
        self.loop = loop
        self.listening: dict[str, Process] = {}
        self.chance = chance
        self.max_latency_s = max_latency_s
        self.num_calls: Counter[str] = Counter()
        self.trace: Callable[..., None] = lambda *what: None
        self.reached: Callable[[str], None] = lambda what: None
        self.nobody = Process("nobody")
        self._calls: dict[Call, None] = {}
        self._channels: list[Channel] = []
        self._faults: defaultdict[tuple[str, int, int], list[Fault]] = defaultdict(list)
        for fault in faults:
            self._faults[fault.node, fault.call, fault.message].append(fault)

    def open_channel(self, endpoint: str, **options: Any) -> Channel:
        """Stands in for ``grpc.aio.insecure_channel``."""
        channel = Channel(self, endpoint)
        self._channels.append(channel)
        return channel

    def faults(self, route: str, call: int, message: int) -> list[Fault]:
        return self._faults.get((route, call, message), [])

    def begin(self, call: Call) -> None:
        self._calls[call] = None

    def end(self, call: Call) -> None:
        self._calls.pop(call, None)

    def repeat(self, endpoint: str, path: str, payload: bytes, attempts: int) -> None:
        """A request once more, from nobody who would release what it makes; ``attempts`` later."""
        request, response = _MESSAGES[ROUTES[path]]
        message = request.FromString(payload)
        message.attempt += attempts
        self.nobody.run(self._repeat(endpoint, path, message.SerializeToString(), response))

    async def _repeat(self, endpoint: str, path: str, payload: bytes, response: Any) -> None:
        call = Call(self, endpoint, path, payload, _GHOST_S, response.FromString, route="again")
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
            code = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            code = error.code()
        self.reached(f"a request again: {code.name}")

    def busy_with(self, process: Process) -> list[str]:
        """Routes of the calls that a process serves or makes at this moment."""
        return [call.route for call in self._calls if process in (call.client, call.server)]

    async def served(self, process: Process) -> None:
        """Returns when no call that the process serves is in progress."""
        while any(call.served_by(process) for call in self._calls):  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.01)

    def disconnect(self, process: Process) -> None:
        """The process has died: whoever talked to it is told by its system."""
        for call in list(self._calls):
            if process in (call.client, call.server):
                call.cut()
        for channel in self._channels:
            if channel.server is process:
                channel.disconnect()


class Channel:
    """The part of ``grpc.aio.Channel`` that stubs and ``Peer`` use.

    It is connected to the process that its first call reached, until that dies or a call is cut.
    """

    def __init__(self, network: Network, endpoint: str) -> None:
        self._network = network
        self._endpoint = endpoint
        self._calls: list[Call] = []
        self._lost = asyncio.Event()
        self.server: Process | None = None

    def get_state(self) -> grpc.ChannelConnectivity:
        states = grpc.ChannelConnectivity
        return states.IDLE if self.server is None else states.READY

    async def wait_for_state_change(self, state: grpc.ChannelConnectivity) -> None:
        if self.get_state() is state:
            await self._lost.wait()

    def connect(self, process: Process) -> None:
        if self.server is not process:
            self.disconnect()
            self.server = process

    def disconnect(self) -> None:
        self.server = None
        self._lost.set()
        self._lost = asyncio.Event()

    def unary_stream(
        self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any
    ) -> Callable[..., Call]:
        def call(request: Any, timeout: float | None = None, **_: Any) -> Call:
            payload = request_serializer(request)
            made = Call(
                self._network,
                self._endpoint,
                path,
                payload,
                timeout,
                response_deserializer,
                channel=self,
            )
            self._calls.append(made)
            return made

        return call

    def unary_unary(
        self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any
    ) -> Callable[..., asyncio.Task[Any]]:
        make = self.unary_stream(path, request_serializer, response_deserializer)

        async def answer(call: Call) -> Any:
            response = await call.read()
            if response is grpc.aio.EOF:
                raise AssertionError(f"{path} answered nothing")
            await call.read()
            return response

        return lambda *args, **options: asyncio.ensure_future(answer(make(*args, **options)))

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()

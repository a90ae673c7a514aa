"""A service with nothing inside, to try the serving machinery on: in process, or as a program."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from engine.errors import InvalidRequest, ShuttingDown
from engine.serving.deadline import remaining_s
from engine.serving.server import Listen, run_service, serve
from engine.serving.status import maps_errors
from engine.telemetry.logs import setup_logging

SERVICE = "test.v1.EchoService"


class EchoRole:
    """Records its life in ``events``; its handlers are what the tests need."""

    name = "echo"
    service_names = (SERVICE,)

    def __init__(self) -> None:
        self.events: list[str] = []
        self.may_warm = asyncio.Event()
        self.may_warm.set()
        self.may_finish = asyncio.Event()
        self.draining = asyncio.Event()
        self.warm_error: Exception | None = None
        self.drain_error: Exception | None = None
        self.endpoint = ""

    def register(self, server: grpc.aio.Server) -> None:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "Echo": unary(self.Echo),
            "Refuse": unary(self.Refuse),
            "Break": unary(self.Break),
            "BreakStream": stream(self.BreakStream),
            "StrayCancel": unary(self.StrayCancel),
            "Remaining": unary(self.Remaining),
            "Large": unary(self.Large),
            "Tick": stream(self.Tick),
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
        server.add_generic_rpc_handlers((handler,))

    async def warm(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.events.append("warm")
        await self.may_warm.wait()
        if self.warm_error:
            raise self.warm_error

    async def drain(self, timeout_s: float) -> None:
        self.events.append("drain")
        self.draining.set()
        if self.drain_error:
            raise self.drain_error

    def hand_back(self) -> None:
        self.events.append("hand_back")

    async def release(self) -> None:
        self.events.append("release")

    @maps_errors
    async def Echo(self, request: bytes, context: Any) -> bytes:
        if self.draining.is_set():
            raise ShuttingDown("the service is draining")
        return request

    @maps_errors
    async def Refuse(self, request: bytes, context: Any) -> bytes:
        raise InvalidRequest("stop", "one is " + "ß" * 10_000, "1 to 256 characters")

    @maps_errors
    async def Break(self, request: bytes, context: Any) -> bytes:
        raise KeyError("a secret of ours")

    @maps_errors
    async def BreakStream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        raise KeyError("a secret of ours")

    @maps_errors
    async def StrayCancel(self, request: bytes, context: Any) -> bytes:
        task = asyncio.ensure_future(asyncio.Event().wait())
        task.cancel()
        await task
        return b""

    @maps_errors
    async def Remaining(self, request: bytes, context: Any) -> bytes:
        return str(remaining_s(context, 100.0)).encode()

    @maps_errors
    async def Large(self, request: bytes, context: Any) -> bytes:
        return b"x" * int(request)

    @maps_errors
    async def Tick(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """One message, then, as soon as it may finish, another."""
        self.events.append("tick")
        try:
            yield b"first"
            await self.may_finish.wait()
            yield b"last"
        except asyncio.CancelledError:
            self.events.append("cancelled")
            for _ in range(50):  # a clean-up that takes a while
                await asyncio.sleep(0)
            raise
        finally:
            self.events.append("tock")


async def finish_after_drain_began(role: EchoRole) -> None:
    """Lets streams finish only once the service drains: they outlive the signal for sure."""
    await role.draining.wait()
    role.may_finish.set()


async def run(stop: asyncio.Event, port: int, stubborn: bool) -> None:
    role = EchoRole()
    finisher = asyncio.create_task(finish_after_drain_began(role))
    if stubborn:
        finisher.cancel()
    try:
        await serve(role, Listen("127.0.0.1", port), stop)
    finally:
        finisher.cancel()
        print(",".join(role.events), flush=True)


def main() -> int:
    setup_logging("echo", "info")
    port, stubborn = int(sys.argv[1]), "stubborn" in sys.argv
    return run_service(lambda stop: run(stop, port, stubborn))


if __name__ == "__main__":
    sys.exit(main())

"""Counting the calls in progress, so that a drain knows when the last one has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from engine.telemetry.handlers import is_ours, wrap_handler


class RunningCalls(grpc.aio.ServerInterceptor):
    """Counts handlers of ours that run. A watched health check does not count: it never ends."""

    def __init__(self) -> None:
        self.num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Returns when no handler runs, its clean-up included; the caller sets the time-out."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or not is_ours(handler_call_details.method):
            return handler
        return wrap_handler(handler, self._counted)

    @asynccontextmanager
    async def _counted(self, context: object) -> AsyncIterator[None]:
        self.num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_running -= 1
            if not self.num_running:
                self._idle.set()

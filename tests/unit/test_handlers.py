"""Handlers of a gRPC server: closed whatever happens to the client, in both styles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from engine.telemetry.handlers import ClientGone, is_ours, run_handler, wrap_handler


class Context:
    """A client that goes away after ``patience`` messages, as grpc.aio tells it."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.written: list[bytes] = []

    async def write(self, message: bytes) -> None:
        if len(self.written) == self.patience:
            raise grpc.aio.InternalError("Failed execute_batch")
        self.written.append(message)


class Handlers:
    def __init__(self) -> None:
        self.closed = False

    async def unary(self, request: bytes, context: Context) -> bytes:
        return request

    async def stream(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            for _ in range(3):
                yield request
        finally:
            await asyncio.sleep(0)  # a clean-up may await
            self.closed = True

    async def written(self, request: bytes, context: Context) -> None:
        for _ in range(3):
            await context.write(request)


async def test_unary_handler_returns_its_response() -> None:
    assert await run_handler(Handlers().unary, b"x", Context(0)) == b"x"


@pytest.mark.parametrize("style", ["stream", "written"])
async def test_streaming_handler_is_written_out_whole(style: str) -> None:
    context = Context(3)
    assert await run_handler(getattr(Handlers(), style), b"x", context) is None
    assert context.written == [b"x"] * 3


@pytest.mark.parametrize("style", ["stream", "written"])
async def test_failed_write_means_that_the_client_is_gone(style: str) -> None:
    with pytest.raises(ClientGone):
        await run_handler(getattr(Handlers(), style), b"x", Context(1))


async def test_generator_is_closed_before_a_failed_write_is_told() -> None:
    handlers = Handlers()
    with pytest.raises(ClientGone):
        await run_handler(handlers.stream, b"x", Context(1))
    assert handlers.closed


@pytest.mark.parametrize(
    ("make", "request_streaming", "response_streaming"),
    [
        (grpc.unary_unary_rpc_method_handler, False, False),
        (grpc.unary_stream_rpc_method_handler, False, True),
        (grpc.stream_unary_rpc_method_handler, True, False),
        (grpc.stream_stream_rpc_method_handler, True, True),
    ],
)
async def test_wrapped_handler_keeps_its_kind_and_runs_inside(
    make: Any, request_streaming: bool, response_streaming: bool
) -> None:
    events = []

    @asynccontextmanager
    async def around(context: object) -> AsyncIterator[None]:
        events.append("enter")
        yield
        events.append("exit")

    async def behaviour(request: object, context: object) -> None:
        events.append("run")

    wrapped = wrap_handler(make(behaviour, bytes, bytearray), around)
    assert wrapped.request_streaming is request_streaming
    assert wrapped.response_streaming is response_streaming
    assert (wrapped.request_deserializer, wrapped.response_serializer) == (bytes, bytearray)
    style = f"{'stream' if request_streaming else 'unary'}_"
    style += "stream" if response_streaming else "unary"
    await getattr(wrapped, style)(b"", None)
    assert events == ["enter", "run", "exit"]


def test_health_and_reflection_are_not_ours() -> None:
    assert is_ours("/quire.v1.InferenceService/Generate")
    assert not is_ours("/grpc.health.v1.Health/Check")
    assert not is_ours("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")

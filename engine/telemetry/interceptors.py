"""Spans around gRPC calls, on both sides of the wire.

Written for grpc.aio's habits: a client span ends in the call's done callback, so nothing is awaited
on the way and cancellation reaches the call untouched; it ends also when nobody reads the call. A
server span tells a cancelled call from one whose deadline passed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, use_span

from engine.telemetry.attributes import RPC_METHOD, RPC_RESPONSE_STATUS_CODE, RPC_SYSTEM_NAME
from engine.telemetry.handlers import is_ours, wrap_handler
from engine.telemetry.tracing import extract, fail, inject, start_span

# A client cancels at its own deadline, which reaches the server a moment before the server's does.
_DEADLINE_MARGIN_S = 0.05

Call = grpc.aio.UnaryUnaryCall[Any, Any] | grpc.aio.UnaryStreamCall[Any, Any]


def client_interceptors() -> list[grpc.aio.ClientInterceptor]:
    """For ``grpc.aio.insecure_channel``; two, because grpc.aio registers each for one style."""
    return [_UnaryUnary(), _UnaryStream()]


class TracingServerInterceptor(grpc.aio.ServerInterceptor):
    """A SERVER span around every handler of ours, child of the caller's span."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not is_ours(method):
            return handler
        parent = extract(handler_call_details.invocation_metadata)
        return wrap_handler(handler, partial(_server_span, method, parent))


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        return await _traced(continuation, client_call_details, request)


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        return await _traced(continuation, client_call_details, request)


async def _traced(
    continuation: Callable[..., Awaitable[Call]],
    details: grpc.aio.ClientCallDetails,
    request: Any,
) -> Call:
    """Starts the call with its span; ``continuation`` returns it without waiting for the peer."""
    method = _text(details.method)
    if not is_ours(method):
        return await continuation(details, request)
    span = start_span(_name(method), kind=SpanKind.CLIENT, attributes=_rpc_attributes(method))
    with use_span(span, record_exception=False, set_status_on_exception=False):
        metadata = grpc.aio.Metadata(*inject(details.metadata))
    call = await continuation(
        grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        ),
        request,
    )
    call.add_done_callback(lambda call: _finish(span, _code_of(call)))
    return call


def _code_of(call: Call) -> grpc.StatusCode:
    """The code of a call that is done: its coroutine has nothing to wait for any more."""
    coroutine = call.code()
    try:
        coroutine.send(None)
    except StopIteration as returned:
        code: grpc.StatusCode = returned.value
        return code
    coroutine.close()
    raise AssertionError("a call without a status cannot be done")


@asynccontextmanager
async def _server_span(
    method: str, parent: Context, context: grpc.aio.ServicerContext[Any, Any]
) -> AsyncIterator[None]:
    span = start_span(
        _name(method), kind=SpanKind.SERVER, parent=parent, attributes=_rpc_attributes(method)
    )
    code = grpc.StatusCode.UNKNOWN
    try:
        with use_span(span, record_exception=False, set_status_on_exception=False):
            yield
        code = context.code() or grpc.StatusCode.OK
    except asyncio.CancelledError:
        code = _why_cancelled(context)
        raise
    except grpc.aio.AbortError:
        code = context.code()
        raise
    finally:
        _finish(span, code)


def _why_cancelled(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    remaining_s: float | None = context.time_remaining()
    if remaining_s is not None and remaining_s <= _DEADLINE_MARGIN_S:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _finish(span: Span, code: grpc.StatusCode) -> None:
    span.set_attribute(RPC_RESPONSE_STATUS_CODE, code.name)
    if code is not grpc.StatusCode.OK:
        fail(span, code.name)
    span.end()


def _rpc_attributes(method: str) -> dict[str, str]:
    return {RPC_SYSTEM_NAME: "grpc", RPC_METHOD: _name(method)}


def _name(method: str) -> str:
    return method.removeprefix("/")


def _text(method: str | bytes) -> str:
    """Client calls name their method in bytes, whatever the type says."""
    return method.decode() if isinstance(method, bytes) else method

"""Running the handlers of a grpc.aio server inside something else, whatever their style.

grpc.aio leaves the clean-up of a handler to chance in two places. It iterates a generator without
closing it: when the client goes away while a message is being written, the generator's ``finally``
waits for garbage collection. And such a write fails with an internal error where a cancellation is
meant. ``run_handler`` puts both right.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import grpc

Behaviour = Callable[..., Any]
Around = Callable[[Any], AbstractAsyncContextManager[None]]

_FOREIGN = ("/grpc.health.", "/grpc.reflection.", "/grpc.channelz.")


class ClientGone(asyncio.CancelledError):
    """The client went away while a message was being written to it."""


def is_ours(method: str) -> bool:
    """Whether ``/package.Service/Method`` is neither health, nor reflection, nor channelz."""
    return not method.startswith(_FOREIGN)


async def run_handler(behaviour: Behaviour, request: Any, context: Any) -> Any:
    """The response of a unary handler; a streaming one's are written out and None is returned.

    ``behaviour`` takes (request, context) and is a coroutine function, or an async generator
    function, which is closed before this returns. Raises ClientGone, and what ``behaviour`` raises.
    """
    try:
        if not inspect.isasyncgenfunction(behaviour):
            return await behaviour(request, context)
        async with aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                await context.write(response)
    except grpc.aio.InternalError as error:
        raise ClientGone from error


def wrap_handler(
    handler: grpc.RpcMethodHandler[Any, Any], around: Around
) -> grpc.RpcMethodHandler[Any, Any]:
    """The same handler with every call inside ``around(context)``."""
    style = (
        f"{'stream' if handler.request_streaming else 'unary'}_"
        f"{'stream' if handler.response_streaming else 'unary'}"
    )
    behaviour = getattr(handler, style)

    async def wrapped(request: Any, context: Any) -> Any:
        async with around(context):
            return await run_handler(behaviour, request, context)

    make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(
        grpc, f"{style}_rpc_method_handler"
    )
    return make(
        wrapped,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )

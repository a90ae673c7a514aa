"""Servicers that come after the server: health must answer while the model still loads.

gRPC takes handlers before the server starts. This table is what it takes; the real ones are put in
when the service is warm. Until then a call of a known service is UNAVAILABLE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from engine.errors import PeerUnavailable
from engine.serving.status import abort

Handler = Any  # grpc.RpcMethodHandler, generic only for the type checker


class LateHandlers(grpc.GenericRpcHandler):
    """Handlers of ``service_names`` by full method name.

    Passes for a server where generated code adds servicers:
    ``add_XServicer_to_server(servicer, late_handlers)``.
    """

    def __init__(self, service_names: Iterable[str]) -> None:
        self._prefixes = tuple(f"/{name}/" for name in service_names)
        self._handlers: dict[str, Handler] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        method = handler_call_details.method
        if method in self._handlers:
            return self._handlers[method]
        if not self._handlers and method.startswith(self._prefixes):
            return grpc.unary_unary_rpc_method_handler(_still_starting)
        return None

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, Handler]
    ) -> None:
        for name, handler in method_handlers.items():
            self._handlers[f"/{service_name}/{name}"] = handler

    def add_generic_rpc_handlers(self, handlers: Iterable[object]) -> None:
        """Generated code offers the same handlers a second time in this form."""


async def _still_starting(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await abort(context, PeerUnavailable("the service is still starting"))

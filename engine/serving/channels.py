"""Channels to other services."""

from __future__ import annotations

import grpc

from engine.serving.options import Purpose, channel_options
from engine.telemetry.interceptors import client_interceptors


def open_channel(endpoint: str, purpose: Purpose) -> grpc.aio.Channel:
    """A channel to ``host:port`` with a connection of its own; the caller closes it.

    One per peer and purpose. Connecting starts with the first call, which fails at once with
    UNAVAILABLE while the peer refuses connections. Dropping a call does not cancel it: cancel
    every call in a ``finally``.
    """
    return grpc.aio.insecure_channel(
        endpoint, options=channel_options(purpose), interceptors=client_interceptors()
    )

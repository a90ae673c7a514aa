"""Deadlines: grpc.aio does not hand the caller's on to calls made by its handler."""

from __future__ import annotations

from typing import Any

import grpc


def remaining_s(context: grpc.aio.ServicerContext[Any, Any], maximum_s: float) -> float:
    """Seconds until the caller gives up, at most ``maximum_s``; 0 when the time is over.

    A handler passes it as the time-out of the calls it makes.
    """
    remaining: float | None = context.time_remaining()
    return maximum_s if remaining is None else max(min(remaining, maximum_s), 0.0)

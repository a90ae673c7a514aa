"""Why pages did not come from another worker, in one short fixed word for metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from decode_svc.peer import WrongPeer
from kvstore.landing import LandingError
from kvstore.transports import TransportUnavailable
from kvstore.transports.grpc_wire import WireError


class TransferFailed(Exception):
    """Pages are not here; ``reason`` is a short fixed word."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class HandoverFailed(TransferFailed):
    """A handover did not end with a valid commit."""


class PullFailed(TransferFailed):
    """No cached page was taken over."""


@contextmanager
def telling_why(failed: type[TransferFailed], idle_s: float) -> Iterator[None]:
    """Whatever goes wrong between two workers is told as ``failed``; ``idle_s`` is what was waited
    for a message. The cancellation of the task itself passes."""
    try:
        yield
    except (LandingError, WrongPeer) as error:
        raise failed(error.reason, str(error)) from error
    except TransportUnavailable as error:
        raise failed("transport", str(error)) from error
    except WireError as error:
        raise failed("malformed", str(error)) from error
    except TimeoutError as error:
        raise failed("silent", f"no message for {idle_s} s") from error
    except grpc.aio.AioRpcError as error:
        raise failed(error.code().name.lower(), error.details() or "") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise failed("cancelled", "the channel was closed") from None

"""Errors on the wire: one table from exceptions to gRPC codes, and back.

Details are Google's: ErrorInfo with a reason always, BadRequest for a wrong field, RetryInfo where
waiting helps. They travel in trailing metadata, of which a connection takes 8 KiB; texts are cut to
fit.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from engine.errors import (
    CannotResume,
    DeadlineExceeded,
    EngineFault,
    EngineStopped,
    HandoverRejected,
    InvalidRequest,
    ModelError,
    PeerUnavailable,
    QuireError,
    RequestCancelled,
    ResourceExhausted,
    ShuttingDown,
    StaleAttempt,
)
from engine.telemetry.handlers import ClientGone, run_handler
from engine.telemetry.logs import fields

Handler = TypeVar("Handler", bound=Callable[..., Any])

DOMAIN: Final = "quire"
_MAX_TEXT_BYTES: Final = 600
_MAX_FIELD_BYTES: Final = 200

CODES: Final[dict[type[QuireError], grpc.StatusCode]] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ModelError: grpc.StatusCode.NOT_FOUND,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelled: grpc.StatusCode.CANCELLED,
    ShuttingDown: grpc.StatusCode.UNAVAILABLE,
    PeerUnavailable: grpc.StatusCode.UNAVAILABLE,
    CannotResume: grpc.StatusCode.UNAVAILABLE,
    EngineStopped: grpc.StatusCode.UNAVAILABLE,
    HandoverRejected: grpc.StatusCode.FAILED_PRECONDITION,
    StaleAttempt: grpc.StatusCode.ABORTED,
    EngineFault: grpc.StatusCode.INTERNAL,
}

# What a code means when gRPC itself made it, and no ErrorInfo of ours says more.
_LIBRARY_CODES: Final[dict[grpc.StatusCode, type[QuireError]]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.UNAVAILABLE: PeerUnavailable,
}

log = logging.getLogger(__name__)


def maps_errors(method: Handler) -> Handler:
    """Decorates a servicer's method, unary or async generator, so that its errors reach the client.

    A QuireError becomes the status of the table. Anything else is our bug: the client gets INTERNAL
    with an incident number and the log the traceback. A cancellation of the call passes through; a
    stray one, of a task that the handler awaited, would leave the client without any status and
    counts as a bug.
    """

    @functools.wraps(method)
    async def mapped(self: Any, request: Any, context: Any) -> Any:
        try:
            return await run_handler(functools.partial(method, self), request, context)
        except (ClientGone, grpc.aio.AbortError):
            raise
        except QuireError as error:
            await abort(context, error)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            await abort(context, _incident(method.__qualname__, error))
        except Exception as error:
            await abort(context, _incident(method.__qualname__, error))

    return cast(Handler, mapped)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: QuireError) -> NoReturn:
    """Ends the call with the status of ``error``, by raising."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort_with_status raises")


def to_status(error: QuireError) -> status_pb2.Status:
    """``google.rpc.Status`` of an error: code, message, details."""
    kind = _row_of(type(error))
    return status_pb2.Status(
        code=CODES[kind].value[0],
        message=_cut(str(error), _MAX_TEXT_BYTES),
        details=[_packed(detail) for detail in _details(error, _reason(kind))],
    )


def from_rpc_error(error: grpc.aio.AioRpcError) -> QuireError:
    """The error that a peer's ``to_status`` was made from, or what gRPC's own code comes to."""
    message = error.details() or error.code().name
    details = _details_of(error)
    info = error_details_pb2.ErrorInfo()
    for detail in details:
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in _BY_REASON:
            return _rebuilt(_BY_REASON[info.reason], message, info, details)
    if error.code() in _LIBRARY_CODES:
        return _LIBRARY_CODES[error.code()](message)
    return EngineFault(f"{error.code().name}: {message}")


def _reason(kind: type[QuireError]) -> str:
    """``StaleAttempt`` -> ``STALE_ATTEMPT``."""
    name = kind.__name__
    return "".join(f"_{letter}" if letter.isupper() else letter for letter in name)[1:].upper()


_BY_REASON: Final = {_reason(kind): kind for kind in CODES}


def _row_of(kind: type[QuireError]) -> type[QuireError]:
    """The class itself or its nearest ancestor in the table."""
    return next((each for each in kind.__mro__ if each in CODES), EngineFault)


def _details(error: QuireError, reason: str) -> list[Message]:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    match error:
        case InvalidRequest():
            name = _cut(error.field, _MAX_FIELD_BYTES)
            info.metadata["field"] = name
            info.metadata["problem"] = _cut(error.problem, _MAX_TEXT_BYTES)
            info.metadata["allowed"] = _cut(error.allowed, _MAX_TEXT_BYTES)
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=name, description=_cut(f"allowed: {error.allowed}", _MAX_TEXT_BYTES)
            )
            return [info, error_details_pb2.BadRequest(field_violations=[violation])]
        case ResourceExhausted():
            delay = Duration()
            delay.FromNanoseconds(round(error.retry_after_s * 1e9))
            return [info, error_details_pb2.RetryInfo(retry_delay=delay)]
        case _:
            return [info]


def _rebuilt(
    kind: type[QuireError], message: str, info: Any, details: list[AnyMessage]
) -> QuireError:
    if kind is InvalidRequest:
        facts = info.metadata
        return InvalidRequest(facts["field"], facts["problem"], facts["allowed"])
    if kind is ResourceExhausted:
        retry = error_details_pb2.RetryInfo()
        for detail in details:
            if detail.Unpack(retry):
                return ResourceExhausted(message, retry.retry_delay.ToNanoseconds() / 1e9)
    return kind(message)


def _details_of(error: grpc.aio.AioRpcError) -> list[AnyMessage]:
    """The details of the status; none if there is none, or one that nobody can read."""
    try:
        status = rpc_status.from_call(error)
    except Exception:  # whatever a peer put there, the code still tells something
        return []
    return [] if status is None else list(status.details)


def _incident(where: str, error: BaseException) -> EngineFault:
    incident = secrets.token_hex(4)
    log.error("internal error", exc_info=error, extra=fields(incident=incident, where=where))
    return EngineFault(f"internal error, incident {incident}")


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _cut(text: str, max_bytes: int) -> str:
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return text
    return data[: max_bytes - 3].decode(errors="ignore") + "..."

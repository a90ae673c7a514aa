"""The error table: every error keeps its class and facts on the way to a client."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from engine.errors import (
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    PeerUnavailable,
    QuireError,
    RequestCancelled,
    ResourceExhausted,
)
from engine.serving.status import CODES, from_rpc_error, to_status


def subclasses(kind: type[QuireError]) -> Iterator[type[QuireError]]:
    for each in kind.__subclasses__():
        if each.__module__ == "engine.errors":
            yield each
            yield from subclasses(each)


ALL_ERRORS = list(subclasses(QuireError))


def example(kind: type[QuireError]) -> QuireError:
    if kind is InvalidRequest:
        return InvalidRequest("sampling.top_p", "it is nan", "above 0 up to 1")
    if kind is ResourceExhausted:
        return ResourceExhausted("256 requests wait", retry_after_s=2.5)
    return kind("what went wrong")


def sent(error: QuireError) -> grpc.aio.AioRpcError:
    """The exception a client meets after a server aborted with ``error``."""
    status = rpc_status.to_status(to_status(error))
    return grpc.aio.AioRpcError(
        status.code,
        trailing_metadata=grpc.aio.Metadata(*status.trailing_metadata),
        details=status.details,
    )


def of_library(code: grpc.StatusCode, details: str = "why") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, trailing_metadata=grpc.aio.Metadata(), details=details)


def detail(error: QuireError, kind: type) -> object:
    unpacked = kind()
    assert any(packed.Unpack(unpacked) for packed in to_status(error).details)
    return unpacked


def test_the_tree_of_errors_is_found() -> None:
    assert {InvalidRequest, EngineFault} <= set(ALL_ERRORS)
    assert len(ALL_ERRORS) >= 10


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_error_has_a_row_in_the_table(kind: type[QuireError]) -> None:
    assert kind in CODES


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_error_comes_back_as_it_was_sent(kind: type[QuireError]) -> None:
    error = example(kind)
    received = from_rpc_error(sent(error))
    assert type(received) is kind
    assert str(received) == str(error)
    assert vars(received) == vars(error)


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_status_names_its_reason(kind: type[QuireError]) -> None:
    info = detail(example(kind), error_details_pb2.ErrorInfo)
    assert info.domain == "quire"
    assert info.reason.replace("_", "").lower() == kind.__name__.lower()


def test_invalid_request_carries_the_field_for_any_client() -> None:
    bad = detail(example(InvalidRequest), error_details_pb2.BadRequest)
    (violation,) = bad.field_violations
    assert violation.field == "sampling.top_p"
    assert "above 0 up to 1" in violation.description


def test_resource_exhausted_carries_when_to_come_back() -> None:
    retry = detail(example(ResourceExhausted), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 2500


def test_refined_error_takes_the_row_of_its_ancestor() -> None:
    class PoolExhausted(ResourceExhausted):
        pass

    received = from_rpc_error(sent(PoolExhausted("no pages", retry_after_s=3.0)))
    assert type(received) is ResourceExhausted
    assert received.retry_after_s == 3.0


def test_long_texts_are_cut_to_fit_into_metadata() -> None:
    error = InvalidRequest("stop" * 500, "ü" * 10_000, "x" * 10_000)
    assert to_status(error).ByteSize() < 4096
    received = from_rpc_error(sent(error))
    assert isinstance(received, InvalidRequest)
    assert received.problem.endswith("ü...")
    assert received.field.startswith("stop")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, PeerUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, RequestCancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
    ],
)
def test_code_made_by_grpc_itself_becomes_our_error(
    code: grpc.StatusCode, kind: type[QuireError]
) -> None:
    received = from_rpc_error(of_library(code))
    assert type(received) is kind
    assert str(received) == "why"


def test_any_other_code_is_a_fault_that_names_it() -> None:
    received = from_rpc_error(of_library(grpc.StatusCode.UNIMPLEMENTED, "no such method"))
    assert type(received) is EngineFault
    assert str(received) == "UNIMPLEMENTED: no such method"


def test_details_that_nobody_can_read_leave_the_code() -> None:
    garbage = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        trailing_metadata=grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff")),
        details="gone",
    )
    assert type(from_rpc_error(garbage)) is PeerUnavailable


def test_details_of_another_domain_are_not_ours() -> None:
    status = to_status(example(InvalidRequest))
    info = error_details_pb2.ErrorInfo(domain="example.com", reason="INVALID_REQUEST")
    status.details[0].Pack(info)
    wire = rpc_status.to_status(status)
    received = from_rpc_error(
        grpc.aio.AioRpcError(
            wire.code,
            trailing_metadata=grpc.aio.Metadata(*wire.trailing_metadata),
            details=wire.details,
        )
    )
    assert type(received) is EngineFault

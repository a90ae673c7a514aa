"""Spans around real gRPC calls: parents, status codes, and cancellation left intact."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)

from engine.errors import DeadlineExceeded, StaleAttempt
from engine.lifecycle import Lifecycle
from engine.serving.channels import open_channel
from engine.serving.status import maps_errors
from engine.telemetry.interceptors import TracingServerInterceptor
from engine.telemetry.trace_tree import SpanRecord, read_spans, render_tree
from engine.telemetry.tracing import (
    current_context,
    extract,
    inject,
    record_stage,
    setup_tracing,
    stage_span,
)

SERVICE = "test.v1.EchoService"
CODE = "rpc.response.status_code"
DEADLINE_S = 0.5  # long enough for a call to reach its handler
PATIENCE_S = 20.0  # for what happens in a moment, except on a machine with other things to do


class Echo:
    """Handlers of every style and fate; ``ended`` tells how the last long one ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.metadata: dict[str, str | bytes] = {}
        self.downstream: Callable[[], Any] | None = None

    def handlers(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Unary": unary(self.unary),
                "Forward": unary(self.forward),
                "Refuse": unary(self.refuse),
                "Abort": unary(self.abort),
                "Break": unary(self.break_),
                "Late": unary(self.late),
                "WaitUnary": unary(self.wait_unary),
                "Stream": stream(self.stream),
                "Written": stream(self.written),
                "RefuseStream": stream(self.refuse_stream),
                "WaitStream": stream(self.wait_stream),
                "Flood": stream(self.flood),
            },
        )

    async def unary(self, request: bytes, context: Any) -> bytes:
        self.metadata = dict(context.invocation_metadata())
        with stage_span(Lifecycle.ADMIT):
            return request

    async def forward(self, request: bytes, context: Any) -> bytes:
        assert self.downstream is not None
        return await self.downstream()(request)

    @maps_errors
    async def refuse(self, request: bytes, context: Any) -> bytes:
        raise StaleAttempt("attempt 1 is over")

    async def abort(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "nothing")
        raise AssertionError

    async def break_(self, request: bytes, context: Any) -> bytes:
        raise KeyError("unmapped")

    @maps_errors
    async def late(self, request: bytes, context: Any) -> bytes:
        raise DeadlineExceeded("found out before gRPC did")

    async def wait_unary(self, request: bytes, context: Any) -> bytes:
        await self._wait()
        return b""

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for each in (b"a", b"b", b"c"):
            with stage_span(Lifecycle.DECODE):
                yield each

    async def written(self, request: bytes, context: Any) -> None:
        for each in (b"a", b"b", b"c"):
            await context.write(each)

    @maps_errors
    async def refuse_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"a"
        raise StaleAttempt("attempt 1 is over")

    async def wait_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await self._wait()

    async def flood(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Sends until the client's window is full, so that it ends inside a write."""
        self.started.set()
        try:
            while True:
                yield b"x" * 1_000_000
        finally:
            self.ended.set_result("closed")

    async def _wait(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.ended.set_result("cancelled")
            raise


class Wire:
    """A server, a channel to it, and the spans of both."""

    def __init__(self, echo: Echo, channel: grpc.aio.Channel, trace_file: Path) -> None:
        self.echo = echo
        self.channel = channel
        self._trace_file = trace_file

    def unary(self, method: str) -> Any:
        return self.channel.unary_unary(f"/{SERVICE}/{method}")

    def stream(self, method: str) -> Any:
        return self.channel.unary_stream(f"/{SERVICE}/{method}")

    async def spans(self, count: int) -> list[SpanRecord]:
        """All ``count`` spans: a server's may end after the client has its answer."""
        await eventually(lambda: len(read_spans(self._trace_file)) >= count)
        spans = read_spans(self._trace_file)
        assert len(spans) == count
        return spans

    async def codes(self) -> list[str]:
        """The status code on the client's and on the server's span of the only call."""
        await self.spans(2)
        spans = {kind: span for span in read_spans(self._trace_file) for kind in [kind_of(span)]}
        for span in spans.values():
            code = span.attributes[CODE]
            expected = ("UNSET", None) if code == "OK" else ("ERROR", code)
            assert (span.status, span.status_message) == expected
        return [spans["client"].attributes[CODE], spans["server"].attributes[CODE]]


def kind_of(span: SpanRecord) -> str:
    return "server" if span.parent_id else "client"


async def eventually(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is in a file
            await asyncio.sleep(0.005)


@pytest.fixture
def trace_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "trace.jsonl"
    shutdown = setup_tracing("echo", boot_id="b0", otlp_endpoint=None, trace_file=path)
    yield path
    shutdown()


@asynccontextmanager
async def served(echo: Echo) -> AsyncIterator[str]:
    """The endpoint of a traced server, which runs while the block does."""
    server = grpc.aio.server(interceptors=[TracingServerInterceptor()])
    server.add_generic_rpc_handlers((echo.handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def wire(trace_file: Path) -> AsyncIterator[Wire]:
    echo = Echo()
    async with served(echo) as endpoint, open_channel(endpoint, "control") as channel:
        yield Wire(echo, channel, trace_file)


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value.code()


async def test_unary_call_has_a_client_and_a_server_span(wire: Wire) -> None:
    assert await wire.unary("Unary")(b"hello") == b"hello"
    admit, server, client = sorted(await wire.spans(3), key=lambda span: -span.start_ns)
    assert (client.parent_id, server.parent_id) == (None, client.span_id)
    assert (admit.name, admit.parent_id) == ("admit", server.span_id)
    assert {span.trace_id for span in (admit, server)} == {client.trace_id}
    assert client.name == server.name == f"{SERVICE}/Unary"
    assert client.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/Unary",
        CODE: "OK",
    }


@pytest.mark.parametrize("method", ["Stream", "Written"])
async def test_both_styles_of_streams_pass_through_whole(wire: Wire, method: str) -> None:
    assert [each async for each in wire.stream(method)(b"")] == [b"a", b"b", b"c"]
    spans = await wire.spans(5 if method == "Stream" else 2)
    assert [span.attributes[CODE] for span in spans if span.name.endswith(method)] == ["OK", "OK"]


async def test_spans_inside_a_streaming_handler_are_children_of_its_span(wire: Wire) -> None:
    assert len([each async for each in wire.stream("Stream")(b"")]) == 3
    spans = await wire.spans(5)
    (server,) = (span for span in spans if span.parent_id and span.name.endswith("/Stream"))
    decodes = [span for span in spans if span.name == "decode"]
    assert [span.parent_id for span in decodes] == [server.span_id] * 3
    assert [span.status for span in decodes] == ["UNSET"] * 3


async def test_call_made_by_a_handler_is_in_the_same_trace(wire: Wire) -> None:
    wire.echo.downstream = lambda: wire.unary("Unary")
    await wire.unary("Forward")(b"x")
    spans = await wire.spans(5)
    by_id = {span.span_id: span for span in spans}
    path = []
    span: SpanRecord | None = next(span for span in spans if span.name == "admit")
    while span is not None:
        path.append(span.name.removeprefix(f"{SERVICE}/"))
        span = by_id.get(span.parent_id or "")
    assert path == ["admit", "Unary", "Unary", "Forward", "Forward"]
    assert render_tree(spans).count("└─") == 4


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("Refuse", "ABORTED"),
        ("Abort", "NOT_FOUND"),
        ("Break", "UNKNOWN"),
        ("Late", "DEADLINE_EXCEEDED"),
    ],
)
async def test_failed_call_has_its_code_on_both_spans(wire: Wire, method: str, code: str) -> None:
    assert (await code_of(wire.unary(method)(b""))).name == code
    assert await wire.codes() == [code, code]


async def test_stream_that_is_aborted_has_its_code_on_both_spans(wire: Wire) -> None:
    call = wire.stream("RefuseStream")(b"")
    with pytest.raises(grpc.aio.AioRpcError, match="attempt 1 is over"):
        assert [each async for each in call] == [b"a"]
    assert await wire.codes() == ["ABORTED", "ABORTED"]


async def test_cancelled_unary_call_reaches_the_handler(wire: Wire) -> None:
    call = wire.unary("WaitUnary")(b"")
    await wire.echo.started.wait()
    call.cancel()
    assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "cancelled"
    assert await wire.codes() == ["CANCELLED", "CANCELLED"]


async def test_cancelled_task_of_a_unary_call_reaches_the_handler(wire: Wire) -> None:
    async def caller() -> None:
        await wire.unary("WaitUnary")(b"")

    task = asyncio.create_task(caller())
    await wire.echo.started.wait()
    task.cancel()
    assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "cancelled"
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await wire.codes() == ["CANCELLED", "CANCELLED"]


async def test_cancelled_stream_reaches_the_handler(wire: Wire) -> None:
    call = wire.stream("WaitStream")(b"")
    assert await call.read() == b"first"
    await wire.echo.started.wait()
    call.cancel()
    assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "cancelled"
    assert await wire.codes() == ["CANCELLED", "CANCELLED"]


async def test_cancelled_task_that_reads_a_stream_reaches_the_handler(wire: Wire) -> None:
    has_first = asyncio.Event()

    async def reader() -> None:
        async for _ in wire.stream("WaitStream")(b""):
            has_first.set()

    task = asyncio.create_task(reader())
    await has_first.wait()
    task.cancel()
    assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "cancelled"
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await wire.codes() == ["CANCELLED", "CANCELLED"]


async def test_stream_that_nobody_reads_can_be_cancelled(wire: Wire) -> None:
    call = wire.stream("WaitStream")(b"")
    await wire.echo.started.wait()
    call.cancel()
    assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "cancelled"
    assert await wire.codes() == ["CANCELLED", "CANCELLED"]


async def test_client_that_vanishes_during_a_write_closes_the_handlers_generator(
    wire: Wire,
) -> None:
    gc.disable()  # the clean-up must not depend on it
    try:
        call = wire.stream("Flood")(b"")
        assert await call.read()
        call.cancel()
        assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "closed"
    finally:
        gc.enable()
    assert await wire.codes() == ["CANCELLED", "CANCELLED"]


async def test_deadline_that_passes_is_told_from_a_cancellation(wire: Wire) -> None:
    await wire.channel.channel_ready()
    assert await code_of(wire.unary("WaitUnary")(b"", timeout=DEADLINE_S)) is (
        grpc.StatusCode.DEADLINE_EXCEEDED
    )
    assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "cancelled"
    assert await wire.codes() == ["DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"]


async def test_deadline_that_passes_in_a_stream_is_on_both_spans(wire: Wire) -> None:
    await wire.channel.channel_ready()
    call = wire.stream("WaitStream")(b"", timeout=DEADLINE_S)
    with pytest.raises(grpc.aio.AioRpcError):
        assert [each async for each in call] == [b"first"]
    assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "cancelled"
    assert await wire.codes() == ["DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"]


async def test_span_of_a_call_that_is_still_open_ends_with_its_channel(wire: Wire) -> None:
    call = wire.stream("WaitStream")(b"")
    assert await call.read() == b"first"
    await wire.channel.close()
    assert await asyncio.wait_for(wire.echo.ended, PATIENCE_S) == "cancelled"
    assert await wire.codes() == ["CANCELLED", "CANCELLED"]


async def test_call_to_nobody_ends_its_span_as_unavailable(trace_file: Path) -> None:
    async with open_channel("127.0.0.1:1", "control") as channel:
        call = channel.unary_unary(f"/{SERVICE}/Unary")(b"", timeout=PATIENCE_S)
        assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
    (span,) = read_spans(trace_file)
    assert span.attributes[CODE] == "UNAVAILABLE"


async def test_other_metadata_of_a_call_arrives_beside_the_trace_context(wire: Wire) -> None:
    metadata = (("x-label", "mine"), ("traceparent", "stale"), ("key-bin", b"\x00"))
    await wire.unary("Unary")(b"", metadata=metadata)
    assert wire.echo.metadata["x-label"] == "mine"
    assert wire.echo.metadata["key-bin"] == b"\x00"
    _, _, client = sorted(await wire.spans(3), key=lambda span: -span.start_ns)
    assert str(wire.echo.metadata["traceparent"]).startswith(
        f"00-{client.trace_id}-{client.span_id}-"
    )


async def test_without_tracing_a_callers_context_is_passed_on() -> None:
    received = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    echo, forwarder = Echo(), Echo()
    async with (
        served(echo) as endpoint,
        served(forwarder) as front,
        open_channel(endpoint, "control") as back,
        grpc.aio.insecure_channel(front) as channel,
    ):
        forwarder.downstream = lambda: back.unary_unary(f"/{SERVICE}/Unary")
        forward = channel.unary_unary(f"/{SERVICE}/Forward")
        await forward(b"", metadata=(("traceparent", received),))
    assert echo.metadata["traceparent"] == received


def test_context_survives_a_round_trip_through_metadata(trace_file: Path) -> None:
    with stage_span(Lifecycle.ADMIT) as span:
        context = extract(inject([("a", "b")]))
        record_stage(Lifecycle.VERIFY, 1, 2, context)
        replaced = inject([("traceparent", "stale"), ("a", "b")])
        assert sorted(key for key, _ in replaced) == ["a", "traceparent"]
    verify, admit = read_spans(trace_file)
    assert verify.parent_id == admit.span_id == f"{span.get_span_context().span_id:016x}"


@pytest.mark.parametrize("value", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_nonsense_in_metadata_starts_a_new_trace(trace_file: Path, value: str) -> None:
    record_stage(Lifecycle.ADMIT, 1, 2, extract([("traceparent", value), ("x-bin", b"\xff")]))
    (span,) = read_spans(trace_file)
    assert span.parent_id is None


def test_failed_stage_names_the_error_but_not_its_text(trace_file: Path) -> None:
    with pytest.raises(StaleAttempt), stage_span(Lifecycle.HANDOVER):
        raise StaleAttempt("the prompt was: secret")
    assert "secret" not in trace_file.read_text()
    (span,) = read_spans(trace_file)
    assert (span.status, span.status_message) == ("ERROR", "StaleAttempt")


async def test_stage_measured_in_a_thread_hangs_under_the_request(trace_file: Path) -> None:
    with stage_span(Lifecycle.ADMIT):
        parent = current_context()
    began = time.time_ns()
    await asyncio.to_thread(
        record_stage, Lifecycle.DECODE, began, began + 5, parent, {"quire.n": 1}
    )
    admit, decode = read_spans(trace_file)
    assert decode.parent_id == admit.span_id
    assert (decode.start_ns, decode.end_ns) == (began, began + 5)


def test_several_processes_may_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    first = setup_tracing("one", boot_id="1", otlp_endpoint=None, trace_file=path)
    record_stage(Lifecycle.ADMIT, 1, 2, None)
    second = setup_tracing("two", boot_id="2", otlp_endpoint=None, trace_file=path)
    record_stage(Lifecycle.DECODE, 3, 4, None)
    first()
    record_stage(Lifecycle.FINISH, 5, 6, None)
    second()
    record_stage(Lifecycle.JOIN, 7, 8, None)
    names = [(span.service, span.name) for span in read_spans(path)]
    assert names == [("one", "admit"), ("two", "decode"), ("two", "finish")]


def test_spans_reach_an_otlp_collector() -> None:
    received: list[trace_service_pb2.ExportTraceServiceRequest] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    with futures.ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        endpoint = f"http://127.0.0.1:{port}"
        shutdown = setup_tracing("decode", boot_id="b", otlp_endpoint=endpoint, trace_file=None)
        record_stage(Lifecycle.ADMIT, 1, 2, None)
        shutdown()
        server.stop(None).wait()
    (resource,) = received[0].resource_spans
    names = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert names["service.name"] == "decode"
    assert [span.name for span in resource.scope_spans[0].spans] == ["admit"]

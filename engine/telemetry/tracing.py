"""Spans of this process: set-up, life-cycle spans, and W3C trace context in gRPC metadata.

The tracer belongs to this module, not to OpenTelemetry's global provider: that one can be set only
once per process, and tests set tracing up many times. Until ``setup_tracing`` names a destination
spans are no-ops and the SDK is not even imported; a trace context that comes in with a request is
passed on all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry.context import Context, get_current
from opentelemetry.trace import (
    NoOpTracer,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    use_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from engine.lifecycle import Lifecycle
from engine.telemetry.attributes import BOOT_ID, ERROR_TYPE, STAGE

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

Attributes = Mapping[str, AttributeValue]
Metadata = Iterable[tuple[str, str | bytes]]

_EXPORT_TIMEOUT_S = 3  # a collector that is away must not hold up a drain
_W3C = TraceContextTextMapPropagator()  # no baggage: metadata has a limit of 8 KiB
_tracer: Tracer = NoOpTracer()


def setup_tracing(
    service_name: str, *, boot_id: str, otlp_endpoint: str | None, trace_file: Path | None
) -> Callable[[], None]:
    """Sends this process's spans to an OTLP/gRPC collector, to a file, both, or nowhere.

    ``otlp_endpoint`` is a URL such as ``http://127.0.0.1:4317``; ``trace_file`` is appended to and
    may be shared by several processes. Returns the function that flushes and ends tracing; it may
    block for a few seconds and may be called twice.
    """
    processors = list(_processors(otlp_endpoint, trace_file))
    if not processors:
        return lambda: None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(
        resource=Resource.create({"service.name": service_name, BOOT_ID: boot_id}),
        shutdown_on_exit=False,
    )
    for processor in processors:
        provider.add_span_processor(processor)
    _use(tracer := provider.get_tracer("quire"))

    def shutdown() -> None:
        if _tracer is tracer:
            _use(NoOpTracer())
        provider.shutdown()

    return shutdown


def start_span(
    name: str, *, kind: SpanKind, parent: Context | None = None, attributes: Attributes
) -> Span:
    """A span that the caller ends; its parent is the current span unless ``parent`` is given."""
    return _tracer.start_span(name, context=parent, kind=kind, attributes=attributes)


@contextmanager
def stage_span(stage: Lifecycle, attributes: Attributes | None = None) -> Iterator[Span]:
    """The current span while the block runs; for code on the event loop."""
    span = _tracer.start_span(stage.value, attributes=_stage_attributes(stage, attributes))
    with ended(span):
        yield span


def record_stage(
    stage: Lifecycle,
    start_ns: int,
    end_ns: int,
    parent: Context | None,
    attributes: Attributes | None = None,
) -> None:
    """A span measured elsewhere, in wall-clock nanoseconds (``time.time_ns``); any thread."""
    span = _tracer.start_span(
        stage.value,
        context=parent,
        attributes=_stage_attributes(stage, attributes),
        start_time=start_ns,
    )
    span.end(end_ns)


@contextmanager
def ended(span: Span) -> Iterator[None]:
    """Makes ``span`` current for the block and ends it, with the name of the error if one leaves.

    Messages of errors stay out of it: only a QuireError's text is known to be fit for others.
    """
    try:
        with use_span(span, record_exception=False, set_status_on_exception=False):
            yield
    except GeneratorExit:  # whoever iterated has stopped: not an error
        raise
    except BaseException as error:
        fail(span, type(error).__name__)
        raise
    finally:
        span.end()


def fail(span: Span, reason: str) -> None:
    """Marks a span as failed; ``reason`` is one word, such as a status code."""
    span.set_attribute(ERROR_TYPE, reason)
    span.set_status(Status(StatusCode.ERROR, reason))


def current_context() -> Context:
    """The trace context here, for spans recorded later or in another thread."""
    return get_current()


def inject(metadata: Metadata | None) -> list[tuple[str, str | bytes]]:
    """``metadata`` with the current trace context in place of any older one."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    kept = [(key, value) for key, value in metadata or () if key not in _W3C.fields]
    return kept + list(carrier.items())


def extract(metadata: Metadata | None) -> Context:
    """The trace context a caller sent; an empty one if it sent none or nonsense."""
    texts = {key: value for key, value in metadata or () if isinstance(value, str)}
    return _W3C.extract(texts, context=Context())


def _stage_attributes(stage: Lifecycle, attributes: Attributes | None) -> Attributes:
    return {STAGE: stage.value, **(attributes or {})}


def _use(tracer: Tracer) -> None:
    global _tracer
    _tracer = tracer


def _processors(otlp_endpoint: str | None, trace_file: Path | None) -> Iterator[SpanProcessor]:
    if trace_file is not None:
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        from engine.telemetry.trace_file import TraceFileExporter

        # Not batched: a span is in the file as soon as it ends, also when the process is killed
        # next, and one request makes a few dozen of them at some 50 microseconds each.
        yield SimpleSpanProcessor(TraceFileExporter(trace_file))
    if otlp_endpoint is not None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, timeout=_EXPORT_TIMEOUT_S)
        yield BatchSpanProcessor(exporter, schedule_delay_millis=500)

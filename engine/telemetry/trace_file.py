"""Spans as lines of JSON in a file that several processes append to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import format_span_id, format_trace_id

from engine.telemetry.attributes import BOOT_ID


class TraceFileExporter(SpanExporter):
    """Appends one JSON object per span; ``engine.telemetry.trace_tree`` reads them back.

    Lines of several processes do not mix: O_APPEND makes each write go to the end of the file as a
    whole, and a batch of whole lines is one write.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = b"".join(json.dumps(_plain(span)).encode() + b"\n" for span in spans)
        try:
            num_written = os.write(self._file, lines)
        except OSError:  # a full disk loses the span, not the request
            return SpanExportResult.FAILURE
        whole = num_written == len(lines)
        return SpanExportResult.SUCCESS if whole else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True  # nothing is held back


def _plain(span: ReadableSpan) -> dict[str, Any]:
    assert span.context is not None
    resource = span.resource.attributes
    return {
        "trace_id": format_trace_id(span.context.trace_id),
        "span_id": format_span_id(span.context.span_id),
        "parent_id": None if span.parent is None else format_span_id(span.parent.span_id),
        "name": span.name,
        "kind": span.kind.name,
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "status": span.status.status_code.name,
        "status_message": span.status.description,
        "service": resource.get("service.name"),
        "boot_id": resource.get(BOOT_ID),
        "attributes": dict(span.attributes or {}),
        "events": [_plain_event(event) for event in span.events],
    }


def _plain_event(event: Event) -> dict[str, Any]:
    return {
        "name": event.name,
        "time_ns": event.timestamp,
        "attributes": dict(event.attributes or {}),
    }

"""Spans of layer groups are bounded, however many messages a handover has."""

from __future__ import annotations

from pathlib import Path

from opentelemetry.context import Context

from engine.lifecycle import Lifecycle
from engine.telemetry.group_spans import MAX_SPANS, GroupSpans
from engine.telemetry.trace_tree import read_spans
from engine.telemetry.tracing import setup_tracing
from kvstore.page import PageFrame, PageIdentity, PageReference

IDENTITY = PageIdentity(PageReference(bytes(16), 1, 1, bytes(16), bytes(16)), 5, 32)


def test_messages_beyond_the_limit_are_one_span(tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl"
    end_tracing = setup_tracing("owner", boot_id="b", otlp_endpoint=None, trace_file=file)
    spans = GroupSpans(Lifecycle.LAND, Context())
    for number in range(MAX_SPANS + 7):
        frame = PageFrame(IDENTITY, number % 6, 6, None, bytes(16))
        spans.record([frame, frame], number, 100)
    spans.end()
    spans.end()
    end_tracing()
    *each, rest = read_spans(file)
    assert len(each) == MAX_SPANS
    assert each[3].attributes["quire.layer_group"] == 3
    assert each[3].attributes["quire.first_page"] == 5
    assert each[3].attributes["quire.pages"] == 2
    assert each[3].attributes["quire.bytes"] == 100
    assert rest.attributes["quire.messages"] == 7
    assert rest.start_ns == MAX_SPANS

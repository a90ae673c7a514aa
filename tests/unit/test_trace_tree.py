"""Traces as trees: reading span lines, choosing a trace, drawing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.lifecycle import Lifecycle
from engine.telemetry.trace_tree import SpanRecord, one_trace, read_spans, render_tree
from engine.telemetry.tracing import record_stage, setup_tracing, stage_span

MS = 1_000_000


def span(
    name: str, parent: str | None, start_ms: float, end_ms: float, **fields: object
) -> SpanRecord:
    facts: dict[str, object] = {"trace_id": "ab" * 16, "service": "decode", "span_id": name}
    facts |= fields
    return SpanRecord(
        name=name,
        parent_id=parent,
        start_ns=1_700_000_000_000_000_000 + int(start_ms * MS),
        end_ns=1_700_000_000_000_000_000 + int(end_ms * MS),
        **facts,  # type: ignore[arg-type]
    )


TRACE = [
    span("Prefill", "handover", 4, 70, service="prefill"),
    span("prefill_chunk", "Prefill", 10, 40, service="prefill", attributes={"quire.tokens": 512}),
    span(
        "prefill_chunk",
        "Prefill",
        40,
        65,
        service="prefill",
        span_id="second",
        attributes={"quire.stage": "prefill_chunk", "quire.tokens": 88},
    ),
    span("admit", "Generate", 0.5, 2),
    span("handover", "Generate", 3, 72, attributes={"quire.bytes": 4096, "quire.worker": "w1"}),
    span("decode", "Generate", 75, 100, attributes={"gen_ai.usage.output_tokens": 8}),
    span(
        "Generate",
        "call",
        0,
        100,
        status="ERROR",
        status_message="CANCELLED",
        attributes={"rpc.method": "quire.v1.InferenceService/Generate", "error.type": "CANCELLED"},
    ),
]

TREE = """\
trace abababababababababababababababab: 7 spans, 100.00 ms
    +0.00   100.00 ms |━━━━━━━━━━━━━━━━━━━━━━━━| decode  Generate  !CANCELLED
    +0.50     1.50 ms |━                       | decode  ├─ admit
    +3.00    69.00 ms |━━━━━━━━━━━━━━━━━       | decode  ├─ handover  bytes=4096 worker=w1
    +4.00    66.00 ms |━━━━━━━━━━━━━━━━        | prefill │  └─ Prefill
   +10.00    30.00 ms |  ━━━━━━━               | prefill │     ├─ prefill_chunk  tokens=512
   +40.00    25.00 ms |         ━━━━━━         | prefill │     └─ prefill_chunk  tokens=88
   +75.00    25.00 ms |                  ━━━━━━| decode  └─ decode  usage.output_tokens=8
"""


def test_trace_is_drawn_as_a_tree() -> None:
    assert render_tree(TRACE) == TREE


def test_order_of_the_lines_does_not_matter() -> None:
    assert render_tree(TRACE[::-1]) == TREE


def test_span_without_known_parent_stands_at_the_top() -> None:
    drawn = render_tree([span("orphan", "elsewhere", 0, 1), span("root", None, 1, 2)])
    assert [line.split()[-1] for line in drawn.splitlines()[1:]] == ["orphan", "root"]


def test_span_of_no_duration_is_still_visible() -> None:
    assert "|━" in render_tree([span("instant", None, 0, 0)])


def test_no_spans_are_said_to_be_none() -> None:
    assert render_tree([]) == "no spans\n"


def test_latest_trace_is_the_one_begun_last() -> None:
    old, new = span("old", None, 0, 9), span("new", None, 1, 2, trace_id="cd" * 16)
    assert one_trace([new, old]) == [new]
    assert one_trace([]) == []


def test_trace_is_found_by_the_beginning_of_its_id() -> None:
    old, new = span("old", None, 0, 9), span("new", None, 1, 2, trace_id="cd" * 16)
    assert one_trace([new, old], "abab") == [old]
    assert one_trace([new, old], "ef") == []


def test_spans_written_to_a_file_are_read_back_as_a_tree(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    shutdown = setup_tracing("decode", boot_id="b0", otlp_endpoint=None, trace_file=path)
    with stage_span(Lifecycle.ADMIT, {"quire.tokens": 3}):
        record_stage(Lifecycle.PREFILL_CHUNK, 5 * MS, 7 * MS, None, {"quire.start": 0})
    shutdown()
    chunk, admit = read_spans(path)
    assert (chunk.name, chunk.duration_ns, chunk.parent_id) == (
        "prefill_chunk",
        2 * MS,
        admit.span_id,
    )
    assert admit.service == "decode"
    assert admit.attributes == {"quire.stage": "admit", "quire.tokens": 3}
    assert "admit  tokens=3" in render_tree([chunk, admit])


def test_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    shutdown = setup_tracing("decode", boot_id="b0", otlp_endpoint=None, trace_file=path)
    with stage_span(Lifecycle.ADMIT):
        pass
    shutdown()
    path.write_text(path.read_text() + '{"trace_id": "ab')
    assert [span.name for span in read_spans(path)] == ["admit"]


@pytest.mark.parametrize("text", ["not json\n", "[]\n", '{"name": "x"}\n'])
def test_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.jsonl is not a trace file"):
        read_spans(path)

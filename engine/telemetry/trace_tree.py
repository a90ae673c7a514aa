"""A trace as a tree for people: who called whom, when, for how long."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BAR_WIDTH = 24
_HIDDEN_PREFIXES = ("rpc.", "error.", "quire.stage")


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One line of a trace file; times are wall-clock nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    start_ns: int
    end_ns: int
    status: str = "UNSET"
    status_message: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


def read_spans(path: Path) -> list[SpanRecord]:
    """All spans of a trace file, in the order in which they ended.

    A last line without its end is left out: somebody may be writing it. Raises OSError, and
    ValueError if the file is not a trace file.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [_record(json.loads(line)) for line in lines]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trace file: {error!r}") from None


def one_trace(spans: Sequence[SpanRecord], trace_id: str | None = None) -> list[SpanRecord]:
    """The spans of the trace whose id begins with ``trace_id``, or of the one begun last."""
    if trace_id is None and spans:
        trace_id = max(spans, key=lambda span: span.start_ns).trace_id
    return [span for span in spans if trace_id is not None and span.trace_id.startswith(trace_id)]


def render_tree(spans: Sequence[SpanRecord]) -> str:
    """The spans of one trace as text: offset, duration, place in time, service, tree, attributes.

    A span whose parent is not among ``spans`` stands at the top. Offsets count from the earliest
    start; clocks of several hosts are shown as they are.
    """
    if not spans:
        return "no spans\n"
    begin = min(span.start_ns for span in spans)
    total = max(span.end_ns for span in spans) - begin
    service_width = max(len(span.service) for span in spans)
    lines = [f"trace {spans[0].trace_id}: {len(spans)} spans, {_ms(total)} ms"]
    for branch, span in _walk(spans):
        lines.append(
            f"{'+' + _ms(span.start_ns - begin):>9} {_ms(span.duration_ns):>8} ms"
            f" |{_bar(span, begin, total)}| {span.service:<{service_width}}"
            f" {branch}{span.name}{_facts(span)}"
        )
    return "\n".join(lines) + "\n"


def _record(line: dict[str, Any]) -> SpanRecord:
    return SpanRecord(
        trace_id=line["trace_id"],
        span_id=line["span_id"],
        parent_id=line["parent_id"],
        name=line["name"],
        service=line["service"],
        start_ns=line["start_ns"],
        end_ns=line["end_ns"],
        status=line["status"],
        status_message=line["status_message"],
        attributes=line["attributes"],
    )


def _walk(spans: Sequence[SpanRecord]) -> Iterator[tuple[str, SpanRecord]]:
    """Every span, parents first and siblings by start, with the branch drawn before its name."""
    known = {span.span_id for span in spans}
    children: dict[str | None, list[SpanRecord]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        parent = span.parent_id if span.parent_id in known else None
        children.setdefault(parent, []).append(span)

    def below(parent: str, indent: str) -> Iterator[tuple[str, SpanRecord]]:
        siblings = children.get(parent, [])
        for span in siblings:
            last = span is siblings[-1]
            yield indent + ("└─ " if last else "├─ "), span
            yield from below(span.span_id, indent + ("   " if last else "│  "))

    for root in children.get(None, []):
        yield "", root
        yield from below(root.span_id, "")


def _bar(span: SpanRecord, begin: int, total: int) -> str:
    """Where the span lies in the whole trace; at least one mark, however short it is."""
    scale = _BAR_WIDTH / max(total, 1)
    first = min(int((span.start_ns - begin) * scale), _BAR_WIDTH - 1)
    num_marks = min(max(round(span.duration_ns * scale), 1), _BAR_WIDTH - first)
    return (" " * first + "━" * num_marks).ljust(_BAR_WIDTH)


def _facts(span: SpanRecord) -> str:
    shown = [
        f"{key.removeprefix('quire.').removeprefix('gen_ai.')}={_short(value)}"
        for key, value in span.attributes.items()
        if not key.startswith(_HIDDEN_PREFIXES)
    ]
    if span.status == "ERROR":
        shown.append(f"!{span.status_message or 'ERROR'}")
    return "  " + " ".join(shown) if shown else ""


def _short(value: object) -> str:
    if isinstance(value, list):
        return ",".join(_short(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.2f}"

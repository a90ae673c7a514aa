"""Spans of layer groups on their way: one for each message of a handover, of the first ones."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.context import Context

from engine.lifecycle import Lifecycle
from engine.telemetry.clock import now_ns
from engine.telemetry.tracing import record_stage
from kvstore.page import PageFrame

MAX_SPANS = 64


class GroupSpans:
    """Records messages of frames; those beyond ``MAX_SPANS`` as one span, by ``end``."""

    def __init__(self, stage: Lifecycle, parent: Context) -> None:
        self._stage = stage
        self._parent = parent
        self._num_recorded = 0
        self._rest: list[int] = []

    def record(self, frames: Sequence[PageFrame], started_ns: int, num_bytes: int) -> None:
        """One message that was dealt with from ``started_ns`` until now."""
        if self._num_recorded == MAX_SPANS:
            self._rest.append(started_ns)
            return
        self._num_recorded += 1
        attributes = {
            "quire.layer_group": frames[0].layer_group,
            "quire.first_page": frames[0].identity.page_index,
            "quire.pages": len(frames),
            "quire.bytes": num_bytes,
        }
        record_stage(self._stage, started_ns, now_ns(), self._parent, attributes)

    def end(self) -> None:
        if self._rest:
            attributes = {"quire.messages": len(self._rest)}
            record_stage(self._stage, self._rest[0], now_ns(), self._parent, attributes)
            self._rest.clear()

"""A result for people: one line on the machine, one table of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.load import Row

WIDEST = 140


def render_table(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """``rows`` have the same keys, at least one row. What would be too wide is laid on its side."""
    names = list(rows[0])
    cells = [names, *([_shown(row[name]) for name in names] for row in rows)]
    lines = _aligned(cells)
    if max(map(len, lines)) > WIDEST:
        lines = _aligned(list(zip(*cells, strict=True)))
    facts = [f"{name} {_shown(value)}" for name, value in machine.items()]
    return "\n".join([", ".join(facts), *lines])


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.rjust, line, widths)).rstrip() for line in cells]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

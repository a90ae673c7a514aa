"""A result for people: one line on the machine, one table of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.load import Row


def render_table(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """``rows`` have the same keys, at least one row."""
    names = list(rows[0])
    cells = [names, *([_shown(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in cells]
    facts = [f"{name} {_shown(value)}" for name, value in machine.items()]
    return "\n".join([", ".join(facts), *lines])


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Indices are checked before memory is touched, in every back end and every build."""

from __future__ import annotations

import torch


def check_index(name: str, value: int, limit: int) -> None:
    """Raises ``ValueError`` naming the argument unless ``value`` is in ``0 .. limit - 1``."""
    if not 0 <= value < limit:
        raise ValueError(f"{name} must be in 0..{limit - 1}, not {value}")


def check_range(name: str, values: torch.Tensor, limit: int) -> None:
    """``check_index`` of the least and the greatest of ``values``, of which there may be none."""
    if values.numel():
        low, high = torch.aminmax(values)
        check_index(name, int(low), limit)
        check_index(name, int(high), limit)


def check_row_ranges(name: str, starts: list[int], rows: int) -> None:
    """Raises ``ValueError`` naming the argument unless ``starts`` ascends from 0 to ``rows``."""
    if starts[0] != 0 or starts[-1] != rows or starts != sorted(starts):
        raise ValueError(f"{name} must ascend from 0 to {rows}")

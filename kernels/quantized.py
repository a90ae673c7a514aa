"""A weight matrix as integers with scales, the way a checkpoint ships it, before any packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """``N`` outputs of ``K`` inputs; column k belongs to group ``g = k // group``.

    ``w[n, k] = scales[n, g] * (values[n, k] - zeros[n, g])``, or with ``minimums`` in place of
    ``zeros``, ``scales[n, g] * values[n, k] + minimums[n, g]``; exactly one of the two is given.
    ``group`` divides K; one scale per row is ``group = K``.
    """

    bits: int  # 4 or 8
    group: int
    values: torch.Tensor  # [N, K] uint8, below 2^bits
    scales: torch.Tensor  # [N, K / group] fp32
    zeros: torch.Tensor | None = None  # [N, K / group] fp32, integers in 0 .. 2^bits
    minimums: torch.Tensor | None = None  # [N, K / group] fp32

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        groups = (rows, columns // self.group)
        assert self.bits in (4, 8)
        assert columns % self.group == 0
        assert self.scales.shape == groups
        assert (self.zeros is None) != (self.minimums is None)
        offsets = self.minimums if self.zeros is None else self.zeros
        assert offsets is not None
        assert offsets.shape == groups

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def dequantize(self) -> torch.Tensor:
        """``[N, K]`` fp32: each operation above rounded once."""
        values = self.values.view(len(self.values), -1, self.group).to(torch.float32)
        scales = self.scales.unsqueeze(-1)
        if self.zeros is not None:
            weights = (values - self.zeros.unsqueeze(-1)) * scales
        else:
            assert self.minimums is not None
            weights = values * scales + self.minimums.unsqueeze(-1)
        return weights.view(self.values.shape)

    def rows(self, order: torch.Tensor) -> QuantizedMatrix:
        """Its rows in another order, ``order`` [M] int64; -1 stands for a row of zeros."""

        def ordered(part: torch.Tensor | None, fill: int) -> torch.Tensor | None:
            if part is None:
                return None
            return torch.cat((part, part.new_full((1, part.shape[1]), fill)))[order]

        middle = 1 << (self.bits - 1)
        values, scales = ordered(self.values, middle), ordered(self.scales, 0)
        assert values is not None
        assert scales is not None
        zeros, minimums = ordered(self.zeros, middle), ordered(self.minimums, 0)
        return QuantizedMatrix(self.bits, self.group, values, scales, zeros, minimums)


def stacked(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """The matrices below each other, or None if they are not of one kind."""
    first = parts[0]
    kinds = {(part.bits, part.group, part.zeros is None) for part in parts}
    if len(kinds) > 1:
        return None

    def cat(name: str) -> torch.Tensor | None:
        each = [getattr(part, name) for part in parts]
        return None if each[0] is None else torch.cat(each)

    values, scales = cat("values"), cat("scales")
    assert values is not None
    assert scales is not None
    return QuantizedMatrix(first.bits, first.group, values, scales, cat("zeros"), cat("minimums"))

"""A weight matrix as integers with scales, the way a checkpoint ships it, before any packing."""

from __future__ import annotations

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

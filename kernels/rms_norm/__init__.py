"""Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from kernels import dispatch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    ``x`` [T, H] fp32, ``weight`` [H] fp32; returns a new [T, H] fp32. NaN and infinity in a row
    show in that row and in no other.

    Order of the native kernel: lane j of 16 sums the squares of elements j, j+16, ... in ascending
    order (fused multiply-add); the lanes are added as j + (j+8), then +4, +2, +1.
    """
    out: torch.Tensor = dispatch.implementation("rms_norm").rms_norm(x, weight, eps)
    return out

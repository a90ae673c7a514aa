"""Matrix product with a weight matrix; the LM head is one too."""

from __future__ import annotations

import torch

from kernels import dispatch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, one path for every number of rows (law 1).

    ``x`` [T, K] fp32; ``weight`` [N, K] fp32 or bf16, as stored, neither copied nor packed;
    ``bias`` [N] fp32 or None. Returns a new [T, N] fp32. With a bf16 weight, ``x`` is first rounded
    to bf16 (nearest, ties to even); products and sums are fp32 and the result is not rounded, so
    that logits are fp32.

    Order of the native kernel: lane j of 16 sums the products of elements j, j+16, ... in ascending
    order (fused multiply-add); the lanes are added as j + (j+8), then +4, +2, +1; then the bias.
    """
    out: torch.Tensor = dispatch.implementation("linear").linear(x, weight, bias)
    return out

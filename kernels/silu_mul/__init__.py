"""The gate of a SwiGLU feed-forward layer (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch

from kernels import dispatch


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``gate / (1 + exp(-gate)) * up``, element by element.

    ``gate`` and ``up`` [T, F] fp32; returns a new [T, F] fp32.
    """
    out: torch.Tensor = dispatch.implementation("silu_mul").silu_mul(gate, up)
    return out

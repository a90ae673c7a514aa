"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), in Hugging Face's pairing."""

from __future__ import annotations

import torch

from kernels import dispatch


def rope_tables(
    max_positions: int, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of ``position * theta^(-2i / head_dim)``, each [max_positions, head_dim/2].

    Computed in fp64 and rounded to fp32 once; the same under every back end.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    positions = torch.arange(max_positions, dtype=torch.float64)
    angles = torch.outer(positions, theta**-exponents)
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def rope(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Rotates each pair (d, d + D/2) of every head by its row's position.

    ``x`` [T, heads, D] fp32, D even; ``positions`` [T] int64; ``cos`` and ``sin`` from
    ``rope_tables``. Returns a new [T, heads, D] fp32. Raises ``ValueError`` if a position is
    outside the tables.
    """
    out: torch.Tensor = dispatch.implementation("rope").rope(x, positions, cos, sin)
    return out

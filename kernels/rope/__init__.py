"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), in Hugging Face's pairing."""

from __future__ import annotations

import torch

from kernels import dispatch
from kernels.rope.scaling import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)

__all__ = [
    "FrequencyFactors",
    "LinearScaling",
    "Llama3Scaling",
    "RopeScaling",
    "YarnScaling",
    "rope",
    "rope_tables",
]


def rope_tables(
    max_positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of ``position * theta^(-2i / head_dim)``, each [max_positions, head_dim/2].

    ``scaling`` changes the speed of each pair and the amplitude of both tables. Computed in fp64
    and rounded to fp32 once; the same under every back end.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    speeds, amplitude = theta**-exponents, 1.0
    if scaling is not None:
        speeds, amplitude = scaling.speeds(speeds, theta), scaling.amplitude
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), speeds)
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return cos.to(torch.float32), sin.to(torch.float32)


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

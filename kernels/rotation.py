"""Walsh-Hadamard rotation of blocks of 64 numbers: spreads outliers before rounding to integers."""

from __future__ import annotations

import torch

ROTATION = 64


def rotate(x: torch.Tensor) -> torch.Tensor:
    """``H x`` for every block of 64 along the last dimension, a multiple of 64; new, fp32.

    H is the Walsh-Hadamard matrix in natural order, not normalised: ``H H = 64``. Distances 1, 2,
    4, ... 32 in that order, as the native kernels go.
    """
    shape = x.shape
    for distance in (1, 2, 4, 8, 16, 32):
        pairs = x.reshape(-1, ROTATION // (2 * distance), 2, distance)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((first + second, first - second), dim=2)
    return x.reshape(shape)

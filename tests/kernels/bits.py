"""Equality of bits, and the unit in which errors are bounded."""

import torch

EPS = 2.0**-24  # half a unit in the last place of an fp32 number near 1


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))

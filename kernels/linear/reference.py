from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.packed_matrix import PackedMatrix, split
from kernels.rotation import rotate
from kernels.row_tiles import map_row_tiles

_LARGEST = {8: 127, 16: 127 * 257}


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    if x.shape[1] != weight.inputs:
        raise ValueError(f"x must have {weight.inputs} columns, not {x.shape[1]}")
    x = _cut(F.pad(x, (0, weight.padded_inputs - weight.inputs)), weight)
    columns = weight.unpacked.T
    out = map_row_tiles(lambda tile: tile @ columns, x, x.new_empty(x.shape[0], weight.outputs))
    return out if bias is None else out.add_(bias)


def _cut(x: torch.Tensor, weight: PackedMatrix) -> torch.Tensor:
    """Inputs as the product sees them, as fp32."""
    if weight.format == "f32":
        return x
    if weight.format == "bf16":
        return x.to(torch.bfloat16).to(torch.float32)
    groups = split(rotate(x) if weight.rotated else x, 1, -1, weight.group)
    largest = groups.abs().amax(dim=2, keepdim=True)
    limit = _LARGEST[weight.input_bits]
    scales = torch.where(largest > 2.0**-100, largest / limit, largest * 0)
    # Of a number and a tensor torch would multiply with the rounded reciprocal.
    factors = torch.where(largest > 2.0**-100, torch.full_like(largest, limit) / largest, 0)
    return ((groups * factors).round_() * scales).flatten(1)

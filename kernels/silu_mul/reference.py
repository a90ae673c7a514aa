from __future__ import annotations

import torch

# torch computes the end of an array by another exp than its middle, and cuts large arrays between
# threads. Pieces of this size are all middle, and small enough for one thread.
_PIECE = 16384


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    flat = gate.reshape(-1)
    decay = torch.empty_like(flat)  # exp(-gate)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat.new_zeros(_PIECE)
        source = flat[start : start + _PIECE]
        piece[: source.numel()] = source
        decay[start : start + _PIECE] = torch.exp(-piece)[: source.numel()]
    return gate / (1.0 + decay.view_as(gate)) * up

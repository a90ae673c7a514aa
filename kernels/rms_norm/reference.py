from __future__ import annotations

import torch

from kernels.row_tiles import map_row_tiles


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    def normalise(tile: torch.Tensor) -> torch.Tensor:
        mean_square = (tile * tile).mean(dim=-1, keepdim=True)
        return tile * (1.0 / torch.sqrt(mean_square + eps)) * weight

    return map_row_tiles(normalise, x, torch.empty_like(x))

from __future__ import annotations

import torch

from kernels import _native


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    _native.rms_norm(x, weight, eps, out)
    return out

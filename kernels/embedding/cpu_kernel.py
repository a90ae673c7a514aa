from __future__ import annotations

import torch

from kernels import _native
from kernels.packed_matrix import PackedMatrix


def embedding(token_ids: torch.Tensor, table: PackedMatrix) -> torch.Tensor:
    out = torch.empty(len(token_ids), table.inputs)
    _native.embedding(token_ids, table.native, out)
    return out

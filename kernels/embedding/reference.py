from __future__ import annotations

import torch

from kernels.index_check import check_range
from kernels.packed_matrix import PackedMatrix
from kernels.rotation import rotate


def embedding(token_ids: torch.Tensor, table: PackedMatrix) -> torch.Tensor:
    check_range("token_ids", token_ids, table.outputs)
    rows = table.unpacked[token_ids]
    return (rotate(rows) if table.rotated else rows)[:, : table.inputs].contiguous()

from __future__ import annotations

import torch

from kernels.index_check import check_range


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    check_range("token_ids", token_ids, table.shape[0])
    return table[token_ids].to(torch.float32)

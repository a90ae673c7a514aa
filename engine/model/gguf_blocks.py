"""GGUF's blocks of 32 as quantized matrices: the same integers, the same 16-bit scales.

Q4_0 has zeros of 8, Q4_1 minimums, Q8_0 its int8 as values plus 128 and zeros of 128. Layouts as in
``dequantize``, whose weights ``QuantizedMatrix.dequantize()`` equals bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kernels.quantized import QuantizedMatrix

GROUP = 32
KINDS = ("Q4_0", "Q4_1", "Q8_0")
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}

Rows = Callable[[torch.Tensor], torch.Tensor]


def quantized_matrix(
    data: np.ndarray, kind: str, shape: tuple[int, int], reorder: Rows
) -> QuantizedMatrix:
    """``data`` uint8 [num_bytes] of one of ``KINDS``, rows then put into the order of ``reorder``.

    Raises ValueError for a scale or minimum that is not finite.
    """
    blocks = torch.from_numpy(data.reshape(shape[0], -1, _BYTES[kind]).copy())  # [N, G, bytes]
    scales = _halves(blocks, 0)
    minimums = _halves(blocks, 2) if kind == "Q4_1" else None
    if kind == "Q8_0":
        values, zero = blocks[..., 2:] ^ 128, 128.0
    else:
        values, zero = _nibbles(blocks[..., -16:]), 8.0
    return QuantizedMatrix(
        bits=8 if kind == "Q8_0" else 4,
        group=GROUP,
        values=reorder(values.reshape(shape)),
        scales=reorder(scales),
        zeros=torch.full_like(scales, zero) if minimums is None else None,
        minimums=None if minimums is None else reorder(minimums),
    )


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 at byte ``start`` of every block, as fp32 [N, G]."""
    half = blocks[..., start : start + 2].contiguous().view(torch.float16)
    found = half.squeeze(-1).to(torch.float32)
    if not found.isfinite().all():
        raise ValueError("a scale or minimum is NaN or infinity")
    return found


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, G, 16] to [N, G, 32]: low nibbles, then high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)

"""Small integers packed into 32-bit words."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 ``[R, W]`` to uint8 ``[R, W * 32 / bits]``, the lowest ``bits`` of a word first."""
    octets = words.contiguous().view(torch.uint8)  # [R, 4 * W]
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def words_for(count: int, bits: int) -> int:
    """Words that ``count`` integers take, the last one filled up."""
    return -(-count * bits // 32)

"""Law 1 for reference ops: a library routine may reduce in an order that depends on its shape and
on how many threads share it.

So it is only ever called with one shape, tiles of 16 rows, the last one padded with zeros, and on
one thread. What a row computes to then depends neither on how many rows there are nor on where it
stands among them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.threads import torch_threads

TILE_ROWS = 16


def map_row_tiles(
    op: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Fills ``out [T, N]`` with ``op`` over 16-row tiles of ``x [T, K]`` and returns it.

    ``op`` maps ``[16, K]`` to ``[16, N]``, each row from its own row.
    """
    with torch_threads(1):
        for start in range(0, x.shape[0], TILE_ROWS):
            tile = x[start : start + TILE_ROWS]
            rows = tile.shape[0]
            padded = F.pad(tile, (0, 0, 0, TILE_ROWS - rows))
            out[start : start + rows] = op(padded)[:rows]
    return out

"""Matrix product with a packed weight matrix; the LM head is one too."""

from __future__ import annotations

import torch

from kernels import dispatch
from kernels.packed_matrix import PackedMatrix


def linear(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, one path for every number of rows (law 1).

    ``x`` [T, K] fp32; ``bias`` [N] fp32 or None. Returns a new [T, N] fp32. ``x`` is first cut to
    what the weight's format multiplies with, each row by itself:

    - "f32": nothing; "bf16": rounded to bf16 (nearest, ties to even);
    - "int8", "int4": rotated if the weight is, then, per group of the weight's size, times
      ``limit / max|x|`` and rounded to integers (ties to even) whose scale is ``max|x| / limit``,
      ``limit`` being 127 for 8-bit inputs and 127 * 257 for 16-bit ones, two signed bytes each.

    Order of the native kernel: every output has its own sum. Floats: fused multiply-add, inputs
    ascending; of a pair of bf16 inputs the second first. Integers: exact in int32 within a group;
    then, groups ascending, ``sum = fma(group sum, weight scale * input scale, sum)``, and with
    offsets ``sum = fma(offset, input scale * sum of the inputs, sum)``, where the offset is
    ``0 - zero * scale`` or the minimum. The results are the same bits on every instruction set,
    but for subnormal numbers in bf16. A NaN or infinity in x or in a scale shows in its row.
    """
    out: torch.Tensor = dispatch.implementation("linear").linear(x, weight, bias)
    return out

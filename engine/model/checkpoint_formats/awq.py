"""AWQ checkpoints (Lin et al., 2023, arXiv:2306.00978), version "gemm" as AutoAWQ writes it.

A module has ``qweight`` int32 [K, N / 8], ``qzeros`` int32 [G, N / 8] and ``scales`` [G, N]. A word
holds 8 neighbouring outputs, 4 bits each, from the lowest bits on: 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from engine.model.checkpoint_formats.grouped import GroupedMatrix, finite, group_of
from engine.model.checkpoint_formats.parts import FLOATS, Parts
from engine.model.checkpoint_formats.settings import Settings
from engine.model.hf_folder import FolderTensor

_OUTPUT_OF_PLACE = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(settings: Settings) -> Callable[[Parts], GroupedMatrix | None]:
    """Raises ModelError for settings that are not supported."""
    settings.one_of(("version", "format"), ("gemm",), default="gemm")
    settings.one_of(("bits", "w_bit"), (4,))
    settings.one_of("zero_point", (True,), default=True)
    return partial(_take, settings.group_size(("group_size", "q_group_size")))


def _take(group_size: int | None, parts: Parts) -> GroupedMatrix | None:
    if not parts.has("qweight"):
        return None
    qweight = parts.tensor("qweight", ("I32",), (None, None))
    num_columns, num_words = qweight.shape
    num_rows = num_words * 8
    group = group_of(parts.module, group_size, num_columns)
    qzeros = parts.tensor("qzeros", ("I32",), (num_columns // group, num_words))
    scales = parts.tensor("scales", FLOATS, (num_columns // group, num_rows))
    return GroupedMatrix(
        layout=f"awq gemm {group}",
        parts=(qweight, qzeros, scales),
        bits=4,
        group=group,
        shape=(num_rows, num_columns),
        values=lambda: _outputs(qweight),
        scales=lambda: finite(scales).T,
        zeros=lambda: _outputs(qzeros),
    )


def _outputs(packed: FolderTensor) -> torch.Tensor:
    """int32 [R, N / 8] to uint8 [N, R]."""
    words = packed.load().T.contiguous()
    values = torch.empty(len(words), 8, words.shape[1], dtype=torch.uint8)
    for place, output in enumerate(_OUTPUT_OF_PLACE):
        values[:, output] = words >> 4 * place & 15
    return values.flatten(0, 1)

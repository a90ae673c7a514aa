"""GPTQ checkpoints (Frantar et al., 2022, arXiv:2210.17323) as AutoGPTQ and GPTQModel write them.

A module has ``qweight`` int32 [K * bits / 32, N], packed along K; ``scales`` [G, N]; ``qzeros``
int32 [G, N * bits / 32], packed along N; and ``g_idx`` int32 [K], the group of every column.
Version 1 (``gptq``) stores zero points less 1, version 2 (``gptq_v2``) as they are.

With ``desc_act`` the columns were quantized in order of their activations, and ``g_idx`` scatters
the groups. It is honoured whatever ``desc_act`` says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from engine.errors import ModelError
from engine.model.checkpoint_formats.grouped import (
    GroupedMatrix,
    finite,
    group_of,
    scattered_columns,
)
from engine.model.checkpoint_formats.packing import unpack, words_for
from engine.model.checkpoint_formats.parts import FLOATS, Parts
from engine.model.checkpoint_formats.settings import Settings
from engine.model.hf_folder import FolderTensor


def gptq(settings: Settings) -> Callable[[Parts], GroupedMatrix | None]:
    """Raises ModelError for settings that are not supported."""
    settings.absent("is_marlin_format", "rotation", "adapter")
    for rule in settings.section_if_there("dynamic") or ():
        if not rule.startswith("-:"):  # modules left as they are; other rules change bits or groups
            settings.absent("dynamic")
    return partial(
        _take,
        settings.one_of(("checkpoint_format", "format"), ("gptq", "gptq_v2"), default="gptq"),
        settings.one_of("bits", (4, 8)),
        settings.group_size(),
        settings.one_of("desc_act", (False, True), default=False),
    )


def _take(
    version: str, bits: int, group_size: int | None, desc_act: bool, parts: Parts
) -> GroupedMatrix | None:
    if not parts.has("qweight"):
        return None
    qweight = parts.tensor("qweight", ("I32",), (None, None))
    packed_rows, num_rows = qweight.shape
    num_columns = packed_rows * 32 // bits
    group = group_of(parts.module, group_size, num_columns)
    num_groups = num_columns // group
    qzeros = parts.tensor("qzeros", ("I32",), (num_groups, words_for(num_rows, bits)))
    scales = parts.tensor("scales", FLOATS, (num_groups, num_rows))
    found = [qweight, qzeros, scales]
    columns = None
    if desc_act or parts.has("g_idx"):
        g_idx = parts.tensor("g_idx", ("I32",), (num_columns,))
        columns = scattered_columns(g_idx, group)
        found.append(g_idx)
    return GroupedMatrix(
        layout=f"{version} {bits} {group}",
        parts=tuple(found),
        bits=bits,
        group=group,
        shape=(num_rows, num_columns),
        values=lambda: unpack(qweight.load().T, bits),
        scales=lambda: finite(scales).T,
        zeros=lambda: _zeros(qzeros, version, bits, num_rows),
        columns=columns,
    )


def _zeros(qzeros: FolderTensor, version: str, bits: int, num_rows: int) -> torch.Tensor:
    """``[N, G]``. Raises ModelError for a zero point of version 1 that no two programs agree on.

    All ones stand for -1 (read as 0 by some, with a carry into the next zero point by others) or
    for 2^bits - 1 (read as 2^bits).
    """
    zeros = unpack(qzeros.load(), bits)[:, :num_rows].T
    if version == "gptq_v2":
        return zeros
    if (zeros == 2**bits - 1).any():
        raise ModelError(
            f"tensor {qzeros.name} holds zero point {2**bits - 1}; "
            f"0 to {2**bits - 2} are supported in format gptq, all in gptq_v2"
        )
    return zeros + 1

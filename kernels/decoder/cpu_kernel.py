from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import _native
from kernels.decoder import Decoder, DecoderWeights, DraftRows
from kernels.layout import PageLayout
from kernels.packed_matrix import PackedMatrix
from kernels.progress import LayerProgress
from kernels.ragged import RaggedBatch, Said

_Pool = tuple[NDArray[np.uint8], str, int]
"""Its memory, the elements' type, and tokens per page."""


def decoder(weights: DecoderWeights) -> Decoder:
    return NativeDecoder(weights)


class NativeDecoder:
    def __init__(self, weights: DecoderWeights) -> None:
        self._vocab_size = weights.head.outputs
        native = _native_form(weights)
        native.layers = [_native_form(layer) for layer in weights.layers]
        native.states = None if weights.states is None else _native_form(weights.states)
        native.width = weights.width
        self._decoder = _native.Decoder(native)
        self._seen: tuple[torch.Tensor, PageLayout, _Pool] | None = None

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        given = batch.given
        # As numpy arrays: their memory is asked for without a detour through Python (DLPack).
        logits = None
        if not batch.best_only:
            logits = np.empty((batch.num_logits, self._vocab_size), dtype=np.float32)
        best = self._decoder.forward(
            given["token_ids"],
            batch.states,
            given["positions"],
            given["query_starts"],
            given["page_tables"],
            *self._pool(kv, layout),
            given["logit_rows"],
            logits,
            batch.hidden,
            *_told(batch.progress),
        )
        return best if logits is None else torch.from_numpy(logits)

    def draft(
        self, rows: DraftRows, lengths: Sequence[int], kv: torch.Tensor, layout: PageLayout
    ) -> list[list[int]]:
        return self._decoder.draft(
            rows.tokens,
            rows.states,
            rows.positions,
            rows.tables,
            *self._pool(kv, layout),
            lengths,
        )

    def _pool(self, kv: torch.Tensor, layout: PageLayout) -> _Pool:
        """What tells the kernels of the pool, which is the same at nearly every step."""
        if self._seen is None or self._seen[0] is not kv or self._seen[1] is not layout:
            layout.check_lanes()
            self._seen = kv, layout, (kv.numpy(), layout.kv_dtype, layout.page_size)
        return self._seen[2]


def _told(progress: LayerProgress | None) -> tuple[torch.Tensor | None, int, int]:
    if progress is None:
        return None, 1, -1
    return progress.counter, progress.mark_every, progress.event


def _native_form(part: Any) -> SimpleNamespace:
    """A dataclass's fields, packed matrices as the native kernels take them."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return SimpleNamespace(
        **{
            name: value.native if isinstance(value, PackedMatrix) else value
            for name, value in values.items()
        }
    )

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import _native
from kernels.decoder import Decoder, DecoderWeights, DraftRows, Int64
from kernels.layout import PageLayout
from kernels.packed_matrix import PackedMatrix
from kernels.progress import LayerProgress
from kernels.ragged import RaggedBatch


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
        self._seen: tuple[torch.Tensor, NDArray[np.uint8]] | None = None

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> torch.Tensor:
        layout.check_lanes()
        logits = None
        if not batch.best_only:
            logits = torch.empty(len(batch.logit_rows), self._vocab_size)
        best = np.empty(len(batch.logit_rows), dtype=np.int32)
        # As numpy arrays: their memory is asked for without a detour through Python (DLPack).
        self._decoder.forward(
            batch.token_ids,
            batch.states,
            batch.positions,
            batch.query_starts,
            batch.page_tables,
            self._array(kv),
            layout.kv_dtype,
            layout.page_size,
            batch.logit_rows,
            None if logits is None else logits.numpy(),
            best,
            batch.hidden,
            *_told(batch.progress),
        )
        return torch.from_numpy(best) if logits is None else logits

    def draft(
        self, rows: DraftRows, lengths: Int64, ids: Int64, kv: torch.Tensor, layout: PageLayout
    ) -> Int64:
        layout.check_lanes()
        drafts = np.empty((len(lengths), int(lengths.max(initial=0))), dtype=np.int64)
        self._decoder.draft(
            rows.tokens.copy(),
            rows.states.copy(),
            rows.positions.copy(),
            rows.tables,
            self._array(kv),
            layout.kv_dtype,
            layout.page_size,
            lengths,
            ids,
            drafts,
        )
        return drafts

    def _array(self, kv: torch.Tensor) -> NDArray[np.uint8]:
        """The pool for numpy, which is the same at nearly every step."""
        if self._seen is None or self._seen[0] is not kv:
            self._seen = kv, kv.numpy()
        return self._seen[1]


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

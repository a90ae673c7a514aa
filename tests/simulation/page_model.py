"""The hash model's idea, small: the next token is a hash of the contents of all pages before it.

``engine/model/hash_model.py`` runs through the same kernels as a real model; this one is plain
numpy, because a simulation runs a hundred thousand steps a minute. A wrong, lost, doubled or stale
page changes the tokens all the same.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash

from engine.model import ModelSpec
from engine.model.hash_model import END, MAX_CONTEXT, VOCAB_SIZE, HashTokenizer
from engine.model.load import LoadedModel
from kernels.layout import LANES, PageLayout
from kernels.ragged import RaggedBatch, Said

NUM_LAYERS, HEAD_DIM = 2, 2
_END_EVERY = 64  # tokens, on average
_ELEMENT = np.dtype(np.float32)


class PageModel:
    """Keys and values are integers hashed from token, position, layer and lane."""

    spec = ModelSpec(
        name="pages",
        digest="00" * 16,
        numerics="pages/fp32/1",
        vocab_size=VOCAB_SIZE,
        max_context=MAX_CONTEXT,
        eos_token_ids=frozenset({END}),
        num_layers=NUM_LAYERS,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        weight_mode="fp32",
        kv_dtype="fp32",
        weight_bytes=1,
    )

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        keys, values = _views(kv, layout)
        tables, positions = batch.page_tables, batch.positions
        owner = np.arange(len(tables)).repeat(np.diff(batch.query_starts))
        pages = tables[owner, positions // layout.page_size]
        offsets = positions % layout.page_size
        content = _content(batch.token_ids, positions)  # [T, 2, NUM_LAYERS, HEAD_DIM]
        keys[pages, :, offsets // LANES, :, offsets % LANES] = content[:, 0]
        values[pages, :, offsets] = content[:, 1]
        seeds = []
        for row in batch.logit_rows:
            length = int(positions[row]) + 1
            slots = tables[owner[row], : -(-length // layout.page_size)]
            seeds.append(_digest(keys[slots], values[slots], length))
        if batch.best_only:
            return [_best(seed) for seed in seeds]
        return torch.from_numpy(np.stack([_logits(seed) for seed in seeds]))


LOADED = LoadedModel(PageModel(), HashTokenizer(), "pages")


def _views(kv: torch.Tensor, layout: PageLayout) -> tuple[np.ndarray, np.ndarray]:
    """Keys [pages, layers, sub-blocks, HEAD_DIM, LANES] and values [pages, layers, tokens,
    HEAD_DIM] of a pool, sharing its memory."""
    heads = kv.numpy().view(_ELEMENT)[:, :, 0]
    num_pages = len(heads)
    keys = heads[:, :, : layout.head_elements]
    values = heads[:, :, layout.head_elements :]
    return (
        keys.reshape(num_pages, NUM_LAYERS, -1, HEAD_DIM, LANES, copy=False),
        values.reshape(num_pages, NUM_LAYERS, -1, HEAD_DIM, copy=False),
    )


_LANES = np.arange(2 * NUM_LAYERS * HEAD_DIM).reshape(2, NUM_LAYERS, HEAD_DIM)


def _content(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Integers 0 .. 65535 that look random, [T, 2, NUM_LAYERS, HEAD_DIM]."""
    rows = (tokens * MAX_CONTEXT + positions) * _LANES.size
    x = (rows[:, None, None, None] + _LANES) * 0x45D9F3B & 0xFFFFFFFF
    return (x ^ x >> 16) * 0x2C1B3C6D >> 8 & 0xFFFF


def _digest(keys: np.ndarray, values: np.ndarray, length: int) -> int:
    """xxh3-64 over the first ``length`` tokens of some pages."""
    by_token = keys.transpose(0, 2, 4, 1, 3).reshape(-1, NUM_LAYERS, HEAD_DIM)[:length]
    state = xxhash.xxh3_64(np.ascontiguousarray(by_token).data)
    by_token = values.transpose(0, 2, 1, 3).reshape(-1, NUM_LAYERS, HEAD_DIM)[:length]
    state.update(np.ascontiguousarray(by_token).data)
    return state.intdigest()


def _best(seed: int) -> int:
    return END if seed % _END_EVERY == 0 else (seed >> 8) % 256


def _logits(seed: int) -> np.ndarray:
    """Random logits whose largest is that of ``_best``."""
    logits = np.random.Generator(np.random.Philox(seed)).random(VOCAB_SIZE, np.float32)
    logits[_best(seed)] = 1.5
    return logits

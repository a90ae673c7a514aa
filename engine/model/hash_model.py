"""A model for tests of the whole system: its next token is a hash of the contents of its pages.

Every key and value is a small integer, exact in every KV dtype, hashed from token, position, layer,
lane and which of the two it is: a row of another token or position differs in nearly all lanes.
The logits of a row come from a hash over the keys and values of all positions up to the row, read
back from the pages: a wrong, lost, doubled or stale page changes the text. Nothing is remembered
outside the pages. It takes milliseconds and needs no file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
import xxhash

from engine.chat_template import ChatMessage, check_messages
from engine.errors import InvalidRequest
from engine.model import ModelSpec
from kernels.kv_write import kv_write
from kernels.layout import PageLayout, read_tokens
from kernels.ragged import RaggedBatch, Said, best_ids, row_slots

NUM_BYTES = 256
START, END_OF_MESSAGE, END = 257, 258, 259  # 256 is not used
SPECIALS = {"<|start|>": START, "<|end|>": END_OF_MESSAGE, "<|eos|>": END}
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")
VOCAB_SIZE = 260
NUM_LAYERS, HEAD_DIM = 2, 16
MAX_CONTEXT = 4096
_MASK = 0xFFFFFFFF
_SPREAD = 3.0
_END_MALUS = 6.0  # the end is drawn for less than one token in 300


class HashModel:
    """``kv_dtype`` is "fp32", "bf16" or "int8"; the text is the same under all."""

    def __init__(self, kv_dtype: str) -> None:
        self.spec = ModelSpec(
            name="hash",
            digest="00" * 16,
            numerics=f"hash/{kv_dtype}/1",
            vocab_size=VOCAB_SIZE,
            max_context=MAX_CONTEXT,
            eos_token_ids=frozenset({END}),
            num_layers=NUM_LAYERS,
            num_kv_heads=1,
            head_dim=HEAD_DIM,
            weight_mode="fp32",
            kv_dtype=kv_dtype,
            weight_bytes=1,
        )

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> Said:
        pages, offsets = row_slots(batch, layout.page_size)
        base = batch.progress.num_done if batch.progress else 0
        for layer in range(NUM_LAYERS):
            keys, values = _content(batch, layer)  # [T, 1, HEAD_DIM] each
            kv_write(keys, values, kv, layer, pages, offsets, layout)
            if batch.progress is not None:
                batch.progress.layer_done(base, layer, NUM_LAYERS)
        logits = torch.empty(batch.num_logits, VOCAB_SIZE)
        ends = batch.query_starts[1:]
        for index, row in enumerate(batch.logit_rows):
            sequence = int(np.searchsorted(ends, row, side="right"))
            length = int(batch.positions[row]) + 1
            table = torch.from_numpy(batch.page_tables[sequence])
            logits[index] = _logits(_digest(kv, layout, table, length))
        return best_ids(logits) if batch.best_only else logits


def _content(batch: RaggedBatch, layer: int) -> torch.Tensor:
    """Keys and values of a layer [2, T, 1, HEAD_DIM], integers -127 .. 127, exact in bf16.

    In int8 too: the first lane is always 127, so the scale is 1.
    """
    places = (batch.token_ids * MAX_CONTEXT + batch.positions) * NUM_LAYERS + layer
    row = torch.from_numpy(places)
    lanes = torch.arange(2 * HEAD_DIM).view(2, 1, 1, HEAD_DIM)
    content = (_mixed(row.view(1, -1, 1, 1) * (2 * HEAD_DIM) + lanes) % 255 - 127).float()
    content[..., 0] = 127
    return content


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A permutation of 0 .. 2^32 - 1 that looks random in its low bits, in int64."""
    x = x * 0x45D9F3B & _MASK
    x = (x ^ x >> 16) * 0x2C1B3C6D & _MASK
    return x ^ x >> 15


def _digest(kv: torch.Tensor, layout: PageLayout, table: torch.Tensor, length: int) -> int:
    """xxh3-64 over keys and values of positions ``0 .. length - 1`` of all layers."""
    slots = table[: -(-length // layout.page_size)].long()
    state = xxhash.xxh3_64()
    for layer in range(NUM_LAYERS):
        for content in read_tokens(kv[slots, layer, 0], layout):  # [pages, page_size, HEAD_DIM]
            by_token = content.reshape(-1, HEAD_DIM)[:length]
            state.update(by_token.contiguous().numpy().data)
    return state.intdigest()


def _logits(seed: int) -> torch.Tensor:
    logits = np.random.Generator(np.random.Philox(seed)).standard_normal(VOCAB_SIZE, np.float32)
    logits *= np.float32(_SPREAD)
    logits[NUM_BYTES:] -= np.float32(_END_MALUS)
    return torch.from_numpy(logits)


class HashTokenizer:
    """One token per byte, and the special ones."""

    vocab_size = VOCAB_SIZE

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        if not parse_special:
            return _bytes_of(text)
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            ids += [SPECIALS[part]] if part in SPECIALS else _bytes_of(part)
        return ids

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        check_messages(messages)
        ids: list[int] = []
        for message in messages:
            ids += [START, *_bytes_of(message.role), *_bytes_of(message.content), END_OF_MESSAGE]
        return [*ids, START]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if 0 <= token_id < NUM_BYTES else b""


def _bytes_of(text: str) -> list[int]:
    try:
        return list(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("prompt", "it holds half a surrogate pair", "Unicode text") from None

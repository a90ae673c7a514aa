"""Every native op on arrays in a given memory, in the sizes where it could reach too far.

A function per op runs one case and returns what the op wrote; CASES has the arguments of each.
What the ops keep for themselves between phases is not here: the address sanitizer watches that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import product
from random import Random
from typing import Any

import numpy as np
import torch

from kernels import _native
from kernels.decoder import DecoderWeights
from kernels.decoder.cpu_kernel import decoder as native_decoder
from kernels.layout import PageLayout, kv_view
from kernels.packed_matrix import PackedMatrix, pack_floats, pack_quantized, pack_rotated_int8
from kernels.ragged import RaggedBatch, row_slots
from kernels.sample.rule import Rule
from tests.kernels.guard_pages import Memory
from tests.kernels.matrices import blocks
from tests.kernels.test_decoder import FEATURES, PACKERS, VOCABULARY, going_on, make
from tests.kernels.test_sample import OFF, rule_from

ROWS = range(1, 14)
WIDTHS = (1, 5, 15, 16, 17, 31, 64, 100)
KV_DTYPES = ("fp32", "bf16", "int8")
GARBAGE = 0xFF  # bytes of an unwritten page: NaN in every KV dtype

FLOAT_KINDS = ("f32", "bf16", "rotated")
BLOCK_KINDS = tuple(product((4, 8), (32, 64, 128), ("none", "zeros", "minimums"), (8, 16)))
# Less than a block of inputs or a tile of outputs, whole ones, one more.
MATRIX_SHAPES = ((1, 1), (31, 63), (32, 64), (33, 128), (70, 65), (96, 200))


@cache
def matrix(kind: Any, outputs: int, inputs: int) -> PackedMatrix:
    with torch.random.fork_rng():
        weight = torch.randn(outputs, inputs)
        if kind == "rotated":
            return pack_rotated_int8(weight)
        if kind in FLOAT_KINDS:
            return pack_floats(weight, torch.float32 if kind == "f32" else torch.bfloat16)
        bits, group, offsets, input_bits = kind
        packed = pack_quantized(blocks(outputs, inputs, bits, group, offsets), inputs)
        return replace(packed, input_bits=input_bits)


def placed(memory: Memory, part: Any) -> Any:
    """A tensor, an array, a packed matrix or a dataclass of them, its arrays in ``memory``."""
    if isinstance(part, torch.Tensor):
        return memory.put(part)
    if isinstance(part, np.ndarray):
        return memory.put(torch.from_numpy(part)).numpy()
    if isinstance(part, tuple):
        return tuple(placed(memory, each) for each in part)
    if is_dataclass(part) and not isinstance(part, type):
        arrays = {each.name: placed(memory, getattr(part, each.name)) for each in fields(part)}
        return replace(part, **arrays)
    return part


def rms_norm(memory: Memory, rows: int, width: int) -> list[torch.Tensor]:
    out = memory.room(rows, width)
    x, weight = memory.put(torch.randn(rows, width)), memory.put(torch.randn(width))
    _native.rms_norm(x, weight, 1e-5, out)
    return [out]


def silu_mul(memory: Memory, rows: int, width: int) -> list[torch.Tensor]:
    out = memory.room(rows, width)
    gate, up = memory.put(torch.randn(rows, width)), memory.put(torch.randn(rows, width))
    _native.silu_mul(gate, up, out)
    return [out]


def linear(memory: Memory, kind: Any, rows: int, outputs: int, inputs: int) -> list[torch.Tensor]:
    weight = placed(memory, matrix(kind, outputs, inputs))
    out = memory.room(rows, outputs)
    bias = memory.put(torch.randn(outputs)) if rows % 2 else None
    _native.linear(memory.put(torch.randn(rows, inputs)), weight.native, bias, out)
    return [out]


def embedding(
    memory: Memory, kind: Any, rows: int, outputs: int, inputs: int
) -> list[torch.Tensor]:
    table = placed(memory, matrix(kind, outputs, inputs))
    out = memory.room(rows, inputs)
    token_ids = torch.arange(outputs - rows, outputs).clamp(min=0)
    _native.embedding(memory.put(token_ids), table.native, out)
    return [out]


def garbage(memory: Memory, layout: PageLayout, num_pages: int) -> torch.Tensor:
    pool = torch.full((num_pages, layout.page_bytes), GARBAGE, dtype=torch.uint8)
    return kv_view(memory.put(pool), layout)


def write(memory: Memory, kv: torch.Tensor, layer: int, slots: Any, layout: PageLayout) -> None:
    shape = (len(slots[0]), layout.num_kv_heads, layout.head_dim)
    k, v = memory.put(torch.randn(shape)), memory.put(torch.randn(shape))
    pages, offsets = (memory.put(each) for each in slots)
    _native.kv_write(k, v, kv, layer, pages, offsets, layout.kv_dtype, layout.page_size)


def kv_write(
    memory: Memory, kv_dtype: str, head_dim: int, page_size: int, rows: int
) -> list[torch.Tensor]:
    """The first slots of the pool's first layer, and the last ones of its last layer."""
    layout = PageLayout(2, 3, head_dim, page_size, kv_dtype)
    kv = garbage(memory, layout, 2)
    at = torch.arange(rows)
    write(memory, kv, 0, (torch.zeros_like(at), at), layout)
    write(memory, kv, 1, (torch.ones_like(at), page_size - 1 - at), layout)
    return [kv]


def two_sequences(end: int, rows: int, page_size: int) -> RaggedBatch:
    """The ``rows`` last rows of two sequences of ``end`` tokens; the second has the last pages."""
    max_pages = -(-end // page_size)
    positions = np.tile(np.arange(end - rows, end), 2)
    return RaggedBatch(
        token_ids=np.arange(2 * rows) % VOCABULARY,
        positions=positions,
        query_starts=np.array([0, rows, 2 * rows]),
        page_tables=np.arange(2 * max_pages, dtype=np.int32).reshape(2, max_pages),
        logit_rows=np.arange(2 * rows),
    )


def paged_attention(
    memory: Memory,
    kv_dtype: str,
    head_dim: int,
    page_size: int,
    group: int,
    end: int,
    rows: int,
    window: int | None,
) -> list[torch.Tensor]:
    layout = PageLayout(2, 3, head_dim, page_size, kv_dtype)
    whole = two_sequences(end, end, page_size)
    kv = garbage(memory, layout, whole.page_tables.size)
    write(memory, kv, 1, row_slots(whole, page_size), layout)

    batch = placed(memory, two_sequences(end, rows, page_size))
    q = memory.put(torch.randn(2 * rows, 3 * group, head_dim))
    out = memory.room(*q.shape)
    _native.paged_attention(
        q,
        kv,
        1,
        batch.positions,
        batch.query_starts,
        batch.page_tables,
        kv_dtype,
        page_size,
        head_dim**-0.5,
        window,
        out,
    )
    return [out]


SIZES: tuple[dict[str, Any], ...] = (
    *FEATURES,
    {"width": 64, "head_dim": 32, "inner": 128, "bias": True},  # whole tiles and blocks
    {"width": 1, "heads": 1, "kv_heads": 1, "head_dim": 16, "inner": 1},
)


@cache
def weights_of(mode: str, size: int, positions: int) -> DecoderWeights:
    """With rotation tables for ``positions`` and no more."""
    weights = make(mode, **SIZES[size])
    return replace(weights, cos=weights.cos[:positions], sin=weights.sin[:positions])


def decoder(
    memory: Memory, mode: str, size: int, kv_dtype: str, page_size: int, rows: int
) -> list[torch.Tensor]:
    """A step of all but ``rows`` tokens, then one of these, to the last slot of the pool; then one
    of a decoder that goes on from hidden rows."""
    end = page_size
    weights = placed(memory, weights_of(mode, size, end))
    layout = PageLayout(
        len(weights.layers), weights.num_kv_heads, weights.head_dim, page_size, kv_dtype
    )
    kv = garbage(memory, layout, 2)

    def run(weights: DecoderWeights, batch: RaggedBatch, wants_logits: bool) -> list[torch.Tensor]:
        batch = placed(memory, batch)
        logits = memory.room(batch.num_logits, VOCABULARY) if wants_logits else None
        hidden = memory.room(batch.num_logits, weights.width)
        best = native_decoder(weights)._decoder.forward(
            batch.token_ids,
            batch.states,
            batch.positions,
            batch.query_starts,
            batch.page_tables,
            kv,
            kv_dtype,
            page_size,
            batch.logit_rows,
            logits,
            hidden,
        )
        return [torch.tensor(best), hidden, *([] if logits is None else [logits])]

    def draft(weights: DecoderWeights, batch: RaggedBatch) -> list[torch.Tensor]:
        states = [memory.put(torch.from_numpy(row)).numpy() for row in batch.states]
        drafts = native_decoder(weights)._decoder.draft(
            batch.token_ids,
            states,
            batch.positions,
            batch.page_tables,
            kv,
            kv_dtype,
            page_size,
            [1, 1],
        )
        return [torch.tensor(drafts)]

    written = [kv]
    written += run(weights, two_sequences(end - rows, end - rows, page_size), False)
    written += run(weights, two_sequences(end, rows, page_size), True)
    if mode in ("fp32", "int8"):
        onwards = placed(memory, going_on(mode, weights_of(mode, size, end)))
        batch = two_sequences(end, 1, page_size)
        states = torch.randn(batch.num_rows, weights.width).numpy()
        written += run(onwards, replace(batch, states=states), False)
        written += draft(onwards, replace(batch, states=states))
    return written


def sample(memory: Memory, vocab_size: int, rows: int) -> list[torch.Tensor]:
    generator = np.random.default_rng(vocab_size + rows)

    def put(values: Any) -> Any:
        return memory.put(torch.from_numpy(np.array(values))).numpy()

    def placed_rule(rule: Rule) -> Rule:
        arrays = ("bias_ids", "biases", "seen_ids", "forbidden")
        return replace(rule, **{name: put(getattr(rule, name)) for name in arrays})

    top = min(vocab_size, 20)
    rules = []
    for row in range(rows):
        off = list(OFF)[row % 8]
        given = OFF[off] if off in ("log_min_p", "top_k", "top_p", "temperature") else {}
        rules.append(placed_rule(rule_from(generator, vocab_size, num_top=top, **given)))
    token_ids = memory.room(rows, dtype=torch.int32)
    logprobs = memory.room(rows)
    top_ids, top_logprobs = memory.room(rows, top, dtype=torch.int32), memory.room(rows, top)
    output_ids = generator.integers(0, vocab_size, (rows, 7)).astype(np.int32)
    logits = generator.normal(0, 3, (rows, vocab_size)).astype(np.float32)
    _native.sample(
        [put(row) for row in logits],
        rules,
        [put(row) for row in output_ids],
        *(each.numpy() for each in (token_ids, logprobs, top_ids, top_logprobs)),
    )
    return [token_ids, logprobs, top_ids, top_logprobs]


KINDS = (*FLOAT_KINDS, *BLOCK_KINDS)
FEW_ROWS = (1, 2, 13)  # enough where every row is a unit of its own
WINDOWS = (None, 1, 20, 150)


def products(row_counts: Iterable[int]) -> list[tuple[Any, ...]]:
    """Every kind of matrix with every number of rows, each time in another shape."""
    return [
        (kind, rows, *MATRIX_SHAPES[(index + rows) % len(MATRIX_SHAPES)])
        for index, kind in enumerate(KINDS)
        for rows in row_counts
    ]


def steps() -> list[tuple[Any, ...]]:
    """Every kind of decoder in every size, each time with other pages and rows."""
    return [
        (mode, size, KV_DTYPES[(kind + size) % 3], (16, 32)[(kind + size) % 2], 1 + index % 13)
        for index, ((kind, mode), size) in enumerate(product(enumerate(PACKERS), range(len(SIZES))))
    ]


def contexts(count: int) -> list[tuple[Any, ...]]:
    """``count`` of all combinations, evenly drawn, the same ones every time."""
    head_dims, page_sizes, groups = (16, 48, 64, 80, 256), (16, 48), (1, 3, 8)
    ends = (13, 16, 17, 96, 129, 400)
    every = product(KV_DTYPES, head_dims, page_sizes, groups, ends, ROWS, WINDOWS)
    return Random(1).sample(list(every), count)


Op = Callable[..., list[torch.Tensor]]
CASES: dict[str, tuple[Op, list[tuple[Any, ...]]]] = {
    "rms_norm": (rms_norm, list(product(ROWS, WIDTHS))),
    "silu_mul": (silu_mul, list(product(ROWS, WIDTHS))),
    "linear": (linear, products((*ROWS, 50))),
    "embedding": (embedding, products(FEW_ROWS)),
    "kv_write": (kv_write, list(product(KV_DTYPES, (1, 5, 16, 80), (16, 48), FEW_ROWS))),
    "paged_attention": (paged_attention, contexts(120)),
    "Decoder": (decoder, steps()),
    "sample": (sample, list(product((2, 15, 63, 64, 65, 1000), FEW_ROWS))),
}

"""What ``kernels.bench`` compares and times: a few cases for every op that has a kernel.

Shapes are those of one layer of a small model.
"""

from __future__ import annotations

import copy
import itertools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import log
from typing import Any

import numpy as np
import torch

from kernels.decoder import DecoderLayer, DecoderWeights
from kernels.dispatch import IMPLEMENTATIONS
from kernels.layout import KV_DTYPES, PageLayout, kv_view, read_tokens
from kernels.packed_matrix import (
    PackedMatrix,
    pack_floats,
    pack_quantized,
    pack_rotated_int8,
    quantize_int4,
)
from kernels.ragged import RaggedBatch, row_slots
from kernels.rope import rope_tables
from kernels.sample import Row, Tokens
from kernels.sample.rule import Rule

HIDDEN, FEED_FORWARD, VOCABULARY = 576, 1536, 49_152
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
CONTEXT = 2048
MOST_SEQUENCES = 64
LAYERS, DECODER_CONTEXT = 2, 128

# How far a result may be off, relative to the largest number of the reference's.
SAME = 0.0
"""Single IEEE operations, or an order that the contract fixes: the reference has the same bits."""
RELATIVE = 2e-5
"""An fp32 sum in another order. This covers products with integers too: both implementations cut
an input to the same integer, a group's sum is exact, and what is left is the sum over groups."""
BORDER = 3e-2
"""Several products after another with inputs or KV rounded between them. The orders' differences
put a few numbers on the other side of a rounding border, where they move by a whole step: 1/127 of
the largest of 64 numbers, or 2^-8 of a bf16 number, of which an output sees one part in hundreds.
A kernel that reads a wrong weight, scale or key is off by the size of the outputs themselves."""


def _numbers(made: torch.Tensor) -> torch.Tensor:
    return made.float()


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of an op, and what it must read and compute for them (a multiply-add is two).

    ``prepare`` takes the op and its arguments and returns what is timed; ``numbers`` is what is
    compared of the outcome. ``held_bytes`` is the size of the arguments, if most of it is not read.
    """

    name: str
    arguments: tuple[Any, ...]
    num_bytes: int
    num_ops: int
    arithmetic: str = "fp32"
    tolerance: float = RELATIVE
    prepare: Callable[..., Callable[[], Any]] = partial
    numbers: Callable[[Any], torch.Tensor] = _numbers
    held_bytes: int | None = None

    def ready(self, op: Callable[..., Any]) -> Callable[[], Any]:
        """The op on a copy of the arguments."""
        return self.prepare(op, *copy.deepcopy(self.arguments))

    def result(self, op: Callable[..., Any]) -> torch.Tensor:
        return self.numbers(self.ready(op)())


def reference(op: str) -> Callable[..., Any]:
    """The op's definition."""
    module = import_module(f"kernels.{op}.{IMPLEMENTATIONS[op]['reference']}")
    function: Callable[..., Any] = getattr(module, op)
    return function


KINDS: dict[str, Callable[[torch.Tensor], PackedMatrix]] = {
    "fp32": lambda weight: pack_floats(weight, torch.float32),
    "bf16": lambda weight: pack_floats(weight, torch.bfloat16),
    "int8": pack_rotated_int8,
    "int4": lambda weight: pack_quantized(quantize_int4(weight)),
}


def _matrix(kind: str, outputs: int, inputs: int) -> PackedMatrix:
    return KINDS[kind](torch.randn(outputs, inputs) * inputs**-0.5)


def _arithmetic(kind: str) -> str:
    """The peak that a product with such weights is held to."""
    return kind if kind in ("fp32", "bf16") else "int8"


def _linear(rows: int) -> Iterator[Case]:
    x = torch.randn(rows, HIDDEN)
    for outputs, kind in itertools.product((2 * FEED_FORWARD, VOCABULARY), KINDS):
        weight = _matrix(kind, outputs, HIDDEN)
        yield Case(
            f"{rows} x {HIDDEN} x {outputs} {kind}",
            (x, weight, None),
            weight.weight_bytes,
            2 * rows * outputs * HIDDEN,
            _arithmetic(kind),
        )


def _embedding(rows: int) -> Iterator[Case]:
    token_ids = torch.randint(0, VOCABULARY, (rows,))
    for kind in KINDS:
        table = _matrix(kind, VOCABULARY, HIDDEN)
        yield Case(
            f"{rows} of {VOCABULARY} x {HIDDEN} {kind}",
            (token_ids, table),
            rows * (table.weight_bytes // VOCABULARY + 4 * HIDDEN),
            0,
            tolerance=SAME,
            held_bytes=table.data.nbytes,
        )


def _rms_norm(rows: int) -> Iterator[Case]:
    x, weight = torch.randn(rows, HIDDEN), torch.randn(HIDDEN)
    yield Case(f"{rows} x {HIDDEN}", (x, weight, 1e-5), 2 * x.nbytes, 4 * x.numel())


def _silu_mul(rows: int) -> Iterator[Case]:
    gate, up = torch.randn(2, rows, FEED_FORWARD)
    yield Case(f"{rows} x {FEED_FORWARD}", (gate, up), 3 * gate.nbytes, 4 * gate.numel())


def _kv_write(rows: int) -> Iterator[Case]:
    for dtype in KV_DTYPES:
        pool = _Pool(rows, 1, dtype)
        num_bytes = pool.k.nbytes + pool.v.nbytes
        yield Case(
            f"{rows} rows {dtype}",
            pool.writing(0),
            num_bytes,
            0,
            tolerance=SAME,
            prepare=_writing,
            numbers=pool.numbers,
        )


def _writing(op: Callable[..., Any], *arguments: Any) -> Callable[[], torch.Tensor]:
    def write() -> torch.Tensor:
        op(*arguments)
        written: torch.Tensor = arguments[2]
        return written

    return write


def _paged_attention(rows: int) -> Iterator[Case]:
    """Decode rows at the end of a context of their own; many rows are a chunk of one prompt."""
    sequences = rows if rows <= MOST_SEQUENCES else 1
    for dtype in KV_DTYPES:
        pool = _Pool(sequences, CONTEXT, dtype)
        pool.fill()
        batch = pool.last_rows(rows // sequences)
        num_keys = int(batch.positions.sum()) + rows
        q = torch.randn(rows, HEADS, HEAD_DIM)
        yield Case(
            f"{rows} rows, {sequences} x {CONTEXT} keys {dtype}",
            (q, pool.kv, 0, batch, pool.layout, HEAD_DIM**-0.5),
            sequences * CONTEXT * pool.layout.token_bytes,
            4 * num_keys * HEADS * HEAD_DIM,
            "fp32" if dtype == "fp32" else "bf16",
        )


def _decoder(rows: int) -> Iterator[Case]:
    """A step of a small random model: decode rows, or a chunk of one prompt with its last logits.

    The limit is that of all its bytes or of all its operations, as if phases overlapped.
    """
    sequences = rows if rows <= MOST_SEQUENCES else 1
    for kind, dtype in (
        ("fp32", "fp32"),
        ("bf16", "bf16"),
        ("int8", "bf16"),
        ("int8", "int8"),
        ("int4", "int8"),
    ):
        weights = _decoder_weights(kind)
        pool = _Pool(sequences, max(DECODER_CONTEXT, rows // sequences), dtype, LAYERS)
        pool.fill()
        batch = pool.last_rows(rows // sequences)
        batch = replace(batch, logit_rows=batch.query_starts[1:] - 1)
        in_layers = [
            matrix
            for layer in weights.layers
            for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]
        num_keys = int(batch.positions.sum()) + rows
        products = rows * sum(matrix.outputs * matrix.inputs for matrix in in_layers)
        products += sequences * VOCABULARY * HIDDEN
        weight_bytes = sum(matrix.weight_bytes for matrix in (*in_layers, weights.head))
        yield Case(
            f"{rows} rows, {LAYERS} layers {kind}, KV {dtype}",
            (weights, batch, pool.kv, pool.layout),
            weight_bytes + len(pool.k) * pool.layout.token_bytes,
            2 * products + LAYERS * 4 * num_keys * HEADS * HEAD_DIM,
            _arithmetic(kind),
            RELATIVE if (kind, dtype) == ("fp32", "fp32") else BORDER,
            prepare=_step,
        )


def _step(
    op: Callable[..., Any], weights: DecoderWeights, *step: Any
) -> Callable[[], torch.Tensor]:
    return partial(op(weights).forward, *step)


def _decoder_weights(kind: str) -> DecoderWeights:
    """As a checkpoint has them: what follows a norm is of the size of 1."""
    table = _matrix("int8" if kind == "int4" else kind, VOCABULARY, HIDDEN)
    cos, sin = rope_tables(max(DECODER_CONTEXT, CONTEXT), HEAD_DIM, 10_000.0)
    return DecoderWeights(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        norm_eps=1e-5,
        attention_scale=HEAD_DIM**-0.5,
        embedding=table,
        layers=tuple(
            DecoderLayer(
                attention_norm=torch.ones(HIDDEN),
                qkv=_matrix(kind, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
                out=_matrix(kind, HIDDEN, HEADS * HEAD_DIM),
                mlp_norm=torch.ones(HIDDEN),
                gate_up=_matrix(kind, 2 * FEED_FORWARD, HIDDEN),
                down=_matrix(kind, HIDDEN, FEED_FORWARD),
            )
            for _ in range(LAYERS)
        ),
        norm=torch.ones(HIDDEN),
        head=table,
        cos=cos,
        sin=sin,
    )


def _sample(rows: int) -> Iterator[Case]:
    logits = 3 * torch.randn(rows, VOCABULARY)
    for name, rule in (
        ("greedy", Rule()),
        ("temperature", Rule(temperature=0.8)),
        ("top_k, top_p", Rule(temperature=0.8, top_k=50, top_p=0.95)),
        ("min_p, penalties", Rule(temperature=0.8, log_min_p=log(0.05), presence=0.5)),
        ("logprobs", Rule(num_top=5)),
    ):
        yield Case(
            f"{rows} x {VOCABULARY} {name}",
            ([Row(each.numpy(), rule, array("i", range(64))) for each in logits],),
            logits.nbytes,
            0,
            tolerance=SAME,
            numbers=partial(_chosen, rule.num_top),
        )


def _chosen(num_top: int | None, tokens: Tokens) -> torch.Tensor:
    """All of ``tokens`` that is defined."""
    ids = torch.from_numpy(tokens.ids).double()
    if num_top is None:
        return ids
    logprobs = tokens.logprobs, tokens.top_ids.ravel(), tokens.top_logprobs.ravel()
    return torch.cat((ids, *(torch.from_numpy(each).double() for each in logprobs)))


class _Pool:
    """Sequences of equal length in a pool, and their keys and values, the same in each layer."""

    def __init__(self, num_sequences: int, length: int, dtype: str, num_layers: int = 1) -> None:
        self.layout = PageLayout(num_layers, KV_HEADS, HEAD_DIM, kv_dtype=dtype)
        pages = -(-length // self.layout.page_size)
        count = num_sequences * pages
        self.kv = kv_view(
            torch.zeros(count, self.layout.page_bytes, dtype=torch.uint8), self.layout
        )
        self.k, self.v = torch.randn(2, num_sequences * length, KV_HEADS, HEAD_DIM)
        self._tables = torch.randperm(count).to(torch.int32).view(num_sequences, pages).numpy()
        self._length = length

    def last_rows(self, count: int) -> RaggedBatch:
        """The last ``count`` positions of every sequence."""
        sequences = len(self._tables)
        positions = np.tile(np.arange(self._length - count, self._length), sequences)
        return RaggedBatch(
            token_ids=np.zeros_like(positions),
            positions=positions,
            query_starts=np.arange(0, len(positions) + 1, count),
            page_tables=self._tables,
            logit_rows=positions[:0],
        )

    def writing(self, layer: int) -> tuple[Any, ...]:
        """Arguments of ``kv_write`` that put all keys and values into their pages."""
        slots = row_slots(self.last_rows(self._length), self.layout.page_size)
        return (self.k, self.v, self.kv, layer, *slots, self.layout)

    def fill(self) -> None:
        for layer in range(self.layout.num_layers):
            reference("kv_write")(*self.writing(layer))

    def numbers(self, kv: torch.Tensor) -> torch.Tensor:
        """All keys and values that a pool of this layout holds."""
        return torch.stack(read_tokens(kv, self.layout))


def _suffix_automaton(rows: int) -> Iterator[Case]:
    """A token at a time, as sequences grow; the limit is that of reading the text once."""
    for most in (3, VOCABULARY):
        tokens = torch.randint(0, most, (rows,)).tolist()
        yield Case(
            f"{rows} tokens of {most}", (tokens,), 4 * rows, 0, tolerance=SAME, prepare=_repeats
        )


def _repeats(op: Callable[..., Any], tokens: list[int]) -> Callable[[], torch.Tensor]:
    """What repeats after each token of a new text, ``[tokens, 2]``."""

    def run() -> torch.Tensor:
        automaton, found = op(), []
        for token in tokens:
            automaton.append([token])
            found.append(automaton.repeat)
        return torch.tensor(found)

    return run


CASES: dict[str, Callable[[int], Iterator[Case]]] = {
    "decoder": _decoder,
    "embedding": _embedding,
    "kv_write": _kv_write,
    "linear": _linear,
    "paged_attention": _paged_attention,
    "rms_norm": _rms_norm,
    "sample": _sample,
    "silu_mul": _silu_mul,
    "suffix_automaton": _suffix_automaton,
}

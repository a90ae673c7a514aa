"""Pages of one layout into pages of another: page size, order of bytes, and, if allowed, KV dtype.

Tokens go over in the canonical order of (layer, K/V, head, token, dim), in blocks of 16: both ends
have whole blocks, so a block of one is a block of the other, wherever it lies. With equal KV dtype
no bit changes. With another one every number is read as fp32 and rounded once, and how far that
moved it is measured: it is for the caller to say that it may be moved at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kernels.kv_write.reference import quantized
from kernels.layout import LANES, SCALED, PageLayout, scale_views, token_blocks
from kvstore.fingerprint import LayoutFingerprint
from kvstore.memory import PageMemory

MAX_PAGE_TOKENS = 1024
_Parts = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` tokens, both offsets and the count in whole blocks of 16."""

    source_offset: int
    target_page: int
    target_offset: int
    count: int


@dataclass(slots=True)
class Rounding:
    """How far a change of KV dtype moved the numbers; all 0 where none was moved."""

    largest: float = 0.0
    total: float = 0.0
    num_elements: int = 0

    @property
    def mean(self) -> float:
        return self.total / max(self.num_elements, 1)

    def note(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Counts what became of numbers, both of one shape in fp32."""
        moved = (after - before).abs()
        largest = float(moved.max())
        # A NaN stays: whoever reads the error must see it.
        if largest > self.largest or math.isnan(largest):
            self.largest = largest
        self.total += float(moved.sum(dtype=torch.float64))
        self.num_elements += moved.numel()


def layout_of(fingerprint: LayoutFingerprint) -> PageLayout:
    """The layout of a peer's pages. Raises ValueError if pages like these are unknown here."""
    if fingerprint.page_size > MAX_PAGE_TOKENS:
        raise ValueError(
            f"page_size must be at most {MAX_PAGE_TOKENS} tokens, not {fingerprint.page_size}"
        )
    return PageLayout(
        num_layers=fingerprint.num_layers,
        num_kv_heads=fingerprint.num_kv_heads,
        head_dim=fingerprint.head_dim,
        page_size=fingerprint.page_size,
        kv_dtype=fingerprint.kv_dtype,
        layout_id=fingerprint.layout_id,
    )


def spans_of(
    source_page: int, num_tokens: int, first_token: int, source_size: int, target_size: int
) -> Iterator[Span]:
    """Where the first ``num_tokens`` tokens of page ``source_page`` go, token by token in order.

    Tokens of the sequence before ``first_token``, a multiple of 16, are there already. A last block
    that is not full goes as a whole.
    """
    assert first_token % LANES == source_size % LANES == target_size % LANES == 0
    start = source_page * source_size
    end = start + -(-num_tokens // LANES) * LANES
    token = max(start, first_token)
    while token < end:
        page, offset = divmod(token, target_size)
        count = min(end - token, target_size - offset)
        yield Span(token - start, page, offset, count)
        token += count


class PageConverter:
    """Writes pages of ``source`` layout into slots of ``memory``.

    ``slots`` hold the tokens from ``first_page`` (of the target's pages) on, in order.
    """

    def __init__(
        self, source: PageLayout, memory: PageMemory, first_page: int, slots: Sequence[int]
    ) -> None:
        self.rounding = Rounding()
        self._source = source
        self._memory = memory
        self._first_page = first_page
        self._slots = slots
        self._pool = _blocks(memory.kv, memory.layout)

    def write(self, heads: torch.Tensor, page_index: int, num_tokens: int, layers: range) -> None:
        """Writes the ``layers`` of page ``page_index``, of which ``num_tokens`` tokens are valid.

        ``heads`` [len(layers), num_kv_heads, head_bytes] uint8 are those of the source's page, with
        zeros after the last token.
        """
        page = _blocks(heads, self._source)
        size = self._memory.layout.page_size
        first_token = self._first_page * size
        for span in spans_of(page_index, num_tokens, first_token, self._source.page_size, size):
            slot = self._slots[span.target_page - self._first_page]
            taken = _run(span.source_offset, span.count)
            given = _run(span.target_offset, span.count)
            self._copy(
                [part[:, :, taken] for part in page],
                [part[slot, layers.start : layers.stop, :, given] for part in self._pool],
            )

    def finish(self, num_tokens: int) -> None:
        """Everything of a sequence of ``num_tokens`` tokens was written: clears what follows in its
        last page, so that nothing of the slots' previous content is left in them."""
        size = self._memory.layout.page_size
        if num_tokens % size:
            slot = self._slots[num_tokens // size - self._first_page]
            self._memory.clear_tail(slot, num_tokens % size)

    def _copy(self, source: _Parts, target: _Parts) -> None:
        """The same tokens of both."""
        if self._source.kv_dtype == self._memory.layout.kv_dtype:
            for before, after in zip(source, target, strict=True):
                after.copy_(before)
            return
        for kind in range(2):  # K, V
            numbers = _numbers(source, kind)
            if self._memory.layout.kv_dtype == SCALED:
                integers, scales = quantized(numbers)
                target[kind].copy_(integers)
                target[2 + kind].copy_(scales)
            else:
                target[kind].copy_(numbers)
            self.rounding.note(numbers, _numbers(target, kind))


def _run(offset: int, count: int) -> slice:
    """The blocks of ``count`` tokens from ``offset`` on."""
    return slice(offset // LANES, (offset + count) // LANES)


def _blocks(heads: torch.Tensor, layout: PageLayout) -> _Parts:
    """K and V ``[..., num_kv_heads, blocks, 16, head_dim]``, under int8 then their scales
    ``[..., num_kv_heads, blocks, 16]``; sharing storage."""
    elements = token_blocks(heads, layout)
    if layout.kv_dtype != SCALED:
        return elements
    scales = (each.view(*each.shape[:-1], -1, LANES) for each in scale_views(heads, layout))
    return *elements, *scales


def _numbers(parts: _Parts, kind: int) -> torch.Tensor:
    """K (0) or V (1) in fp32."""
    elements = parts[kind].to(torch.float32)
    return elements * parts[2 + kind][..., None] if len(parts) > 2 else elements

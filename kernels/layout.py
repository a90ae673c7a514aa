"""Words for the memory layout of a page of KV cache, defined once and used everywhere.

A *page* holds the keys and values of ``page_size`` consecutive tokens of one sequence, for every
layer and KV head. A page is one contiguous run of bytes, so that it can be handed over, hashed and
shared as a unit; the layers inside it are in order, so a group of layers is a contiguous run too::

    page  = [layer 0][layer 1] ... [layer L-1]
    layer = [head 0][head 1] ... [head H-1]
    head  = [K: page_size/16 sub-blocks of [head_dim][16 tokens]] [V: [page_size tokens][head_dim]]

K keeps 16 tokens as the fastest lanes (a score needs no horizontal sum), V keeps head_dim as the
fastest lanes (the weighted sum of V needs none either). This is layout id ``k16t_vtd``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LANES = 16
LAYOUT_ID = "k16t_vtd"

KV_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Shape and dtype of one page. All counts are at least 1; ``page_size`` is in tokens."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 32
    kv_dtype: str = "fp32"
    layout_id: str = LAYOUT_ID

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {sorted(KV_DTYPES)}, not {self.kv_dtype!r}")
        if self.page_size < LANES or self.page_size % LANES:
            raise ValueError(
                f"page_size must be a multiple of {LANES} tokens, not {self.page_size}"
            )
        if self.layout_id != LAYOUT_ID:
            raise ValueError(f"layout_id must be {LAYOUT_ID!r}, not {self.layout_id!r}")

    @property
    def dtype(self) -> torch.dtype:
        return KV_DTYPES[self.kv_dtype]

    @property
    def head_elements(self) -> int:
        """Elements of K (and as many of V) of one head in one page."""
        return self.page_size * self.head_dim

    @property
    def layer_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_elements * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """KV bytes one token adds, over all layers."""
        return self.page_bytes // self.page_size


def kv_view(memory: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Pool memory ``[num_pages, page_bytes]`` uint8 seen as elements.

    Returns ``[num_pages, num_layers, num_kv_heads, 2, page_size * head_dim]`` of ``layout.dtype``,
    sharing storage; index 3 is 0 for K and 1 for V.
    """
    return memory.view(layout.dtype).view(
        memory.shape[0], layout.num_layers, layout.num_kv_heads, 2, layout.head_elements
    )


def key_view(kv: torch.Tensor, layer: int, layout: PageLayout) -> torch.Tensor:
    """K of one layer: ``[num_pages, num_kv_heads, page_size // 16, head_dim, 16]``, a view."""
    keys = kv[:, layer, :, 0]
    return keys.view(*keys.shape[:2], -1, layout.head_dim, LANES)


def value_view(kv: torch.Tensor, layer: int, layout: PageLayout) -> torch.Tensor:
    """V of one layer: ``[num_pages, num_kv_heads, page_size, head_dim]``, a view."""
    values = kv[:, layer, :, 1]
    return values.view(*values.shape[:2], -1, layout.head_dim)

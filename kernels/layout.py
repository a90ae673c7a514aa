"""Words for the memory layout of a page of KV cache, defined once and used everywhere.

A *page* holds the keys and values of ``page_size`` consecutive tokens of one sequence, for every
layer and KV head. A page is one contiguous run of bytes, so that it can be handed over, hashed and
shared as a unit; the layers inside it are in order, so a group of layers is a contiguous run too::

    page  = [layer 0][layer 1] ... [layer L-1]
    layer = [head 0][head 1] ... [head H-1]
    head  = [K: page_size/16 sub-blocks of [head_dim][16 tokens]] [V: [page_size tokens][head_dim]]
            and under int8 [scales of K: fp32 [page_size]] [scales of V: fp32 [page_size]]

K keeps 16 tokens as the fastest lanes (a score needs no horizontal sum), V keeps head_dim as the
fastest lanes (the weighted sum of V needs none either). This is layout id ``k16t_vtd``, the one the
kernels read. Layout id ``ktd_vtd`` has K in the order of V: all in the canonical order of (layer,
head, K/V, token, dim). Pages of both may be handed over, see ``kvstore.conversion``.

Under int8 each token's K, and its V, has one scale per head: the element is ``scale * integer``,
integers in -127 .. 127, scale = max |x| / 127. A scale is 0 where every x is 0, and NaN where any x
is not finite, so that whatever reads the token shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LANES = 16
LAYOUT_ID = "k16t_vtd"
CANONICAL_LAYOUT_ID = "ktd_vtd"
LAYOUT_IDS = (LAYOUT_ID, CANONICAL_LAYOUT_ID)

KV_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
SCALED = "int8"
_SCALE = torch.float32


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
        if self.layout_id not in LAYOUT_IDS:
            raise ValueError(f"layout_id must be one of {LAYOUT_IDS}, not {self.layout_id!r}")

    def check_lanes(self) -> None:
        """Raises ValueError unless K has 16 tokens as its fastest lanes, as native kernels read."""
        if self.layout_id != LAYOUT_ID:
            raise ValueError(f"layout_id must be {LAYOUT_ID!r} here, not {self.layout_id!r}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements as they stand in the page."""
        return KV_DTYPES[self.kv_dtype]

    @property
    def head_elements(self) -> int:
        """Elements of K (and as many of V) of one head in one page."""
        return self.page_size * self.head_dim

    @property
    def num_scales(self) -> int:
        """Scales of K (and as many of V) of one head in one page."""
        return self.page_size if self.kv_dtype == SCALED else 0

    @property
    def head_bytes(self) -> int:
        return 2 * (self.head_elements * self.dtype.itemsize + self.num_scales * _SCALE.itemsize)

    @property
    def layer_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    @property
    def page_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """KV bytes one token adds, over all layers."""
        return self.page_bytes // self.page_size


def kv_view(memory: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Pool memory ``[num_pages, page_bytes]`` uint8 seen as records of heads.

    Returns ``[num_pages, num_layers, num_kv_heads, head_bytes]`` uint8, sharing storage.
    """
    return memory.view(memory.shape[0], layout.num_layers, layout.num_kv_heads, layout.head_bytes)


def key_view(heads: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """K in records of heads ``[..., head_bytes]``, of any pages and layers of ``k16t_vtd``.

    Returns ``[..., page_size // 16, head_dim, 16]`` of ``layout.dtype``, sharing storage.
    """
    assert layout.layout_id == LAYOUT_ID, layout.layout_id
    return _part(heads, 0, layout.dtype, (-1, layout.head_dim, LANES), layout.head_elements)


def value_view(heads: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """V likewise: ``[..., page_size, head_dim]``."""
    start = layout.head_elements * layout.dtype.itemsize
    return _part(heads, start, layout.dtype, (-1, layout.head_dim), layout.head_elements)


def scale_views(heads: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of K and of V, both ``[..., page_size]`` fp32, empty unless under int8."""
    start = 2 * layout.head_elements * layout.dtype.itemsize
    scales = _part(heads, start, _SCALE, (2, layout.num_scales), 2 * layout.num_scales)
    return scales[..., 0, :], scales[..., 1, :]


def token_blocks(heads: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements of K and of V in the canonical order of (token, dim), whatever the layout.

    Both ``[..., page_size // 16, 16, head_dim]`` of ``layout.dtype``, sharing storage.
    """
    shape, count = (-1, LANES, layout.head_dim), layout.head_elements
    values = _part(heads, count * layout.dtype.itemsize, layout.dtype, shape, count)
    if layout.layout_id == LAYOUT_ID:
        return key_view(heads, layout).transpose(-1, -2), values
    return _part(heads, 0, layout.dtype, shape, count), values


def read_tokens(heads: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as numbers, both ``[..., page_size, head_dim]`` fp32; for reading only."""
    keys, values = (
        blocks.flatten(-3, -2).to(torch.float32) for blocks in token_blocks(heads, layout)
    )
    if layout.kv_dtype != SCALED:
        return keys, values
    key_scales, value_scales = scale_views(heads, layout)
    return keys * key_scales[..., None], values * value_scales[..., None]


def _part(
    heads: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...], count: int
) -> torch.Tensor:
    """``count`` elements from byte ``start`` of each record on."""
    part = heads[..., start : start + count * dtype.itemsize].view(dtype)
    return part.view(*part.shape[:-1], *shape)

"""The bytes of a pool: one allocation, made and touched at start."""

from __future__ import annotations

import torch

from kernels.layout import LANES, PageLayout, key_view, kv_view, scale_views, value_view
from kvstore.page import PageIdentity, group_digest

MAX_GROUP_BYTES = 1 << 20
_POISON = 0xFF  # every fp32, and so every scale, and every bf16 made of these bytes is NaN


class PageMemory:
    """``num_pages`` pages of one layout.

    Fresh memory is poisoned with NaN, so that a read of something never written shows in the output
    and the memory is really there from the start.
    """

    def __init__(self, layout: PageLayout, num_pages: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.bytes = torch.full((num_pages, layout.page_bytes), _POISON, dtype=torch.uint8)
        self.kv = kv_view(self.bytes, layout)
        self._rows = self.bytes.numpy()
        wanted = -(-layout.page_bytes // MAX_GROUP_BYTES)
        self.layers_per_group = -(-layout.num_layers // min(wanted, layout.num_layers))
        self.num_layer_groups = -(-layout.num_layers // self.layers_per_group)

    def group(self, slot: int, layer_group: int) -> memoryview:
        """The bytes of one layer group of one page, writable."""
        start = layer_group * self.layers_per_group * self.layout.layer_bytes
        end = start + self.layers_per_group * self.layout.layer_bytes
        return self._rows[slot, start:end].data

    def clear_tail(self, slot: int, num_tokens: int) -> None:
        """Zeroes all tokens of a page from ``num_tokens`` on: nobody else's bytes leave with it."""
        heads = self.kv[slot]  # [num_layers, num_kv_heads, head_bytes]
        keys, values = key_view(heads, self.layout), value_view(heads, self.layout)
        sub_block, lane = divmod(num_tokens, LANES)
        if sub_block < keys.shape[2]:
            keys[:, :, sub_block, :, lane:] = 0
            keys[:, :, sub_block + 1 :] = 0
        for by_token in (values, *scale_views(heads, self.layout)):
            by_token[:, :, num_tokens:] = 0

    def digests(self, slot: int, identity: PageIdentity) -> tuple[bytes, ...]:
        """One digest per layer group over the page's bytes as they are now."""
        return tuple(
            group_digest(identity, index, self.num_layer_groups, self.group(slot, index))
            for index in range(self.num_layer_groups)
        )

"""The bytes of a pool: one allocation, made and touched at start; and the digests of its pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kernels.huge_pages import private_memory
from kernels.layout import LANES, PageLayout, kv_view, scale_views, token_blocks
from kvstore.page import PageIdentity, group_digest
from kvstore.shared_pool import SharedPool

MAX_GROUP_BYTES = 1 << 20
NUM_GROUPS = 6
_POISON = 0xFF  # every fp32, and so every scale, and every bf16 made of these bytes is NaN


@dataclass(frozen=True)
class LayerGroups:
    """How a page is cut for its way: runs of layers that are digested and sent each by itself.

    Small enough that most of a chunk's pages are away before its last layer is computed, and large
    enough that a group is worth a message.
    """

    layout: PageLayout

    @cached_property
    def count(self) -> int:
        return -(-self.layout.num_layers // int(self.layers_per_group))

    @cached_property
    def layers_per_group(self) -> int:
        wanted = max(NUM_GROUPS, -(-self.layout.page_bytes // MAX_GROUP_BYTES))
        return -(-self.layout.num_layers // min(wanted, self.layout.num_layers))

    def num_bytes(self, group: int) -> int:
        """Of one group of one page."""
        span = self.span(group)
        return int(span.stop - span.start)

    def layers_through(self, group: int) -> int:
        """Number of layers in the groups up to and with this one."""
        return min((group + 1) * self.layers_per_group, self.layout.num_layers)

    def span(self, group: int) -> slice:
        """Where the group's bytes are in a page."""
        start = group * self.layers_per_group
        layer_bytes = self.layout.layer_bytes
        return slice(start * layer_bytes, self.layers_through(group) * layer_bytes)


class PageMemory:
    """``num_pages`` pages of one layout, in ``shared`` memory if given.

    Fresh memory is poisoned with NaN, so that a read of something never written shows in the output
    and the memory is really there from the start. ``generations`` is what the ledger writes its
    slots' generations to.
    """

    def __init__(
        self, layout: PageLayout, num_pages: int, shared: SharedPool | None = None
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.groups = LayerGroups(layout)
        self.shared = shared
        if shared is None:
            memory = private_memory(num_pages * layout.page_bytes)
            self.bytes = torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, -1)
            self.generations = np.zeros(num_pages, dtype=np.uint64)
        else:
            self.bytes = torch.from_numpy(shared.pages)
            self.generations = shared.generations
        self.bytes.fill_(_POISON)
        self.kv = kv_view(self.bytes, layout)
        self._rows = self.bytes.numpy()

    def group(self, slot: int, layer_group: int) -> memoryview:
        """The bytes of one layer group of one page, writable."""
        return self._rows[slot, self.groups.span(layer_group)].data

    def page(self, slot: int) -> memoryview:
        """The bytes of one page, writable."""
        return self._rows[slot, :].data

    def clear_tail(self, slot: int, num_tokens: int) -> None:
        """Zeroes all tokens of a page from ``num_tokens`` on: nobody else's bytes leave with it."""
        heads = self.kv[slot]  # [num_layers, num_kv_heads, head_bytes]
        block, lane = divmod(num_tokens, LANES)
        for blocks in token_blocks(heads, self.layout):
            blocks[:, :, block : block + 1, lane:] = 0
            blocks[:, :, block + 1 :] = 0
        for scales in scale_views(heads, self.layout):
            scales[:, :, num_tokens:] = 0


class PageDigests:
    """Digests of a pool's pages, made once per content: when a layer group is finished.

    Kept while the content stays, so a page damaged later does not get a digest that fits. One
    thread uses it, under a hold on the page.
    """

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self._known: dict[int, tuple[PageIdentity, dict[int, bytes]]] = {}

    def of(self, identity: PageIdentity, layer_group: int) -> bytes:
        """The digest of one finished layer group, 16 bytes."""
        slot = identity.reference.slot
        known, digests = self._known.get(slot, (None, {}))
        if known != identity:
            digests = {}
            self._known[slot] = (identity, digests)
        if layer_group not in digests:
            memory = self._memory
            digests[layer_group] = group_digest(
                identity, layer_group, memory.groups.count, memory.group(slot, layer_group)
            )
        return digests[layer_group]

"""Landing of pages of another layout: verified as what their owner made, then put into our own.

A frame lands beside the pool, under the owner's fingerprint and the name its page has in the
owner's page size; what verified there is converted into the reserved slots at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.layout import PageLayout
from kvstore.conversion import PageConverter, Rounding, layout_of
from kvstore.fingerprint import LayoutFingerprint
from kvstore.landing import LandingError, PageBook, check_digest
from kvstore.memory import LayerGroups, PageMemory
from kvstore.page import Commit, PageFrame
from kvstore.prefix_hash import PrefixHasher


class ConvertingLanding:
    """As ``Landing``, for pages that their owner keeps under ``source``.

    ``first_page`` and ``slots`` are in pages of ``memory``. Raises LandingError.
    """

    def __init__(
        self,
        memory: PageMemory,
        source: LayoutFingerprint,
        tenant: str,
        prompt_ids: Sequence[int],
        first_page: int,
        slots: Sequence[int],
        owner: bytes,
    ) -> None:
        self.layout = _known_layout(source)
        self.first_source_page = first_page * memory.layout.page_size // source.page_size
        self._tokens = prompt_ids[: len(prompt_ids) - 1]
        self._groups = LayerGroups(self.layout)
        self._converter = PageConverter(self.layout, memory, first_page, slots)
        self._staged: dict[tuple[int, int], torch.Tensor] = {}
        hasher = PrefixHasher(tenant, source.digest, source.page_size)
        self._book = PageBook(
            names=hasher.all_pages(self._tokens),
            first_page=self.first_source_page,
            num_tokens=len(self._tokens),
            page_size=source.page_size,
            num_groups=self._groups.count,
            fingerprint=source.digest,
            owner=owner,
        )

    @property
    def num_landed_pages(self) -> int:
        """The owner's pages that are here in full and verified."""
        return self._book.num_landed_pages

    @property
    def rounding(self) -> Rounding:
        """How far another KV dtype moved the numbers so far."""
        return self._converter.rounding

    def claim(self, frame: PageFrame) -> memoryview:
        self._book.claim(frame)
        span = self._groups.span(frame.layer_group)
        staged = torch.empty(span.stop - span.start, dtype=torch.uint8)
        self._staged[_place(frame)] = staged
        return staged.numpy().data

    def verify(self, frame: PageFrame) -> None:
        staged = self._staged.pop(_place(frame))
        check_digest(frame, staged.numpy().data)
        self._book.landed(frame)
        layout = self.layout
        end = self._groups.layers_through(frame.layer_group)
        start = end - len(staged) // layout.layer_bytes
        heads = staged.view(end - start, layout.num_kv_heads, layout.head_bytes)
        identity = frame.identity
        self._converter.write(heads, identity.page_index, identity.num_tokens, range(start, end))

    def finish(self, commit: Commit) -> None:
        self._book.finish(commit)
        self._converter.finish(len(self._tokens))

    def check_committed(self) -> None:
        self._book.check_committed()


def _known_layout(source: LayoutFingerprint) -> PageLayout:
    try:
        return layout_of(source)
    except ValueError as error:
        raise LandingError("layout", str(error)) from None


def _place(frame: PageFrame) -> tuple[int, int]:
    return frame.identity.page_index, frame.layer_group

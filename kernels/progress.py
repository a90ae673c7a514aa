"""How far the steps of a model are, told while they run: the pages of finished layers can leave."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress

import torch


class LayerProgress:
    """Counts layers whose keys and values are in the pages, over all steps that are told to count.

    A step raises the count by the model's number of layers, every ``mark_every`` of them, from
    whatever thread finishes them and without the GIL; ``event`` (an eventfd) becomes readable each
    time. What was counted stays as it is, so a reader may be late.
    """

    def __init__(self, mark_every: int) -> None:
        assert mark_every >= 1
        self.mark_every = mark_every
        self.counter = torch.zeros(1, dtype=torch.int64)
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._count = self.counter.numpy()
        weakref.finalize(self, os.close, self.event)

    @property
    def num_done(self) -> int:
        return int(self._count[0])

    def tell(self, num_done: int) -> None:
        """Raises the count to ``num_done``; a lower number changes nothing."""
        if num_done > self.num_done:
            self._count[0] = num_done
            os.eventfd_write(self.event, 1)

    def layer_done(self, base: int, layer: int, num_layers: int) -> None:
        """One layer of a step that began at count ``base``, for steps that run in Python."""
        done = layer + 1
        if done % self.mark_every == 0 or done == num_layers:
            self.tell(base + done)

    def hush(self) -> None:
        """Makes ``event`` unreadable until the count rises again."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.event)

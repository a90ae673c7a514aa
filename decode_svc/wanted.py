"""What is wanted: the pages of one prompt, before a deadline."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wanted:
    """The prompt whose pages are wanted, and until when on this process's monotonic clock.

    Where ``own_numerics`` is set pages of other numerics are no help: the tokens must be those of
    the worker that had the stream before.
    """

    request_id: bytes
    prompt_ids: tuple[int, ...]
    tenant: str
    deadline: float
    own_numerics: bool = False

    @property
    def remaining_s(self) -> float:
        return max(self.deadline - time.monotonic(), 0.001)

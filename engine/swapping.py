"""What is swapped out, for whom, and whether it pays. Imports neither torch, grpc nor redis."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_WEIGHT = 0.25  # of the newest measurement


@dataclass(frozen=True, slots=True)
class Rates:
    """What this worker measured, in seconds; None where there was nothing to measure yet.

    ``swap_s_per_page`` is the way out and the way back of one page.
    """

    prefill_s_per_token: float | None = None
    swap_s_per_page: float | None = None

    def swap_pays(self, page_size: int) -> bool:
        """Whether copying a page out and back takes less time than computing it again.

        Both grow with the number of pages alike, so one page decides. Unmeasured, it is tried.
        """
        if self.prefill_s_per_token is None or self.swap_s_per_page is None:
            return True
        return self.swap_s_per_page < self.prefill_s_per_token * page_size


def smoothed(before: float | None, measured: float) -> float:
    """A moving average in which old measurements fade."""
    return measured if before is None else before + _WEIGHT * (measured - before)


@dataclass(frozen=True, slots=True)
class SwapOut:
    """Page ``slot`` of the pool is to be stored in ``swap_slot`` before anything is written."""

    slot: int
    swap_slot: int
    page_name: bytes


@dataclass(frozen=True, slots=True)
class SwapIn:
    """Pages of a sequence that come back into reserved slots, after ``num_cached_pages``.

    When they did, ``Landed`` tells how many tokens are there. ``pages`` are like SwapOut.
    """

    name: str
    pages: tuple[SwapOut, ...]
    num_cached_pages: int


class SwapLedger:
    """Who holds which swap slot. A sequence holds slots of its first full pages, in order."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = deque(range(num_slots))
        self._held: dict[str, list[int]] = {}

    @property
    def num_held(self) -> int:
        return self.num_slots - len(self._free)

    def hold(self, owner: str, num_wanted: int) -> list[int]:
        """Slots for up to ``num_wanted`` pages of ``owner``, who holds none."""
        assert owner not in self._held, owner
        slots = [self._free.popleft() for _ in range(min(num_wanted, len(self._free)))]
        if slots:
            self._held[owner] = slots
        return slots

    def held_by(self, owner: str) -> list[int]:
        return self._held.get(owner, [])

    def free(self, owner: str) -> None:
        """The owner needs its swapped pages no more. Unknown owners are fine."""
        self._free.extend(self._held.pop(owner, ()))

    def holders(self) -> dict[str, tuple[int, ...]]:
        return {owner: tuple(slots) for owner, slots in self._held.items()}

    def check(self) -> None:
        """Raises AssertionError unless every slot is free or held exactly once."""
        held = [slot for slots in self._held.values() for slot in slots]
        assert sorted([*held, *self._free]) == list(range(self.num_slots))

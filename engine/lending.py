"""Cached pages lent to other workers: a part of the scheduler, and as pure as it is.

A lease keeps a page from being evicted while another worker reads it; ``Cancel`` of the lease's
name ends it. What sequences here need goes first. Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.pool import PagePool


@dataclass(frozen=True, slots=True)
class Lend:
    """Another worker wants to read cached pages.

    ``prefix_hashes`` name consecutive full pages, the first of them at index ``first_page``.
    """

    name: str
    prefix_hashes: tuple[bytes, ...]
    first_page: int = 0


@dataclass(frozen=True, slots=True)
class LentPage:
    """A sealed full page of the prefix cache, leased for another worker to read."""

    slot: int
    page_index: int
    num_tokens: int
    prefix_hash: bytes


@dataclass(frozen=True, slots=True)
class Grant:
    """What a ``Lend`` got: the pages asked for up to the first that is not lent, and why not.

    ``refusal`` is "absent" if that page is not here, "busy" if sequences here need the room, empty
    if every page is lent.
    """

    name: str
    pages: tuple[LentPage, ...]
    refusal: str


class Lending:
    """Who asked for pages, and who has them, over one pool. One thread uses it."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._asked: dict[str, Lend] = {}
        self._lent: dict[str, list[int]] = {}

    @property
    def lent(self) -> Mapping[str, list[int]]:
        """Slots by the name they are lent under."""
        return self._lent

    def ask(self, event: Lend) -> None:
        assert event.name not in self._lent, event.name
        self._asked[event.name] = event

    def end(self, name: str) -> None:
        """Nobody reads under this name any more, or wants to. Unknown names are fine."""
        self._asked.pop(name, None)
        self._pool.end_lease(self._lent.pop(name, []), name)

    def take_asked(self) -> list[Lend]:
        asked, self._asked = self._asked, {}
        return list(asked.values())

    def grant(self, event: Lend, num_needed: int) -> Grant:
        """Leases what is here, as far as ``num_needed`` slots stay available to sequences.

        Raises PageViolation, and then leases nothing.
        """
        found = self._pool.match(event.prefix_hashes)
        slots = self._spared(found, num_needed)
        self._pool.hold(slots, event.name)
        self._lent[event.name] = slots
        pages = tuple(
            LentPage(slot, event.first_page + index, self._pool.page_size, name)
            for index, (slot, name) in enumerate(zip(slots, event.prefix_hashes, strict=False))
        )
        if len(slots) == len(event.prefix_hashes):
            return Grant(event.name, pages, "")
        return Grant(event.name, pages, "busy" if len(slots) < len(found) else "absent")

    def _spared(self, slots: list[int], num_needed: int) -> list[int]:
        """The first of ``slots`` that can be lent. One that a sequence owns takes no room."""
        room = max(self._pool.num_available - num_needed, 0)
        idle = [slot for slot in slots if self._pool.num_idle_among([slot])]
        return slots if len(idle) <= room else slots[: slots.index(idle[room])]

"""The page index: which workers live, who holds which page, how handovers stand (design, law 6).

It knows pages and never carries them. Everything in it is a hint: the owner of a page decides, so a
stale, empty or wrong answer can make a request slower, never wrong. All of it ends by itself after
a time to live, and all of it can be told again: a heartbeat repeats the full record.

``MemoryPageIndex`` serves one process, ``RedisPageIndex`` many; one behaviour suite runs on both.
This module imports neither redis nor torch. The errors::

    PageIndexError            base; never raised itself
    ├── IndexUnavailable      no usable answer in time; go on with what is known
    ├── IdentityConflict      the boot identity is alive under another endpoint
    └── StaleTransition       the handover is not where this transition starts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvstore.index.records import (
    HandoverRecord,
    HandoverState,
    PageEntry,
    WorkerLoad,
    WorkerRecord,
    WorkerRole,
    WorkerState,
)

__all__ = [
    "HandoverRecord",
    "HandoverState",
    "IdentityConflict",
    "IndexUnavailable",
    "PageEntry",
    "PageIndex",
    "PageIndexError",
    "StaleTransition",
    "WorkerLoad",
    "WorkerRecord",
    "WorkerRole",
    "WorkerState",
]


class PageIndexError(Exception):
    """The page index did not do what was asked."""


class IndexUnavailable(PageIndexError):
    """The index gave no usable answer in time; whether it applied the change is unknown."""


class IdentityConflict(PageIndexError):
    """Another live worker has registered the same boot identity."""

    def __init__(self, record: WorkerRecord) -> None:
        super().__init__(
            f"boot identity {record.boot_id} is alive elsewhere than {record.endpoint}"
        )


class StaleTransition(PageIndexError):
    """The handover has gone, moved elsewhere, or belongs to another attempt; nothing changed."""

    def __init__(self, request_id: str, attempt: int, to_state: HandoverState) -> None:
        super().__init__(f"request {request_id} attempt {attempt} cannot become {to_state}")


class PageIndex(Protocol):
    """All methods may raise IndexUnavailable, and any may be repeated after it without harm.

    Times to live are in seconds from the moment the index hears of them. Boot identities,
    fingerprints and request ids are 16 bytes in 32 hex digits; prefix hashes are 16 raw bytes.
    """

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        """Makes a worker known, or renews it with its present load: this is also the heartbeat.

        A new identity takes the place of the one registered at its endpoint, which must have died.
        Raises IdentityConflict if the same identity is alive under another endpoint.
        """

    async def unregister(self, boot_id: str) -> None:
        """Forgets a worker at once. Its pages stay named until withdrawn or out of time."""

    async def workers(self, role: WorkerRole | None = None) -> list[WorkerRecord]:
        """The live workers, of one role or of all, ordered by boot identity."""

    async def publish(
        self, fingerprint: str, prefix_hashes: Sequence[bytes], boot_id: str, ttl_s: float
    ) -> None:
        """Worker ``boot_id`` holds these pages; told again, it holds them ``ttl_s`` from now."""

    async def lookup(
        self, fingerprint: str, prefix_hashes: Sequence[bytes]
    ) -> list[frozenset[str]]:
        """Who holds each page, in order, ending before the first that nobody holds.

        The holders are boot identities; they may have died since. One round trip.
        """

    async def withdraw(
        self, fingerprint: str, prefix_hashes: Sequence[bytes], boot_id: str
    ) -> None:
        """Worker ``boot_id`` holds these pages no more."""

    async def entries(self) -> list[PageEntry]:
        """All pages somebody is said to hold, in no order: for audits, as it walks through all of
        them, one call each. What changes meanwhile may be missed."""

    async def offer_handover(self, record: HandoverRecord, ttl_s: float) -> None:
        """Opens an attempt, in state OFFERED; it replaces what an older attempt left.

        The same offer told again changes nothing, wherever the handover has got to. Raises
        StaleTransition if a newer attempt, or another offer of this one, came before.
        """

    async def move_handover(self, request_id: str, attempt: int, to_state: HandoverState) -> None:
        """Ends an attempt: OFFERED becomes LANDED, FAILED or CANCELLED, and stays so.

        The same transition told again changes nothing. Raises StaleTransition if the attempt is
        not the present one or ended otherwise.
        """

    async def handover(self, request_id: str) -> HandoverRecord | None:
        """The present attempt of a request, or None if none is remembered."""

    async def close(self) -> None:
        """Ends all connections; every later call raises IndexUnavailable."""

"""The pool as the scheduler sees it: slots, who owns them, and the prefix cache over them.

Pages that only the prefix cache keeps are *idle*: they count as available and the one idle longest
is given up first. A sequence releases its pages last to first, so a prefix outlives its
continuations. Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvstore.ledger import Generations, Ledger, PageState, PageViolation


class PagePool:
    """Allocation, sharing and eviction over one ledger. One thread uses it."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        clock: Callable[[], float],
        generations: Generations | None = None,
    ) -> None:
        self.page_size = page_size
        self.ledger = Ledger(num_pages, clock, generations)
        self._cached: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._published: list[bytes] = []
        self._withdrawn: list[bytes] = []
        self._violations: list[PageViolation] = []

    @property
    def num_pages(self) -> int:
        return len(self.ledger)

    @property
    def num_available(self) -> int:
        """Slots that an allocation can have: free ones and idle ones."""
        return self.ledger.num_free + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int, owner: str) -> list[int] | None:
        """``count`` slots for ``owner``, or None: all or nothing."""
        if count > self.num_available:
            return None
        while self.ledger.num_free < count:
            self._evict()
        slots = [self.ledger.allocate(owner) for _ in range(count)]
        return [slot for slot in slots if slot is not None]

    def match(self, names: Sequence[bytes]) -> list[int]:
        """Slots of the longest cached run of ``names`` from the first one on."""
        slots: list[int] = []
        for name in names:
            slot = self._cached.get(name)
            if slot is None or self.ledger[slot].state is not PageState.SEALED:
                break
            slots.append(slot)
        return slots

    def num_idle_among(self, slots: Iterable[int]) -> int:
        """How many of ``slots`` would stop being available if they were shared."""
        return sum(slot in self._idle for slot in slots)

    def share(self, slots: Sequence[int], owner: str) -> None:
        """One more owner of sealed pages: of all of them, or of none if one is refused."""
        for position, slot in enumerate(slots):
            try:
                self.ledger.share(slot, owner)
            except PageViolation:
                self.release(slots[:position], owner)
                raise
            self._idle.pop(slot, None)

    def seal(self, slot: int, prefix_hash: bytes, num_tokens: int) -> None:
        """Finishes a page; a full one is kept under its name unless another slot has that name."""
        self.ledger.seal(slot, prefix_hash, num_tokens)
        if num_tokens == self.page_size and prefix_hash not in self._cached:
            self.ledger.keep(slot)
            self._cached[prefix_hash] = slot
            self._published.append(prefix_hash)

    def release(self, slots: Sequence[int], owner: str) -> None:
        """``owner`` lets go of its pages, given in order of position."""
        self._let_go(slots, lambda slot: self.ledger.release(slot, owner))

    def lease(self, slots: Sequence[int], holder: str) -> None:
        """Turns ownership into a lease of the same name: the pages outlive their sequence.

        All of them are leased, or none if one is refused.
        """
        self.hold(slots, holder)
        self.release(slots, holder)

    def hold(self, slots: Sequence[int], holder: str) -> None:
        """Leases sealed pages, whoever owns them: of all of them, or of none if one is refused."""
        for position, slot in enumerate(slots):
            try:
                self.ledger.lease(slot, holder)
            except PageViolation:
                self.end_lease(slots[:position], holder)
                raise
            self._idle.pop(slot, None)

    def begin_exports(self, slots: Sequence[int], owner: str) -> None:
        """Reads of pages that ``owner`` fills: of all of them, or of none if one is refused."""
        for position, slot in enumerate(slots):
            try:
                self.ledger.begin_export(slot, owner)
            except PageViolation:
                self.end_reads(slots[:position], owner)
                raise

    def end_lease(self, slots: Sequence[int], holder: str) -> None:
        self._let_go(slots, lambda slot: self.ledger.end_lease(slot, holder))

    def end_reads(self, slots: Sequence[int], reader: str) -> None:
        self._let_go(slots, lambda slot: self.ledger.end_read(slot, reader))

    def end_writes(self, slots: Sequence[int], writer: str) -> None:
        self._let_go(slots, lambda slot: self.ledger.end_write(slot, writer))

    def take_violations(self) -> list[PageViolation]:
        """What went wrong in letting go since the last call."""
        violations, self._violations = self._violations, []
        return violations

    def clear_cache(self) -> None:
        """Gives up every idle page."""
        while self._idle:
            self._evict()

    @property
    def has_news(self) -> bool:
        """Whether ``take_cache_changes`` has something to tell; any thread may ask."""
        return bool(self._published or self._withdrawn)

    def take_cache_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Names (published, withdrawn) since the last call, for the page index."""
        changes = self._published, self._withdrawn
        self._published, self._withdrawn = [], []
        return changes

    def cached_names(self) -> list[bytes]:
        """Names of all pages the prefix cache keeps."""
        return list(self._cached)

    def check(self) -> None:
        """Raises AssertionError unless ledger and cache agree (the conservation law)."""
        self.ledger.check()
        for name, slot in self._cached.items():
            record = self.ledger[slot]
            assert record.cached
            assert record.prefix_hash == name
            healthy = record.state is PageState.SEALED
            assert healthy or record.violation
            assert (slot in self._idle) == (healthy and not record.held)

    def _let_go(self, slots: Sequence[int], end: Callable[[int], None]) -> None:
        """Ends a hold on each page, last page first. One that refuses is quarantined and noted; the
        others are let go of all the same."""
        for slot in reversed(slots):
            try:
                end(slot)
            except PageViolation as violation:
                self._violations.append(violation)
            self._note_idle(slot)

    def _note_idle(self, slot: int) -> None:
        record = self.ledger[slot]
        if record.cached and not record.held and record.state is PageState.SEALED:
            self._idle[slot] = None

    def _evict(self) -> None:
        slot, _ = self._idle.popitem(last=False)
        name = self.ledger[slot].prefix_hash
        assert name is not None
        del self._cached[name]
        self._withdrawn.append(name)
        self.ledger.drop(slot)

"""The ledger: the state and the holders of every slot of a pool (design, law 5).

::

    FREE --allocate--> FILLING --seal--> SEALED --last hold gone--> FREE
                          |                 |
                          +- owner gone while someone still reads or writes -> QUARANTINED -> FREE
    any state -- violation --> QUARANTINED (for good)

A hold is an owner (a sequence), a reader, a writer, a lease or the prefix cache. ``_free`` is the
only way back to FREE and refuses while any hold is left. Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class PageState(StrEnum):
    FREE = "free"
    FILLING = "filling"
    SEALED = "sealed"
    QUARANTINED = "quarantined"


class PageViolation(Exception):
    """Somebody did to a page what its state forbids; the page is quarantined for good."""

    def __init__(self, slot: int, problem: str) -> None:
        super().__init__(f"page {slot}: {problem}")
        self.slot = slot
        self.problem = problem


@dataclass(slots=True)
class PageRecord:
    """One slot. ``owners``, ``readers`` and ``writers`` are names of sequences, the latter two of
    those on whose behalf others read or write; ``since`` is the time of allocation."""

    slot: int
    state: PageState = PageState.FREE
    generation: int = 0
    owners: set[str] = field(default_factory=set)
    leases: set[str] = field(default_factory=set)
    readers: Counter[str] = field(default_factory=Counter)
    writers: set[str] = field(default_factory=set)
    cached: bool = False
    prefix_hash: bytes | None = None
    num_tokens: int = 0
    since: float = 0.0
    violation: str = ""

    @property
    def held(self) -> bool:
        """Whether anyone but the prefix cache needs the page."""
        return bool(self.owners or self.leases or self.num_readers or self.num_writers)

    @property
    def num_readers(self) -> int:
        return self.readers.total()

    @property
    def num_writers(self) -> int:
        return len(self.writers)

    @property
    def reason(self) -> str:
        """Why the slot is not free, in words."""
        if self.violation:
            return f"violation: {self.violation}"
        uses = [f"the write for {name}" for name in sorted(self.writers)]
        uses += [f"the read for {name}" for name in sorted(self.readers)]
        if self.state is PageState.QUARANTINED:
            return f"waits for the end of {' and '.join(uses)}"
        holds = [f"owned by {name}" for name in sorted(self.owners)]
        holds += [f"leased to {name}" for name in sorted(self.leases)]
        holds += [f"in {use}" for use in uses]
        if self.cached:
            holds.append("kept by the prefix cache")
        return ", ".join(holds) or "free"


class Generations(Protocol):
    """A list of one number per slot."""

    def __setitem__(self, slot: int, generation: int, /) -> None: ...


class Ledger:
    """States and holders of ``num_pages`` slots. One thread uses it.

    ``generations``, if given, repeats every slot's generation where other processes can see it.
    """

    def __init__(
        self,
        num_pages: int,
        clock: Callable[[], float],
        generations: Generations | None = None,
    ) -> None:
        assert num_pages > 0
        self._clock = clock
        self._generations: Generations = [0] * num_pages if generations is None else generations
        self._records = [PageRecord(slot) for slot in range(num_pages)]
        self._free_slots = deque(range(num_pages))
        self._counts = Counter({PageState.FREE: num_pages})
        self._num_leased = 0

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, slot: int) -> PageRecord:
        return self._records[slot]

    @property
    def num_free(self) -> int:
        return len(self._free_slots)

    @property
    def num_leased(self) -> int:
        """Pages with a lease, whatever else holds them."""
        return self._num_leased

    def num_leased_to(self, holders: set[str]) -> int:
        """Pages with a lease of one of these; any thread may ask."""
        return sum(not holders.isdisjoint(record.leases) for record in self._records)

    def count(self, state: PageState) -> int:
        return self._counts[state]

    def allocate(self, owner: str) -> int | None:
        """A free slot, now FILLING and owned, under a new generation; None if there is none."""
        if not self._free_slots:
            return None
        record = self._records[self._free_slots.popleft()]
        record.generation += 1
        # Before anybody writes: who copied the old content and then looks here knows that it moved.
        self._generations[record.slot] = record.generation
        record.owners.add(owner)
        record.since = self._clock()
        self._move(record, PageState.FILLING)
        return record.slot

    def seal(self, slot: int, prefix_hash: bytes, num_tokens: int) -> None:
        """The content is final and stands for the prefix named."""
        record = self._expect(slot, PageState.FILLING, "seal")
        if record.num_writers:
            raise self._violated(record, "sealed while someone writes")
        record.prefix_hash = prefix_hash
        record.num_tokens = num_tokens
        self._move(record, PageState.SEALED)

    def share(self, slot: int, owner: str) -> None:
        """One more sequence reads the page as its own prefix."""
        record = self._expect(slot, PageState.SEALED, "share")
        if owner in record.owners:
            raise self._violated(record, f"{owner} owns it twice")
        record.owners.add(owner)

    def release(self, slot: int, owner: str) -> None:
        """The sequence is done with the page; the last hold frees it."""
        record = self._records[slot]
        if owner not in record.owners:
            raise self._violated(record, f"released by {owner}, who does not own it")
        record.owners.remove(owner)
        self._settle(record)

    def lease(self, slot: int, holder: str) -> None:
        record = self._expect(slot, PageState.SEALED, "lease")
        if holder in record.leases:
            raise self._violated(record, f"leased twice to {holder}")
        self._num_leased += not record.leases
        record.leases.add(holder)

    def end_lease(self, slot: int, holder: str) -> None:
        record = self._records[slot]
        if holder not in record.leases:
            raise self._violated(record, f"lease of {holder} ended, who has none")
        record.leases.remove(holder)
        self._num_leased -= not record.leases
        self._settle(record)

    def begin_read(self, slot: int, reader: str) -> None:
        self._expect(slot, PageState.SEALED, "read").readers[reader] += 1

    def begin_export(self, slot: int, owner: str) -> None:
        """A read of a page its owner still fills: what is final of it may leave before the rest."""
        record = self._expect(slot, PageState.FILLING, "export")
        if owner not in record.owners:
            raise self._violated(record, f"exported by {owner}, who does not own it")
        record.readers[owner] += 1

    def end_read(self, slot: int, reader: str) -> None:
        record = self._records[slot]
        if not record.readers[reader]:
            raise self._violated(record, f"a read for {reader} ended that never began")
        record.readers -= Counter((reader,))  # leaves nobody at zero
        self._settle(record)

    def begin_write(self, slot: int, writer: str) -> None:
        """Somebody else than the owner writes, on behalf of the sequence ``writer``."""
        record = self._expect(slot, PageState.FILLING, "write")
        if writer in record.writers:
            raise self._violated(record, f"written twice for {writer}")
        record.writers.add(writer)

    def end_write(self, slot: int, writer: str) -> None:
        record = self._records[slot]
        if writer not in record.writers:
            raise self._violated(record, f"a write for {writer} ended that never began")
        record.writers.remove(writer)
        self._settle(record)

    def keep(self, slot: int) -> None:
        """The prefix cache keeps the page when everyone else has left."""
        self._expect(slot, PageState.SEALED, "cache").cached = True

    def drop(self, slot: int) -> None:
        """The prefix cache gives the page up."""
        record = self._records[slot]
        if not record.cached:
            raise self._violated(record, "dropped from a cache that does not keep it")
        record.cached = False
        self._settle(record)

    def check(self) -> None:
        """Raises AssertionError unless states, counts and holders agree for every slot."""
        counts: Counter[PageState] = Counter(record.state for record in self._records)
        for state in PageState:
            assert counts[state] == self._counts[state], f"{state}: {counts} but {self._counts}"
        assert self._num_leased == sum(bool(record.leases) for record in self._records)
        free = set(self._free_slots)
        assert len(free) == len(self._free_slots) == counts[PageState.FREE]
        for record in self._records:
            assert all(count > 0 for count in record.readers.values())
            assert (record.state is PageState.FREE) == (record.slot in free)
            if record.state is PageState.FREE:
                assert not record.held
                assert not record.cached
            if record.state in (PageState.FILLING, PageState.SEALED):
                assert record.held or record.cached, f"page {record.slot} is lost"
            if record.num_writers:
                assert record.state in (PageState.FILLING, PageState.QUARANTINED)

    def _settle(self, record: PageRecord) -> None:
        """Moves a page on after one of its holds ended."""
        if record.violation:
            return
        abandoned = not (record.owners or record.leases or record.cached)
        if not abandoned:
            return
        if record.held:
            self._move(record, PageState.QUARANTINED)
        else:
            self._free(record)

    def _free(self, record: PageRecord) -> None:
        """The only way back to FREE."""
        if record.held or record.cached:
            raise self._violated(record, f"freed while {record.reason}")
        record.prefix_hash = None
        record.num_tokens = 0
        self._move(record, PageState.FREE)
        self._free_slots.append(record.slot)

    def _expect(self, slot: int, state: PageState, action: str) -> PageRecord:
        record = self._records[slot]
        if record.state is not state:
            raise self._violated(record, f"{action} of a page that is {record.state}")
        return record

    def _violated(self, record: PageRecord, problem: str) -> PageViolation:
        if record.state is PageState.FREE:
            self._free_slots.remove(record.slot)
        record.violation = problem
        self._move(record, PageState.QUARANTINED)
        return PageViolation(record.slot, problem)

    def _move(self, record: PageRecord, state: PageState) -> None:
        self._counts[record.state] -= 1
        self._counts[state] += 1
        record.state = state

"""Pool and prefix cache against a plain model: dictionaries of who holds what."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvstore.ledger import PageState, PageViolation
from kvstore.pool import PagePool

PAGE_SIZE = 16


class PoolMachine(RuleBasedStateMachine):
    """Sequences allocate, seal, share, lease, read and leave in any order."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages, PAGE_SIZE, clock=lambda: 0.0)
        self.num_pages = num_pages
        self.owned: dict[str, list[int]] = {}
        self.leased: dict[str, list[int]] = {}
        self.reading: Counter[int] = Counter()
        self.content: dict[int, bytes | None] = {}
        self.names = 0
        self.owners = 0

    def _new_name(self) -> bytes:
        self.names += 1
        return self.names.to_bytes(16, "little")

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        self.owners += 1
        owner = f"s{self.owners}"
        available = self.pool.num_available
        slots = self.pool.allocate(count, owner)
        if count > available:
            assert slots is None
            assert self.pool.num_available == available
            return
        assert slots is not None
        assert len(slots) == len(set(slots)) == count
        assert not set(slots) & self._held()
        self.owned[owner] = slots
        self.content.update(dict.fromkeys(slots))

    @precondition(lambda self: any(self.owned.values()))
    @rule(data=st.data(), full=st.booleans(), again=st.booleans())
    def seal(self, data: st.DataObject, full: bool, again: bool) -> None:
        slots = [s for pages in self.owned.values() for s in pages if self.content[s] is None]
        if not slots:
            return
        slot = data.draw(st.sampled_from(slots))
        known = [name for name in self.content.values() if name]
        name = data.draw(st.sampled_from(known)) if again and known else self._new_name()
        self.pool.seal(slot, name, PAGE_SIZE if full else PAGE_SIZE - 1)
        self.content[slot] = name

    @rule(data=st.data())
    def share_a_match(self, data: st.DataObject) -> None:
        names = [name for name in self.content.values() if name]
        if not names:
            return
        slots = self.pool.match([data.draw(st.sampled_from(names))])
        for slot in slots:
            assert self.content[slot] in names
        self.owners += 1
        self.pool.share(slots, f"s{self.owners}")
        self.owned[f"s{self.owners}"] = slots

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        self.pool.release(self.owned.pop(owner), owner)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        slots = self.owned[owner]
        if any(self.content[slot] is None for slot in slots):
            return
        self.pool.lease(slots, owner)
        self.leased[owner] = self.owned.pop(owner)

    @rule(data=st.data())
    def hold_a_match(self, data: st.DataObject) -> None:
        """Another worker's lease on cached pages, whoever owns them."""
        names = [name for name in self.content.values() if name]
        if not names:
            return
        slots = self.pool.match([data.draw(st.sampled_from(names))])
        self.owners += 1
        self.pool.hold(slots, f"r{self.owners}")
        self.leased[f"r{self.owners}"] = slots

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.leased)))
        self.pool.end_lease(self.leased.pop(owner), owner)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def begin_read(self, data: st.DataObject) -> None:
        sealed = [s for pages in self.owned.values() for s in pages if self.content[s]]
        if sealed:
            slot = data.draw(st.sampled_from(sealed))
            self.pool.ledger.begin_read(slot, "r")
            self.reading[slot] += 1

    @precondition(lambda self: +self.reading)
    @rule(data=st.data())
    def end_read(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(+self.reading)))
        self.pool.end_reads([slot], "r")
        self.reading[slot] -= 1

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        assert self.pool.num_idle == 0

    def _held(self) -> set[int]:
        holders = [*self.owned.values(), *self.leased.values(), list(+self.reading)]
        return {slot for slots in holders for slot in slots}

    @invariant()
    def ledger_agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        held = self._held()
        assert self.pool.num_available == self.num_pages - len(held)
        for slot in range(self.num_pages):
            record = self.pool.ledger[slot]
            assert record.held == (slot in held)
            if record.state is PageState.SEALED:
                assert record.prefix_hash == self.content[slot]

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for owner, slots in self.owned.items():
            self.pool.release(slots, owner)
        for owner, slots in self.leased.items():
            self.pool.end_lease(slots, owner)
        self.pool.end_reads(list(self.reading.elements()), "r")
        self.pool.check()
        self.pool.clear_cache()
        assert self.pool.ledger.num_free == self.num_pages


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_released_pages_are_evicted_least_recently_used_and_last_page_first() -> None:
    pool = PagePool(4, PAGE_SIZE, clock=lambda: 0.0)
    for owner in ("old", "new"):
        slots = pool.allocate(2, owner)
        assert slots is not None
        for index, slot in enumerate(slots):
            pool.seal(slot, f"{owner}{index}".encode().ljust(16), PAGE_SIZE)
        pool.release(slots, owner)
    assert pool.allocate(1, "next") is not None
    names = [name.ljust(16) for name in (b"old0", b"old1", b"new0", b"new1")]
    assert [bool(pool.match([name])) for name in names] == [True, False, True, True]


def test_match_stops_at_the_first_page_that_is_not_cached() -> None:
    pool = PagePool(3, PAGE_SIZE, clock=lambda: 0.0)
    slots = pool.allocate(3, "a")
    assert slots is not None
    for index in (0, 2):
        pool.seal(slots[index], bytes([index]) * 16, PAGE_SIZE)
    assert pool.match([bytes(16), b"\1" * 16, b"\2" * 16]) == [slots[0]]


def test_changes_of_the_cache_are_told_once() -> None:
    pool = PagePool(1, PAGE_SIZE, clock=lambda: 0.0)
    slots = pool.allocate(1, "a")
    assert slots is not None
    pool.seal(slots[0], b"x" * 16, PAGE_SIZE)
    assert pool.take_cache_changes() == ([b"x" * 16], [])
    pool.release(slots, "a")
    pool.clear_cache()
    assert pool.take_cache_changes() == ([], [b"x" * 16])
    assert pool.take_cache_changes() == ([], [])


def sealed_pool() -> tuple[PagePool, list[int]]:
    pool = PagePool(3, PAGE_SIZE, clock=lambda: 0.0)
    slots = pool.allocate(3, "a")
    assert slots is not None
    for slot in slots:
        pool.seal(slot, bytes([slot]) * 16, PAGE_SIZE)
    return pool, slots


def test_sharing_takes_all_pages_or_none() -> None:
    pool, slots = sealed_pool()
    pool.ledger.share(slots[2], "b")
    with pytest.raises(PageViolation):
        pool.share(slots, "b")
    assert [pool.ledger[slot].owners for slot in slots[:2]] == [{"a"}, {"a"}]
    pool.check()


def test_leasing_takes_all_pages_or_none() -> None:
    pool, slots = sealed_pool()
    pool.ledger.lease(slots[2], "a")
    with pytest.raises(PageViolation):
        pool.lease(slots, "a")
    assert [pool.ledger[slot].leases for slot in slots[:2]] == [set(), set()]
    pool.check()


def test_one_page_that_refuses_does_not_keep_the_others() -> None:
    pool, slots = sealed_pool()
    pool.ledger.release(slots[1], "a")
    pool.release(slots, "a")
    assert [str(violation) for violation in pool.take_violations()] == [
        f"page {slots[1]}: released by a, who does not own it"
    ]
    assert pool.take_violations() == []
    assert pool.num_available == 2
    pool.check()

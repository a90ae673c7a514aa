"""The conservation law of pages (design, law 5), one rule at a time."""

from __future__ import annotations

import pytest

from kvstore.ledger import Ledger, PageState, PageViolation

NAME = b"n" * 16


def ledger_of(num_pages: int) -> Ledger:
    return Ledger(num_pages, clock=lambda: 0.0)


def test_every_allocation_has_a_new_generation() -> None:
    ledger = ledger_of(1)
    for generation in (1, 2, 3):
        slot = ledger.allocate("a")
        assert slot == 0
        assert ledger[0].generation == generation
        ledger.release(0, "a")


def test_a_full_pool_allocates_nothing() -> None:
    ledger = ledger_of(2)
    assert ledger.allocate("a") == 0
    assert ledger.allocate("a") == 1
    assert ledger.allocate("a") is None
    ledger.check()


def test_a_page_is_free_only_when_its_last_owner_left() -> None:
    ledger = ledger_of(1)
    ledger.allocate("a")
    ledger.seal(0, NAME, 32)
    ledger.share(0, "b")
    ledger.release(0, "a")
    assert ledger[0].state is PageState.SEALED
    ledger.release(0, "b")
    assert ledger[0].state is PageState.FREE
    ledger.check()


@pytest.mark.parametrize("hold", ["lease", "reader", "cache"])
def test_a_sealed_page_outlives_its_owner_while_someone_holds_it(hold: str) -> None:
    ledger = ledger_of(1)
    ledger.allocate("a")
    ledger.seal(0, NAME, 32)
    begin, end = {
        "lease": (lambda: ledger.lease(0, "x"), lambda: ledger.end_lease(0, "x")),
        "reader": (lambda: ledger.begin_read(0, "x"), lambda: ledger.end_read(0, "x")),
        "cache": (lambda: ledger.keep(0), lambda: ledger.drop(0)),
    }[hold]
    begin()
    ledger.release(0, "a")
    assert ledger[0].state is not PageState.FREE
    assert ledger.allocate("b") is None
    ledger.check()
    end()
    assert ledger[0].state is PageState.FREE
    ledger.check()


def test_pages_with_leases_are_counted_once_each() -> None:
    ledger = ledger_of(2)
    for slot in range(2):
        ledger.allocate("a")
        ledger.seal(slot, NAME, 32)
    counts = []
    for change, slot, holder in [
        (ledger.lease, 0, "x"),
        (ledger.lease, 0, "y"),
        (ledger.lease, 1, "x"),
        (ledger.end_lease, 0, "x"),
        (ledger.end_lease, 0, "y"),
        (ledger.end_lease, 1, "x"),
    ]:
        change(slot, holder)
        ledger.check()
        counts.append((ledger.num_leased, ledger.num_leased_to({"x", "z"})))
    assert counts == [(1, 1), (1, 1), (2, 2), (2, 1), (1, 1), (0, 0)]


def test_page_not_free_while_writer_alive() -> None:
    ledger = ledger_of(1)
    ledger.allocate("a")
    ledger.begin_write(0, "a")
    ledger.release(0, "a")
    assert ledger[0].state is PageState.QUARANTINED
    assert ledger[0].reason == "waits for the end of the write for a"
    assert ledger.allocate("b") is None
    ledger.end_write(0, "a")
    assert ledger[0].state is PageState.FREE
    ledger.check()


def test_a_page_still_filled_may_be_read_by_its_own_export_only() -> None:
    ledger = ledger_of(2)
    ledger.allocate("a")
    ledger.begin_export(0, "a")
    ledger.seal(0, NAME, 32)
    ledger.release(0, "a")
    assert ledger[0].state is PageState.QUARANTINED
    assert ledger[0].reason == "waits for the end of the read for a"
    ledger.end_read(0, "a")
    assert ledger[0].state is PageState.FREE
    ledger.allocate("a")
    with pytest.raises(PageViolation, match="exported by b"):
        ledger.begin_export(1, "b")
    ledger.check()


def test_generations_are_told_before_a_slot_is_given_away() -> None:
    seen = [0, 0]
    ledger = Ledger(2, lambda: 0.0, seen)
    for expected in ([1, 0], [1, 1], [2, 1]):
        slot = ledger.allocate("a")
        assert slot is not None
        assert seen == expected
        assert ledger[slot].generation == seen[slot]
        ledger.release(slot, "a")


@pytest.mark.parametrize(
    "misuse",
    [
        lambda ledger: ledger.release(0, "nobody"),
        lambda ledger: ledger.end_read(0, "a"),
        lambda ledger: ledger.end_write(0, "a"),
        lambda ledger: ledger.end_lease(0, "nobody"),
        lambda ledger: ledger.drop(0),
        lambda ledger: ledger.share(0, "b"),
        lambda ledger: ledger.lease(0, "b"),
        lambda ledger: ledger.begin_read(0, "a"),
        lambda ledger: ledger.keep(0),
    ],
)
def test_misuse_of_a_filling_page_raises_and_quarantines_it_for_good(misuse) -> None:  # type: ignore[no-untyped-def]
    ledger = ledger_of(1)
    ledger.allocate("a")
    with pytest.raises(PageViolation):
        misuse(ledger)
    assert ledger[0].state is PageState.QUARANTINED
    ledger.release(0, "a")
    assert ledger[0].state is PageState.QUARANTINED
    assert "violation" in ledger[0].reason
    assert ledger.allocate("b") is None
    ledger.check()


def test_a_page_read_by_several_is_free_when_the_last_read_ended() -> None:
    ledger = ledger_of(1)
    ledger.allocate("a")
    ledger.seal(0, NAME, 32)
    for reader in ("b", "c", "c"):
        ledger.begin_read(0, reader)
    ledger.release(0, "a")
    for reader, waits in (("c", "b and the read for c"), ("b", "c")):
        ledger.end_read(0, reader)
        assert ledger[0].reason == f"waits for the end of the read for {waits}"
    with pytest.raises(PageViolation, match="a read for b ended"):
        ledger.end_read(0, "b")


def test_a_write_is_ended_by_whom_it_was_begun_for() -> None:
    ledger = ledger_of(1)
    ledger.allocate("a")
    ledger.begin_write(0, "a")
    with pytest.raises(PageViolation, match="a write for b ended"):
        ledger.end_write(0, "b")


def test_a_page_is_not_sealed_while_someone_writes() -> None:
    ledger = ledger_of(1)
    ledger.allocate("a")
    ledger.begin_write(0, "a")
    with pytest.raises(PageViolation, match="sealed while someone writes"):
        ledger.seal(0, NAME, 32)


def test_a_free_page_that_is_misused_is_withheld() -> None:
    ledger = ledger_of(1)
    with pytest.raises(PageViolation):
        ledger.release(0, "a")
    assert ledger.allocate("b") is None
    ledger.check()


def test_a_lost_page_fails_the_check() -> None:
    ledger = ledger_of(1)
    ledger.allocate("a")
    ledger[0].owners.clear()
    with pytest.raises(AssertionError, match="lost"):
        ledger.check()

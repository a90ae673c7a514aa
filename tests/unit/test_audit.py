"""The books of one worker, and of all together: what does not agree is found and told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.audit import Holders, broken_laws, broken_swap, orphans, snapshot
from engine.cli import page_audit
from engine.plan import Cancel, Landed, Outcome, Submit
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Goal
from engine.swapping import SwapLedger
from kvstore.index import PageEntry
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher

PAGE = 16


def scheduler_of(num_pages: int) -> Scheduler:
    pool = PagePool(num_pages, PAGE, clock=lambda: 0.0)
    limits = SchedulerLimits(min_remote_tokens=16)
    return Scheduler(pool, limits, lambda tenant: PrefixHasher(tenant, bytes(16), PAGE))


def busy() -> Scheduler:
    """One sequence that runs, one that is being filled, and a lease."""
    scheduler = scheduler_of(16)
    plan = scheduler.plan(
        [
            Submit("runs", Goal.GENERATE, tuple(range(20))),
            Submit("filled", Goal.GENERATE, tuple(range(100, 133)), remote=True),
            Submit("leased", Goal.PREFILL, tuple(range(50, 70))),
        ]
    )
    scheduler.complete(plan, {rows.name: Outcome((7,) * rows.wants_logits) for rows in plan.rows})
    return scheduler


def found(scheduler: Scheduler, *callers: str) -> dict[int, str]:
    return orphans(snapshot(scheduler.pool.ledger), scheduler.holders, set(callers))


def test_books_that_agree_have_neither_broken_laws_nor_orphans() -> None:
    scheduler = busy()
    holders = scheduler.holders
    assert {*holders.owned} == {"runs", "filled"}
    assert {*holders.leased} == {"leased"}
    assert {*holders.written} == {"filled"}
    assert broken_laws(scheduler.pool, holders) == []
    assert found(scheduler, "runs", "filled", "leased") == {}


@pytest.mark.parametrize("name", ["runs", "filled", "leased"])
def test_pages_of_somebody_nobody_answers_for_are_orphans(name: str) -> None:
    scheduler = busy()
    callers = {"runs", "filled", "leased"} - {name}
    holders = scheduler.holders
    slots = {*holders.owned.get(name, ()), *holders.leased.get(name, ())}
    strays = found(scheduler, *callers)
    assert strays.keys() == slots
    assert all(f"held for {name}, whom nobody answers for" in why for why in strays.values())


def test_a_quarantined_page_whose_writer_never_tells_its_end_is_an_orphan() -> None:
    scheduler = busy()
    slots = scheduler.holders.written["filled"]
    scheduler.plan([Cancel("filled")])
    assert scheduler.pool.ledger[slots[0]].reason == "waits for the end of the write for filled"
    assert found(scheduler, "runs", "leased").keys() == set(slots)
    assert found(scheduler, "runs", "leased", "filled") == {}
    scheduler.plan([Landed("filled", 0)])
    assert found(scheduler, "runs", "leased") == {}


def test_a_hold_that_the_scheduler_does_not_know_breaks_a_law_and_is_an_orphan() -> None:
    scheduler = busy()
    stray = scheduler.pool.allocate(1, "ghost")
    assert stray is not None
    told = f"page {stray[0]} is owned by ghost, of whom the scheduler knows nothing"
    assert broken_laws(scheduler.pool, scheduler.holders) == [told]
    assert found(scheduler, "runs", "filled", "leased", "ghost") == {stray[0]: told}


def test_a_page_taken_from_a_sequence_breaks_a_law() -> None:
    scheduler = busy()
    slot = scheduler.holders.owned["runs"][0]
    scheduler.pool.ledger[slot].owners.clear()
    problems = broken_laws(scheduler.pool, scheduler.holders)
    assert f"page {slot} should be owned by runs" in problems


def test_a_page_withheld_after_a_violation_breaks_a_law() -> None:
    scheduler = scheduler_of(2)
    scheduler.pool.release([0], "nobody")
    (problem,) = broken_laws(scheduler.pool, Holders({}, {}, {}))
    assert problem == "page 0 is withheld for good: released by nobody, who does not own it"


# Across workers

REQUEST = "ab" * 16
NAME = bytes(16)


def worker(role: str, *pages: dict[str, Any], callers: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"boot_id": role, "role": role, "callers": callers, "pages": list(pages)}


def page(**given: Any) -> dict[str, Any]:
    return {
        "slot": 3,
        "generation": 2,
        "orphan": "",
        "lease_holders": [],
        "cached": False,
        "prefix_hash": NAME.hex(),
    } | given


LEASED = page(lease_holders=[f"{REQUEST}/1"])


def test_what_a_worker_calls_an_orphan_is_one() -> None:
    workers = [worker("decode", page(orphan="why"), page())]
    assert page_audit.orphans(workers) == {("decode", "slot 3 generation 2", "why")}


def test_a_lease_of_a_request_that_no_decode_service_knows_is_an_orphan() -> None:
    knows, idle = worker("decode", callers=(f"{REQUEST}/0",)), worker("decode")
    assert page_audit.orphans([worker("prefill", LEASED), knows]) == set()
    ((_, _, problem),) = page_audit.orphans([worker("prefill", LEASED), idle])
    assert problem == f"leased to {REQUEST}/1, a request no decode service knows"


@pytest.mark.parametrize("others", [[], [{"endpoint": "x", "error": "gone"}, worker("decode")]])
def test_where_a_worker_did_not_answer_no_lease_is_called_lost(others: list[Any]) -> None:
    assert page_audit.orphans([worker("prefill", LEASED), *others]) == set()


def test_an_entry_of_the_index_for_a_page_nobody_keeps_is_stale() -> None:
    entry = PageEntry("f0" * 16, NAME, frozenset({"prefill"}))
    keeps, has_not = worker("prefill", page(cached=True)), worker("prefill", page())
    assert page_audit.stale_entries([entry], [keeps]) == set()
    for workers, problem in (
        ([has_not], "in the index, but its holder does not keep it"),
        ([worker("decode", page(cached=True))], "in the index, but its holder is gone"),
    ):
        assert page_audit.stale_entries([entry], workers) == {
            ("prefill", f"page {NAME.hex()}", problem)
        }
    silent = {"endpoint": "x", "error": "gone"}
    assert page_audit.stale_entries([entry], [silent]) == set()


# -- swap


def swap_of(scheduler: Scheduler) -> SwapLedger:
    """A swap room in which a sequence of the scheduler has two pages."""
    swap = SwapLedger(4)
    swap.hold("runs", 2)
    assert broken_swap(swap, scheduler.holders) == []
    return swap


def test_swap_slots_of_a_sequence_nobody_knows_break_the_law() -> None:
    scheduler = busy()
    swap = swap_of(scheduler)
    swap.hold("gone", 1)
    (problem,) = broken_swap(swap, scheduler.holders)
    assert problem == "swap slots 2 are held for gone, of whom the scheduler knows nothing"


@pytest.mark.parametrize(
    "break_it", [lambda swap: swap._free.pop(), lambda swap: swap._free.append(0)]
)
def test_swap_slots_that_are_lost_or_held_twice_break_the_law(
    break_it: Callable[[SwapLedger], object],
) -> None:
    scheduler = busy()
    swap = swap_of(scheduler)
    break_it(swap)
    assert broken_swap(swap, scheduler.holders) == [
        "the swap room's slots are not each free or held once"
    ]

"""The books of one worker against each other: the ledger, the scheduler, and who is still there.

Every hold in the ledger must be one the scheduler knows, and the other way round; everyone the
scheduler knows must have somebody who will end it: a request in progress or a lease that runs.
What fails the first is a broken law; what fails the second is an orphan, which nobody will free.
Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from engine.swapping import SwapLedger
from kvstore.ledger import Ledger, PageRecord, PageState
from kvstore.pool import PagePool

Slots = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Holders:
    """Slots by the name under which they are held: owned, leased, and written from outside."""

    owned: Slots
    leased: Slots
    written: Slots


def broken_laws(pool: PagePool, holders: Holders) -> list[str]:
    """What contradicts the conservation of pages, in words; empty if nothing does."""
    found = []
    try:
        pool.check()
    except AssertionError as error:
        found.append(f"the ledger contradicts itself: {error}")
    ledger = pool.ledger
    for record in _held(ledger):
        found += _unknown_holds(record, holders)
        if record.violation:
            found.append(f"page {record.slot} is withheld for good: {record.violation}")
    for hold, slots in (("owned by", holders.owned), ("leased to", holders.leased)):
        found += [
            f"page {slot} should be {hold} {name}"
            for name, each in slots.items()
            for slot in each
            if name not in (ledger[slot].owners if hold == "owned by" else ledger[slot].leases)
        ]
    return found


def broken_swap(swap: SwapLedger, holders: Holders) -> list[str]:
    """What contradicts the conservation of swap slots, in words; empty if nothing does."""
    found = []
    try:
        swap.check()
    except AssertionError:
        found.append("the swap room's slots are not each free or held once")
    return found + [
        f"swap slots {', '.join(map(str, slots))} are held for {owner},"
        " of whom the scheduler knows nothing"
        for owner, slots in swap.holders().items()
        if owner not in holders.owned
    ]


def snapshot(ledger: Ledger) -> list[PageRecord]:
    """Every page that is not free, as it is now."""
    return [
        replace(
            record,
            owners=set(record.owners),
            leases=set(record.leases),
            readers=Counter(record.readers),
            writers=set(record.writers),
        )
        for record in _held(ledger)
    ]


def orphans(
    records: Iterable[PageRecord], holders: Holders, callers: Collection[str]
) -> dict[int, str]:
    """Slots that nobody will free, and why; ``callers`` are the names someone still answers for."""
    found: dict[int, str] = {}
    for record in records:
        reasons = [*_unknown_holds(record, holders), *_unanswered_holds(record, callers)]
        if reasons:
            found[record.slot] = reasons[0]
    return found


def _held(ledger: Ledger) -> Iterator[PageRecord]:
    records = (ledger[slot] for slot in range(len(ledger)))
    return (record for record in records if record.state is not PageState.FREE)


def _unknown_holds(record: PageRecord, holders: Holders) -> Iterator[str]:
    """Holds in the ledger that the scheduler knows nothing of."""
    for kind, names, known in (
        ("owned by", record.owners, holders.owned),
        ("leased to", record.leases, holders.leased),
        ("written for", record.writers, holders.written),
    ):
        for name in sorted(names):
            if record.slot not in known.get(name, ()):
                yield f"page {record.slot} is {kind} {name}, of whom the scheduler knows nothing"


def _unanswered_holds(record: PageRecord, callers: Collection[str]) -> Iterator[str]:
    """Holds that no request and no lease answers for any more."""
    for name in sorted({*record.owners, *record.leases, *record.readers, *record.writers}):
        if name not in callers:
            yield f"page {record.slot} is held for {name}, whom nobody answers for"

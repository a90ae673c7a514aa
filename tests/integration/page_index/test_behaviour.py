"""What every page index does, whether in memory or in Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvstore.fingerprint import LayoutFingerprint
from kvstore.index import (
    HandoverRecord,
    HandoverState,
    IdentityConflict,
    IndexUnavailable,
    StaleTransition,
    WorkerLoad,
)

A, B, C = "a1" * 16, "b2" * 16, "c4" * 16
MODEL = "f0" * 16
REQUEST = "c3" * 16
PAGES = [bytes([number]) * 16 for number in range(1, 6)]
LONG_S = 600.0
ENDS = [HandoverState.LANDED, HandoverState.FAILED, HandoverState.CANCELLED]

OFFER = HandoverRecord(
    request_id=REQUEST,
    attempt=1,
    state=HandoverState.OFFERED,
    prefill_boot_id=A,
    decode_boot_id=B,
    num_pages=7,
    remaining_s=30.0,
)


def only(*boot_ids: str) -> frozenset[str]:
    return frozenset(boot_ids)


# Workers


async def test_registered_workers_are_listed_in_full_and_by_role(subject, worker):
    layout = LayoutFingerprint("00" * 16, "int8/bf16/1", 30, 3, 64, 32, "bf16", "k16t_vtd")
    prefill = worker(boot_id=B, fingerprint=layout.digest.hex(), layout=layout)
    decode = worker(boot_id=A, role="decode", endpoint="[::1]:7000", state="draining")
    await subject.index.register(prefill, LONG_S)
    await subject.index.register(decode, LONG_S)
    assert await subject.index.workers() == [decode, prefill]
    assert await subject.index.workers("prefill") == [prefill]
    assert await subject.index.workers("decode") == [decode]


async def test_heartbeat_replaces_load_and_state(subject, worker):
    await subject.index.register(worker(), LONG_S)
    later = worker(load=WorkerLoad(0, 0, 0, 50, 50), state="draining")
    await subject.index.register(later, LONG_S)
    assert await subject.index.workers() == [later]


async def test_worker_without_heartbeat_is_forgotten_and_others_stay(subject, worker):
    silent = worker(boot_id=A)
    beating = worker(boot_id=B)
    await subject.index.register(silent, subject.short_s)
    await subject.index.register(beating, subject.short_s)
    await subject.index.register(beating, LONG_S)
    assert await subject.index.workers() == [silent, beating]

    async def silent_is_gone():
        return await subject.index.workers() == [beating]

    await subject.eventually(silent_is_gone)


async def test_short_heartbeat_does_not_end_a_longer_one(subject, worker):
    lasting = worker(boot_id=B)
    await subject.index.register(lasting, LONG_S)
    await subject.index.register(worker(boot_id=A), subject.short_s)

    async def only_the_lasting_is_left():
        return await subject.index.workers() == [lasting]

    await subject.eventually(only_the_lasting_is_left)


async def test_unregistered_worker_is_gone_at_once_and_twice_is_once(subject, worker):
    await subject.index.register(worker(boot_id=A), LONG_S)
    await subject.index.register(worker(boot_id=B), LONG_S)
    for _ in range(2):
        await subject.index.unregister(A)
        assert await subject.index.workers() == [worker(boot_id=B)]


async def test_second_worker_of_one_identity_is_refused_and_changes_nothing(subject, worker):
    first = worker(endpoint="host-1:1")
    await subject.index.register(first, LONG_S)
    with pytest.raises(IdentityConflict, match=A):
        await subject.index.register(worker(endpoint="host-2:1"), LONG_S)
    assert await subject.index.workers() == [first]
    await subject.index.register(first, LONG_S)


async def test_of_two_workers_claiming_one_identity_at_once_one_wins(subject, worker):
    claims = [worker(endpoint=f"host-{number}:1") for number in range(8)]
    results = await asyncio.gather(
        *(subject.index.register(claim, LONG_S) for claim in claims), return_exceptions=True
    )
    winners = [claim for claim, result in zip(claims, results, strict=True) if result is None]
    assert len(winners) == 1
    assert await subject.index.workers() == winners
    assert sum(isinstance(result, IdentityConflict) for result in results) == 7


async def test_a_restarted_worker_takes_the_place_of_the_one_that_died_at_its_endpoint(
    subject, worker
):
    dead, bystander = worker(boot_id=A), worker(boot_id=C)
    heir = worker(boot_id=B, endpoint=dead.endpoint)
    for record in (dead, bystander, heir, heir):
        await subject.index.register(record, LONG_S)
    assert await subject.index.workers() == [heir, bystander]


async def test_identity_is_free_again_when_its_worker_is_forgotten(subject, worker):
    bystander = worker(boot_id=B)
    await subject.index.register(bystander, LONG_S)
    await subject.index.register(worker(endpoint="host-1:1"), subject.short_s)
    heir = worker(endpoint="host-2:1")

    async def heir_is_accepted():
        try:
            await subject.index.register(heir, LONG_S)
        except IdentityConflict:
            return False
        return True

    await subject.eventually(heir_is_accepted)
    assert await subject.index.workers() == [heir, bystander]


# Pages


async def test_lookup_names_all_holders_of_each_page(subject):
    await subject.index.publish(MODEL, PAGES[:3], A, LONG_S)
    await subject.index.publish(MODEL, PAGES[:2], B, LONG_S)
    found = await subject.index.lookup(MODEL, PAGES[:3])
    assert found == [only(A, B), only(A, B), only(A)]


async def test_lookup_stops_at_the_first_page_nobody_holds(subject):
    await subject.index.publish(MODEL, [PAGES[0], PAGES[1], PAGES[3]], A, LONG_S)
    assert await subject.index.lookup(MODEL, PAGES) == [only(A), only(A)]
    assert await subject.index.lookup(MODEL, PAGES[2:]) == []
    assert await subject.index.lookup(MODEL, []) == []


async def test_pages_of_another_fingerprint_are_other_pages(subject):
    await subject.index.publish(MODEL, PAGES, A, LONG_S)
    assert await subject.index.lookup("0e" * 16, PAGES) == []


async def test_publishing_and_withdrawing_twice_is_once(subject):
    for _ in range(2):
        await subject.index.publish(MODEL, PAGES, A, LONG_S)
        assert await subject.index.lookup(MODEL, PAGES) == [only(A)] * 5
    await subject.index.publish(MODEL, PAGES, B, LONG_S)
    for _ in range(2):
        await subject.index.withdraw(MODEL, PAGES[1:], A)
        assert await subject.index.lookup(MODEL, PAGES) == [only(A, B)] + [only(B)] * 4


async def test_withdrawn_page_is_a_miss(subject):
    await subject.index.publish(MODEL, PAGES, A, LONG_S)
    await subject.index.withdraw(MODEL, [PAGES[2]], A)
    assert await subject.index.lookup(MODEL, PAGES) == [only(A)] * 2
    await subject.index.withdraw(MODEL, [PAGES[2]], B)


async def test_holder_is_forgotten_in_time_and_a_longer_one_stays(subject):
    await subject.index.publish(MODEL, PAGES[:2], B, LONG_S)
    await subject.index.publish(MODEL, PAGES[:3], A, subject.short_s)
    assert await subject.index.lookup(MODEL, PAGES) == [only(A, B)] * 2 + [only(A)]

    async def only_the_longer_is_left():
        return await subject.index.lookup(MODEL, PAGES) == [only(B)] * 2

    await subject.eventually(only_the_longer_is_left)


async def test_long_prompts_are_published_looked_up_and_withdrawn_whole(subject):
    pages = [number.to_bytes(16, "little") for number in range(1300)]
    await subject.index.publish(MODEL, pages, A, LONG_S)
    assert await subject.index.lookup(MODEL, pages) == [only(A)] * 1300
    await subject.index.withdraw(MODEL, pages[600:], A)
    assert len(await subject.index.lookup(MODEL, pages)) == 600
    assert await subject.index.lookup(MODEL, pages[-1:]) == []


async def test_every_page_that_somebody_holds_is_an_entry(subject):
    other = "0f" * 16
    assert await subject.index.entries() == []
    await subject.index.publish(MODEL, PAGES[:3], A, LONG_S)
    await subject.index.publish(MODEL, PAGES[1:2], B, LONG_S)
    await subject.index.publish(other, PAGES[:1], B, LONG_S)
    await subject.index.withdraw(MODEL, PAGES[2:3], A)
    await subject.index.offer_handover(OFFER, LONG_S)
    assert {
        (entry.fingerprint, entry.prefix_hash): entry.holders
        for entry in await subject.index.entries()
    } == {
        (MODEL, PAGES[0]): only(A),
        (MODEL, PAGES[1]): only(A, B),
        (other, PAGES[0]): only(B),
    }


# Handovers


async def remembered(subject) -> HandoverRecord | None:
    """The handover with its remaining time checked and set back to what was offered."""
    record = await subject.index.handover(REQUEST)
    if record is None:
        return None
    assert OFFER.remaining_s - 20 < record.remaining_s <= OFFER.remaining_s
    return replace(record, remaining_s=OFFER.remaining_s)


async def test_offered_handover_is_remembered_in_full(subject):
    assert await subject.index.handover(REQUEST) is None
    await subject.index.offer_handover(OFFER, LONG_S)
    assert await remembered(subject) == OFFER


@pytest.mark.parametrize("end", ENDS)
async def test_handover_ends_once_and_the_same_end_told_again_is_fine(subject, end):
    await subject.index.offer_handover(OFFER, LONG_S)
    for _ in range(2):
        await subject.index.move_handover(REQUEST, 1, end)
        assert await remembered(subject) == replace(OFFER, state=end)
    for other in (each for each in ENDS if each is not end):
        with pytest.raises(StaleTransition):
            await subject.index.move_handover(REQUEST, 1, other)
    assert await remembered(subject) == replace(OFFER, state=end)


async def test_of_two_different_ends_at_once_one_counts(subject):
    await subject.index.offer_handover(OFFER, LONG_S)
    results = await asyncio.gather(
        *(subject.index.move_handover(REQUEST, 1, end) for end in ENDS), return_exceptions=True
    )
    winners = [end for end, result in zip(ENDS, results, strict=True) if result is None]
    assert len(winners) == 1
    assert sum(isinstance(result, StaleTransition) for result in results) == 2
    assert await remembered(subject) == replace(OFFER, state=winners[0])


async def test_offer_told_again_does_not_reopen_what_has_landed(subject):
    await subject.index.offer_handover(OFFER, LONG_S)
    await subject.index.offer_handover(OFFER, LONG_S)
    await subject.index.move_handover(REQUEST, 1, HandoverState.LANDED)
    await subject.index.offer_handover(replace(OFFER, remaining_s=29.0), LONG_S)
    assert await remembered(subject) == replace(OFFER, state=HandoverState.LANDED)


@pytest.mark.parametrize(
    "change", [{"prefill_boot_id": B}, {"decode_boot_id": A}, {"num_pages": 8}]
)
async def test_another_offer_of_one_attempt_is_refused(subject, change):
    await subject.index.offer_handover(OFFER, LONG_S)
    with pytest.raises(StaleTransition):
        await subject.index.offer_handover(replace(OFFER, **change), LONG_S)
    assert await remembered(subject) == OFFER


async def test_newer_attempt_replaces_and_the_older_has_no_more_effect(subject):
    newer = replace(OFFER, attempt=10, prefill_boot_id="d4" * 16, num_pages=9)
    await subject.index.offer_handover(replace(OFFER, attempt=9), LONG_S)
    await subject.index.move_handover(REQUEST, 9, HandoverState.FAILED)
    await subject.index.offer_handover(newer, LONG_S)
    for stale in (
        subject.index.offer_handover(replace(OFFER, attempt=9), LONG_S),
        subject.index.move_handover(REQUEST, 9, HandoverState.FAILED),
        subject.index.move_handover(REQUEST, 9, HandoverState.LANDED),
        subject.index.move_handover(REQUEST, 11, HandoverState.LANDED),
    ):
        with pytest.raises(StaleTransition, match=REQUEST):
            await stale
    assert await remembered(subject) == newer


async def test_move_of_an_unknown_handover_is_refused_and_creates_nothing(subject):
    with pytest.raises(StaleTransition):
        await subject.index.move_handover(REQUEST, 1, HandoverState.LANDED)
    assert await subject.index.handover(REQUEST) is None


async def test_handover_is_forgotten_in_time_even_if_it_moved(subject):
    await subject.index.offer_handover(OFFER, subject.short_s)
    await subject.index.move_handover(REQUEST, 1, HandoverState.LANDED)
    assert await subject.index.handover(REQUEST) is not None

    async def is_forgotten():
        return await subject.index.handover(REQUEST) is None

    await subject.eventually(is_forgotten)


async def test_deadline_of_a_handover_runs_down_to_nothing(subject):
    await subject.index.offer_handover(replace(OFFER, remaining_s=subject.short_s), LONG_S)

    async def nothing_remains():
        return (await subject.index.handover(REQUEST)).remaining_s == 0

    assert not await nothing_remains()
    await subject.eventually(nothing_remains)


# Arguments and the end


async def test_arguments_of_the_wrong_form_are_refused_by_name(subject, worker):
    index = subject.index
    for call, problem in (
        (index.register(worker(), 0), "ttl_s"),
        (index.register(worker(), float("nan")), "ttl_s"),
        (index.publish(MODEL, PAGES, A, -1), "ttl_s"),
        (index.publish(MODEL, PAGES, "me", 1), "boot_id"),
        (index.publish("small", PAGES, A, 1), "fingerprint"),
        (index.publish(MODEL, [b"short"], A, 1), "prefix_hashes"),
        (index.lookup("F0" * 16, PAGES), "fingerprint"),
        (index.lookup(MODEL, [b"short"]), "prefix_hashes"),
        (index.withdraw(MODEL, [b"short"], A), "prefix_hashes"),
        (index.offer_handover(replace(OFFER, state=HandoverState.LANDED), 1), "state"),
        (index.offer_handover(OFFER, float("inf")), "ttl_s"),
        (index.move_handover(REQUEST, 1, HandoverState.OFFERED), "to_state"),
    ):
        with pytest.raises(ValueError, match=problem):
            await call
    assert await index.workers() == []


async def test_closed_index_answers_nothing_more(subject, worker):
    await subject.index.register(worker(), LONG_S)
    for _ in range(2):
        await subject.index.close()
    for call in (
        subject.index.workers(),
        subject.index.register(worker(), LONG_S),
        subject.index.lookup(MODEL, PAGES),
        subject.index.entries(),
        subject.index.handover(REQUEST),
    ):
        with pytest.raises(IndexUnavailable, match="closed"):
            await call

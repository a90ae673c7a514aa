"""Attempts and leases of the prefill service."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import StaleAttempt
from prefill_svc.handovers import Handovers

REQUEST = bytes(16)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def freed() -> list[int]:
    return []


@pytest.fixture
def handovers(clock: Clock) -> Handovers:
    return Handovers(lease_s=10.0, clock=clock)


def begin(handovers: Handovers, freed: list[int], attempt: int) -> None:
    handovers.begin(REQUEST, attempt, lambda: freed.append(attempt))


def test_a_newer_attempt_frees_the_older_one(handovers: Handovers, freed: list[int]) -> None:
    begin(handovers, freed, 1)
    begin(handovers, freed, 2)
    assert freed == [1]


@pytest.mark.parametrize("attempt", [1, 2])
def test_an_attempt_that_is_not_newer_has_no_effect(
    handovers: Handovers, freed: list[int], attempt: int
) -> None:
    begin(handovers, freed, 2)
    with pytest.raises(StaleAttempt):
        begin(handovers, freed, attempt)
    assert freed == []


def test_a_late_release_of_an_old_attempt_frees_nothing(
    handovers: Handovers, freed: list[int]
) -> None:
    begin(handovers, freed, 1)
    begin(handovers, freed, 2)
    with pytest.raises(StaleAttempt):
        handovers.release(REQUEST, 1)
    assert freed == [1]
    assert handovers.release(REQUEST, 2)
    assert not handovers.release(REQUEST, 2)
    assert freed == [1, 2]


def test_a_lease_runs_from_the_commit(handovers: Handovers, freed: list[int], clock: Clock) -> None:
    begin(handovers, freed, 1)
    clock.now = 1000.0
    assert handovers.expire() == 0
    handovers.committed(REQUEST, 1)
    clock.now = 1009.9
    assert handovers.expire() == 0
    clock.now = 1010.0
    assert handovers.expire() == 1
    assert freed == [1]
    assert len(handovers) == 0


def test_an_abandoned_attempt_is_forgotten_and_a_committed_one_is_not(
    handovers: Handovers, freed: list[int]
) -> None:
    begin(handovers, freed, 1)
    handovers.abandon(REQUEST, 1)
    assert len(handovers) == 0
    begin(handovers, freed, 1)
    handovers.committed(REQUEST, 1)
    handovers.abandon(REQUEST, 1)
    assert len(handovers) == 1
    assert freed == []


async def test_a_drain_waits_for_the_last_lease_however_it_ends(
    handovers: Handovers, freed: list[int], clock: Clock
) -> None:
    await handovers.wait_ended()
    begin(handovers, freed, 1)
    waiting = asyncio.create_task(handovers.wait_ended())
    begin(handovers, freed, 2)
    handovers.committed(REQUEST, 2)
    handovers.abandon(REQUEST, 2)
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.now = 10.0
    handovers.expire()
    await waiting
    begin(handovers, freed, 3)
    handovers.abandon(REQUEST, 3)
    await handovers.wait_ended()

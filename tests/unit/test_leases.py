"""Attempts and leases of one worker."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import StaleAttempt
from engine.serving.leases import Leases

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
def leases(clock: Clock) -> Leases:
    return Leases(lease_s=10.0, clock=clock)


def begin(leases: Leases, freed: list[int], attempt: int) -> None:
    leases.begin(REQUEST, attempt, lambda: freed.append(attempt))


def test_a_newer_attempt_frees_the_older_one(leases: Leases, freed: list[int]) -> None:
    begin(leases, freed, 1)
    begin(leases, freed, 2)
    assert freed == [1]


@pytest.mark.parametrize("attempt", [1, 2])
def test_an_attempt_that_is_not_newer_has_no_effect(
    leases: Leases, freed: list[int], attempt: int
) -> None:
    begin(leases, freed, 2)
    with pytest.raises(StaleAttempt):
        begin(leases, freed, attempt)
    assert freed == []


def test_a_late_release_of_an_old_attempt_frees_nothing(leases: Leases, freed: list[int]) -> None:
    begin(leases, freed, 1)
    begin(leases, freed, 2)
    with pytest.raises(StaleAttempt):
        leases.release(REQUEST, 1)
    assert freed == [1]
    assert leases.release(REQUEST, 2)
    assert not leases.release(REQUEST, 2)
    assert freed == [1, 2]


def test_a_lease_runs_from_its_grant(leases: Leases, freed: list[int], clock: Clock) -> None:
    begin(leases, freed, 1)
    clock.now = 1000.0
    assert leases.expire() == 0
    leases.granted(REQUEST, 1)
    clock.now = 1009.9
    assert leases.expire() == 0
    clock.now = 1010.0
    assert leases.expire() == 1
    assert freed == [1]
    assert len(leases) == 0


def test_a_lease_is_held_from_its_grant_until_its_time_is_over(
    leases: Leases, freed: list[int], clock: Clock
) -> None:
    begin(leases, freed, 1)
    assert not leases.holds(REQUEST, 1)
    leases.granted(REQUEST, 1)
    assert leases.holds(REQUEST, 1)
    clock.now = 10.0
    assert not leases.holds(REQUEST, 1)
    begin(leases, freed, 2)
    leases.granted(REQUEST, 2)
    with pytest.raises(StaleAttempt):
        leases.holds(REQUEST, 1)
    assert not leases.holds(REQUEST, 3)


def test_an_abandoned_attempt_is_forgotten_and_a_granted_one_is_not(
    leases: Leases, freed: list[int]
) -> None:
    begin(leases, freed, 1)
    leases.abandon(REQUEST, 1)
    assert len(leases) == 0
    begin(leases, freed, 1)
    leases.granted(REQUEST, 1)
    leases.abandon(REQUEST, 1)
    assert len(leases) == 1
    assert freed == []


async def test_a_drain_waits_for_the_last_lease_however_it_ends(
    leases: Leases, freed: list[int], clock: Clock
) -> None:
    await leases.wait_ended()
    begin(leases, freed, 1)
    waiting = asyncio.create_task(leases.wait_ended())
    begin(leases, freed, 2)
    leases.granted(REQUEST, 2)
    leases.abandon(REQUEST, 2)
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.now = 10.0
    leases.expire()
    await waiting
    begin(leases, freed, 3)
    leases.abandon(REQUEST, 3)
    await leases.wait_ended()

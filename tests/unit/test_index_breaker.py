from __future__ import annotations

import pytest

from kvstore.index.breaker import Breaker


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_calls_are_admitted_until_one_fails(clock):
    breaker = Breaker(1.0, clock)
    assert [breaker.admits() for _ in range(3)] == [True] * 3
    breaker.failed()
    assert not breaker.admits()


def test_after_the_cooldown_one_call_may_try_and_the_rest_wait_for_it(clock):
    breaker = Breaker(1.0, clock)
    breaker.failed()
    clock.now += 0.999
    assert not breaker.admits()
    clock.now += 0.001
    assert breaker.admits()
    assert not breaker.admits()


def test_success_of_the_one_admits_everyone(clock):
    breaker = Breaker(1.0, clock)
    breaker.failed()
    clock.now += 1.0
    assert breaker.admits()
    breaker.succeeded()
    assert [breaker.admits() for _ in range(3)] == [True] * 3


def test_a_try_that_never_reports_does_not_keep_others_out_for_good(clock):
    breaker = Breaker(1.0, clock)
    breaker.failed()
    clock.now += 1.0
    assert breaker.admits()
    clock.now += 1.0
    assert breaker.admits()

"""Which way a prompt's pages come: predictions, habit, tries, and what is learnt."""

from __future__ import annotations

import pytest

from decode_svc import decider as policy
from decode_svc.decider import Decider, Decision, Situation, Way
from decode_svc.estimates import DECAY, MAX_PEERS, Delay, PeerCosts, Rate

TOKEN_BYTES = 1_000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def decider(clock: Clock) -> Decider:
    return Decider("auto", 64, TOKEN_BYTES, clock)


def forced(preference: str, situation: Situation) -> Way:
    return Decider(preference, 64, TOKEN_BYTES, Clock()).decide(situation).way


def learn(decider: Decider, local: float, remote: float, moving: float = 1e9) -> None:
    """Rates in tokens and bytes per second, with no delays, of a worker without a name."""
    decider.saw_chunk(1_000, 1_000 / local)
    decider.saw_handover("", 0, 0.0, 1_000 / remote, 1_000, 0)
    decider.saw_handover("", 0, 0.0, 1.0, 0, int(moving))
    decider.saw_pull("", 0.0, 1.0, int(moving))


NEAR = Situation(missing=1_000, queued=0)
HELD = Situation(missing=1_000, held=960, queued=0)


def test_before_anything_was_measured_the_prefill_service_is_used(decider: Decider) -> None:
    assert decider.decide(NEAR).way is Way.REMOTE


def test_without_another_worker_there_is_only_one_way(decider: Decider) -> None:
    found = decider.decide(Situation(missing=100))
    assert (found.way, found.why) == (Way.LOCAL, "only")
    assert found.predicted_s.keys() == {Way.LOCAL}


def test_the_way_predicted_to_be_fastest_is_taken(decider: Decider) -> None:
    learn(decider, local=100_000, remote=1_000)
    assert decider.decide(NEAR).way is Way.LOCAL
    learn(decider, local=10, remote=100_000)
    learn(decider, local=10, remote=100_000)
    assert decider.decide(NEAR).way is Way.REMOTE


def test_a_prediction_is_what_the_estimates_add_up_to(decider: Decider) -> None:
    learn(decider, local=1_000, remote=2_000, moving=1e6)
    found = decider.predict(Situation(missing=1_000, held=600, hit=200, queued=500))
    assert found == {
        Way.LOCAL: pytest.approx(1.0),
        Way.REMOTE: pytest.approx(1.0),  # moving a megabyte takes longer than 1,300 tokens
        Way.PULL: pytest.approx(0.6 + 0.4),
        Way.PULL_REMOTE: pytest.approx(0.6 + (500 + 800) / 2_000),
    }


def test_computing_here_costs_the_time_of_everyone_who_is_decoded_here(decider: Decider) -> None:
    learn(decider, local=4_000, remote=1_000)
    assert decider.decide(NEAR).way is Way.LOCAL
    busy = Situation(missing=1_000, queued=0, num_running=9)
    assert decider.decide(busy).way is Way.REMOTE


@pytest.mark.parametrize(("moving", "way"), [(1e9, Way.PULL), (5e5, Way.LOCAL)])
def test_a_cached_prefix_is_pulled_where_moving_beats_computing(
    decider: Decider, moving: float, way: Way
) -> None:
    learn(decider, local=1_000, remote=100, moving=moving)
    assert decider.decide(HELD).way is way


def test_after_a_pull_the_rest_is_handed_over_if_it_is_long_enough(decider: Decider) -> None:
    short = decider.predict(Situation(missing=1_000, held=960, queued=0))
    long = decider.predict(Situation(missing=1_000, held=900, queued=0))
    assert Way.PULL_REMOTE not in short
    assert Way.PULL_REMOTE in long


def test_a_pull_that_would_outlast_leases_is_no_way(decider: Decider) -> None:
    decider.saw_pull("", 0.0, 1.0, int(960 * TOKEN_BYTES / policy.MAX_PULL_S) - 1)
    assert Way.PULL not in decider.predict(HELD)


def test_a_way_stays_until_another_one_is_clearly_better(decider: Decider) -> None:
    learn(decider, local=1_100, remote=1_000)
    found = decider.decide(NEAR)
    assert (found.way, found.why) == (Way.REMOTE, "kept")
    assert found.predicted_s[Way.LOCAL] < found.predicted_s[Way.REMOTE]
    for _ in range(10):
        learn(decider, local=1_300, remote=1_000)
    assert decider.decide(NEAR) == Decision(Way.LOCAL, "least", decider.predict(NEAR))
    for _ in range(10):
        learn(decider, local=1_000, remote=1_100)
    assert decider.decide(NEAR).why == "kept"


def test_a_way_not_measured_for_long_is_tried_now_and_then(decider: Decider, clock: Clock) -> None:
    learn(decider, local=1_000, remote=2_000)
    clock.now = policy.PROBE_AGE_S
    decider.saw_handover("", 0, 0.0, 0.5, 1_000, 0)
    found = [decider.decide(NEAR) for _ in range(2 * policy.PROBE_EVERY)]
    tried = [position for position, each in enumerate(found) if each.why == "probe"]
    assert tried == [policy.PROBE_EVERY - 1, 2 * policy.PROBE_EVERY - 1]
    assert {each.way for each in found if each.why == "probe"} == {Way.LOCAL}
    decider.saw_chunk(1_000, 1.0)
    assert decider.decide(NEAR).why == "least"


def test_a_way_that_would_cost_too_much_is_not_tried(decider: Decider, clock: Clock) -> None:
    learn(decider, local=1_000, remote=1_000 * 2 * policy.PROBE_MARGIN)
    clock.now = policy.PROBE_AGE_S
    decider.saw_handover("", 0, 0.0, 0.1, 1_000, 0)
    assert all(decider.decide(NEAR).way is Way.REMOTE for _ in range(2 * policy.PROBE_EVERY))


def test_a_way_measured_lately_is_not_tried(decider: Decider) -> None:
    learn(decider, local=1_000, remote=2_000)
    assert all(decider.decide(NEAR).why == "least" for _ in range(2 * policy.PROBE_EVERY))


@pytest.mark.parametrize(
    ("preference", "situation", "way"),
    [
        ("remote", HELD, Way.REMOTE),
        ("remote", Situation(missing=1_000, held=960), Way.LOCAL),
        ("pull", HELD, Way.PULL),
        ("pull", Situation(missing=1_000, held=500, queued=0), Way.PULL_REMOTE),
        ("pull", Situation(missing=1_000, held=500), Way.PULL),
        ("pull", NEAR, Way.REMOTE),
        ("pull", Situation(missing=1_000), Way.LOCAL),
    ],
)
def test_a_preference_forces_a_way_where_it_is_possible(
    preference: str, situation: Situation, way: Way
) -> None:
    assert forced(preference, situation) is way


def test_chunks_of_few_rows_tell_nothing_about_prompts(decider: Decider) -> None:
    before = decider.predict(NEAR)
    decider.saw_chunk(policy.MIN_CHUNK_TOKENS - 1, 10.0)
    assert decider.predict(NEAR) == before


def test_the_queue_a_prompt_stood_in_is_not_counted_twice(decider: Decider) -> None:
    learn(decider, local=1_000, remote=1_000)
    decider.saw_handover("", 500, 0.5, 1.0, 1_000, 0)
    found = decider.predict(Situation(missing=1_000, queued=500))
    assert found[Way.REMOTE] == pytest.approx(1.5)


# -- of each worker apart

SLOW, FAST = (Situation(missing=1_000, queued=0, worker=name) for name in ("slow", "fast"))


def test_a_slow_worker_does_not_spoil_what_is_expected_of_a_fast_one(decider: Decider) -> None:
    decider.saw_chunk(1_000, 1.0)
    decider.saw_handover("fast", 0, 0.0, 0.1, 1_000, 0)
    before = decider.predict(FAST)
    for _ in range(20):
        decider.saw_handover("slow", 0, 1.0, 20.0, 1_000, 0)
    assert decider.predict(FAST) == before
    assert decider.decide(FAST).way is Way.REMOTE
    assert decider.decide(SLOW).way is Way.LOCAL


def test_a_slow_holder_does_not_spoil_pulls_from_a_fast_one(decider: Decider) -> None:
    fast, slow = (Situation(missing=1_000, held=960, holder=name) for name in ("fast", "slow"))
    decider.saw_chunk(1_000, 1.0)
    decider.saw_pull("fast", 0.0, 0.1, 960 * TOKEN_BYTES)
    before = decider.predict(fast)
    for _ in range(20):
        decider.saw_pull("slow", 0.5, 3.0, 960 * TOKEN_BYTES)
    assert decider.predict(fast) == before
    assert decider.decide(fast).way is Way.PULL
    assert decider.decide(slow).way is Way.LOCAL


def test_a_new_worker_is_taken_for_what_all_are_like(decider: Decider) -> None:
    for name in ("one", "two"):
        decider.saw_handover(name, 0, 0.25, 1.0, 500, 0)
    found = decider.predict(Situation(missing=1_000, queued=0, worker="new"))
    assert found[Way.REMOTE] == pytest.approx(0.25 + 1_000 / 500)


def test_of_a_worker_measured_in_part_the_rest_is_what_all_are_like() -> None:
    peers = PeerCosts()
    for costs in peers.to_learn("one"):
        costs.pulling.observe(1e6, 1.0, now=0.0)
    for costs in peers.to_learn("two"):
        costs.computing.observe(700, 1.0, now=0.0)
    assert peers.of("two").pulling.value == 1e6
    assert peers.of("two").computing.value == 700
    assert peers.of("two").pulling.measured_at is None


def test_a_worker_that_is_gone_is_forgotten_and_what_it_taught_about_all_is_not() -> None:
    peers = PeerCosts()
    for costs in peers.to_learn("one"):
        costs.computing.observe(700, 1.0, now=0.0)
    peers.forget("one")
    peers.forget("one")
    assert peers.of("one") is peers.of("another")
    assert peers.of("one").computing.value == 700


def test_no_more_workers_are_remembered_than_the_limit() -> None:
    peers = PeerCosts()
    for number in range(MAX_PEERS + 10):
        peers.to_learn(str(number))
        peers.to_learn("met again and again")
    assert len(peers._each) == MAX_PEERS
    assert peers.of("0") is peers.of("unknown")
    assert peers.of("met again and again") is not peers.of("unknown")


def test_a_rate_follows_what_it_sees_and_large_amounts_count_more() -> None:
    rate = Rate(5.0)
    assert rate.measured_at is None
    rate.observe(100, 10.0, now=1.0)
    assert (rate.value, rate.measured_at) == (10.0, 1.0)
    rate.observe(100, 1.0, now=2.0)
    assert rate.value == pytest.approx((100 * DECAY + 100) / (10 * DECAY + 1))
    for _ in range(50):
        rate.observe(100, 1.0, now=3.0)
    assert rate.value == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(("amount", "seconds"), [(0, 1.0), (-5, 1.0), (5, 0.0), (5, -1.0)])
def test_nothing_in_no_time_teaches_a_rate_nothing(amount: float, seconds: float) -> None:
    rate = Rate(5.0)
    rate.observe(amount, seconds, now=1.0)
    assert (rate.value, rate.measured_at) == (5.0, None)


def test_a_delay_forgets_its_prior_and_is_never_negative() -> None:
    delay = Delay(5.0)
    delay.observe(-1.0)
    assert delay.value == 0.0
    delay.observe(1.0)
    assert delay.value == pytest.approx(1 - DECAY)

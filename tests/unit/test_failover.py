"""Where a stream goes on, what its caller gets, and when it is given up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.completion import Delta, Started
from engine.errors import (
    CannotResume,
    DeadlineExceeded,
    EngineFault,
    EngineStopped,
    HandoverRejected,
    InvalidRequest,
    ModelError,
    PeerUnavailable,
    QuireError,
    RequestCancelled,
    ResourceExhausted,
    ShuttingDown,
    StaleAttempt,
)
from engine.failover import AVOID_S, Course, Endpoints
from engine.finish import FinishReason
from engine.resume import ChoiceSoFar
from engine.stream_so_far import CannotContinue, StreamSoFar

STARTED = Started(b"r" * 16, 7, (1, 2, 3), b"b" * 16, 40, b"n" * 16)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Trial:
    """One stream over workers named by letters; tokens come when the test says."""

    def __init__(self, *endpoints: str) -> None:
        self.clock = Clock()
        self.endpoints = Endpoints(endpoints, self.clock)
        self.so_far = StreamSoFar(())
        self.course = Course(self.endpoints, self.so_far, 10.0, self.clock)
        self.at = ""

    def go(self) -> str:
        """To the next worker, waiting for rounds where it takes some."""
        endpoint = self.course.choose()
        while endpoint is None:
            self.clock.now += self.course.next_round()
            endpoint = self.course.choose()
        self.so_far.begin_attempt()
        self.at = endpoint
        return endpoint

    def admit(self) -> None:
        self.so_far.take(STARTED)

    def tokens(self, count: int = 1) -> None:
        for _ in range(count):
            self.so_far.take(Delta(0, self.so_far.num_tokens, (65,), "A"))

    def go_and_end(self, error: QuireError) -> str:
        self.go()
        self.end(error)
        return self.at

    def search_in_vain(self, error: QuireError) -> None:
        while True:
            self.go_and_end(error)

    def end(self, error: QuireError | CannotContinue) -> None:
        self.course.ended(self.at, error)


@pytest.mark.parametrize("error", [PeerUnavailable("x"), ShuttingDown("x"), RequestCancelled("x")])
def test_a_request_nobody_took_asks_around_for_a_moment(error: QuireError) -> None:
    trial = Trial("a", "b", "c")
    assert [trial.go_and_end(error) for _ in "abc"] == [*"abc"]
    with pytest.raises(type(error)):
        trial.search_in_vain(error)
    assert 1 <= trial.clock.now < 2


def test_a_client_that_was_served_before_is_patient_with_its_next_request_too() -> None:
    trial = Trial("a", "b")
    trial.endpoints.have_served = True
    trial.course = Course(trial.endpoints, trial.so_far, 10.0, trial.clock)
    with pytest.raises(PeerUnavailable):
        trial.search_in_vain(PeerUnavailable("restarting"))
    assert 10 <= trial.clock.now < 12


def test_a_request_that_finds_all_workers_full_asks_each_of_them_once() -> None:
    trial = Trial("a", "b", "c")
    assert [trial.go_and_end(ResourceExhausted("full")) for _ in "abc"] == [*"abc"]
    with pytest.raises(ResourceExhausted):
        trial.go()
    assert trial.clock.now == 0


def test_who_is_refused_everywhere_hears_of_the_one_that_said_when_to_come_back() -> None:
    trial = Trial("a", "b")
    trial.go()
    trial.end(ResourceExhausted("full", 3.0))
    trial.go()
    trial.end(PeerUnavailable("gone"))
    with pytest.raises(ResourceExhausted) as caught:
        trial.go()
    assert caught.value.retry_after_s == 3.0


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("n", "it is 0", "1 to 64"),
        ModelError("x"),
        DeadlineExceeded("x"),
        EngineFault("x"),
        HandoverRejected("x"),
        StaleAttempt("x"),
    ],
)
def test_what_is_wrong_with_the_request_is_not_tried_elsewhere(error: QuireError) -> None:
    trial = Trial("a", "b")
    trial.go()
    with pytest.raises(type(error)):
        trial.end(error)


@pytest.mark.parametrize(
    "error", [ResourceExhausted("x"), InvalidRequest("x", "y", "z"), EngineFault("x")]
)
def test_what_ends_a_stream_for_its_own_sake_is_not_tried_elsewhere(error: QuireError) -> None:
    trial = Trial("a", "b")
    trial.go()
    trial.admit()
    trial.tokens(3)
    with pytest.raises(type(error)):
        trial.end(error)


@pytest.mark.parametrize("error", [PeerUnavailable("x"), ShuttingDown("x"), EngineStopped("x")])
def test_a_stream_that_breaks_goes_on_elsewhere_and_comes_back_to_the_first_last(
    error: QuireError,
) -> None:
    trial = Trial("a", "b", "c")
    trial.go()
    trial.admit()
    trial.tokens(3)
    trial.end(error)
    assert [trial.go()] == ["b"]
    trial.end(PeerUnavailable("no answer"))
    assert trial.go() == "c"
    trial.end(ResourceExhausted("full"))
    assert trial.go() in "bc", "all failed lately, yet only the first has lost the stream"


def test_a_started_stream_looks_for_a_worker_until_its_patience_ends_and_says_why_it_broke() -> (
    None
):
    trial = Trial("a", "b")
    trial.go()
    trial.admit()
    trial.end(ShuttingDown("a drains"))
    with pytest.raises(ShuttingDown, match=r"a drains; no worker continues .*b: gone"):
        trial.search_in_vain(PeerUnavailable("gone"))
    assert 10 <= trial.clock.now < 12
    assert trial.so_far.attempt < 60


def test_the_poison_rule_fails_a_stream_at_which_two_workers_died_at_one_token() -> None:
    trial = Trial("a", "b", "c")
    trial.go()
    trial.admit()
    trial.tokens(5)
    trial.end(PeerUnavailable("a died"))
    trial.go()
    trial.admit()
    with pytest.raises(EngineFault, match="two workers died at token 5"):
        trial.end(PeerUnavailable("b died"))


def test_a_stream_that_moves_on_between_two_deaths_is_not_suspected() -> None:
    trial = Trial("a", "b", "c")
    for _ in range(20):
        trial.go()
        trial.admit()
        trial.tokens()
        trial.end(PeerUnavailable("died"))
    assert trial.so_far.num_tokens == 20


@pytest.mark.parametrize("error", [ShuttingDown("x"), PeerUnavailable("refused")])
def test_a_drain_or_a_refused_connection_is_no_death(error: QuireError) -> None:
    trial = Trial("a", "b", "c")
    trial.go()
    trial.admit()
    trial.end(PeerUnavailable("died"))
    trial.go()
    if isinstance(error, ShuttingDown):
        trial.admit()
    trial.end(error)
    trial.go()


def test_workers_that_would_go_on_with_other_tokens_are_asked_once() -> None:
    trial = Trial("a", "b")
    trial.go()
    trial.admit()
    trial.tokens(2)
    trial.end(PeerUnavailable("died"))
    assert trial.go() == "b"
    with pytest.raises(CannotContinue) as caught:
        trial.so_far.take(Started(b"", 7, (1, 2, 3), b"", 40, b"o" * 16))
    trial.end(caught.value)
    assert {trial.go() for _ in range(3)} == {"a"}
    trial.end(InvalidRequest("prompt", "it is too long", "less"))
    with pytest.raises(PeerUnavailable, match="its numerics are 6f6f"):
        trial.go()


def test_given_workers_take_turns_and_learned_ones_stand_in() -> None:
    clock = Clock()
    endpoints = Endpoints(["a", "b"], clock)
    endpoints.learn(["c", "a"])
    assert [endpoints.choose(()) for _ in range(4)] == ["a", "b", "a", "b"]
    endpoints.failed("a")
    endpoints.failed("b")
    assert endpoints.choose(()) == "c"
    clock.now = AVOID_S
    assert endpoints.choose(()) in ("a", "b")
    assert endpoints.known == ("a", "b", "c")
    endpoints.learn([])
    assert endpoints.choose(("a", "b")) is None


def test_a_token_sent_twice_is_dropped_and_a_missing_one_fails_the_stream() -> None:
    so_far = StreamSoFar((ChoiceSoFar(0, (65, 66)),))
    assert so_far.take(Delta(0, 1, (66,), "B")) is None
    third = Delta(0, 2, (67,), "C")
    assert so_far.take(third) is third
    for wrong in (
        Delta(0, 4, (68,), "D"),
        Delta(0, 2, (99,), "x"),
        Delta(0, 2, (67, 68), "CD"),
        Delta(1, 1, (65,), "A"),
    ):
        with pytest.raises(EngineFault):
            so_far.take(wrong)
    assert so_far.choices()[0] == ChoiceSoFar(0, (65, 66, 67))


def test_a_token_after_the_end_of_its_choice_fails_the_stream() -> None:
    so_far = StreamSoFar(())
    last = Delta(0, 0, (65,), "A", finish_reason=FinishReason.STOP)
    assert so_far.take(last) is last
    with pytest.raises(EngineFault):
        so_far.take(Delta(0, 1, (66,), "B"))
    assert so_far.choices() == [ChoiceSoFar(0, (65,), finished=True)]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda: Started(b"", 8, (1, 2, 3), b"", 40, b"n" * 16), "seed"),
        (lambda: Started(b"", 7, (1, 2), b"", 40, b"n" * 16), "prompt"),
        (lambda: Started(b"", 7, (1, 2, 3), b"", 39, b"n" * 16), "39 output tokens"),
        (lambda: Started(b"", 7, (1, 2, 3), b"", 40, b"o" * 16), "numerics"),
    ],
)
def test_only_a_worker_with_the_same_tokens_to_come_continues_a_stream(
    change: Callable[[], Started], word: str
) -> None:
    so_far = StreamSoFar(())
    assert so_far.take(STARTED) is STARTED
    with pytest.raises(CannotContinue, match=word):
        so_far.take(change())
    assert so_far.take(STARTED) is None


# -- KV of other numerics

FOREIGN = b"f" * 16


@pytest.mark.parametrize("error", [PeerUnavailable("x"), ShuttingDown("x"), RequestCancelled("x")])
def test_a_stream_over_foreign_kv_goes_on_nowhere(error: QuireError) -> None:
    trial = Trial("a", "b")
    trial.go()
    trial.admit()
    trial.so_far.take(Delta(0, 0, (65,), "A", foreign_kv=FOREIGN))
    with pytest.raises(CannotResume, match=FOREIGN.hex()):
        trial.end(error)


def test_nobody_goes_on_over_foreign_kv_where_another_has_begun_without() -> None:
    so_far = StreamSoFar(())
    so_far.begin_attempt()
    so_far.take(STARTED)
    so_far.take(Delta(0, 0, (65,), "A"))
    so_far.begin_attempt()
    so_far.take(STARTED)
    with pytest.raises(CannotContinue, match="other numerics"):
        so_far.take(Delta(0, 1, (66,), "B", foreign_kv=FOREIGN))
    assert so_far.choices() == [ChoiceSoFar(0, (65,))]


def test_before_the_first_token_another_worker_may_begin_over_foreign_kv() -> None:
    so_far = StreamSoFar(())
    for _ in range(2):
        so_far.begin_attempt()
        so_far.take(STARTED)
    so_far.take(Delta(0, 0, (65,), "A", foreign_kv=FOREIGN))
    assert so_far.foreign_kv == FOREIGN

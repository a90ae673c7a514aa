"""Which worker a stream goes to, where it goes on when that one is lost, and when it is given up.

=====================  ==========================  ================================================
the attempt ended      before the worker took it   after it had
=====================  ==========================  ================================================
worker lost, frozen    next worker                 next worker; a death (see below)
SHUTTING_DOWN          next worker                 next worker
RESOURCE_EXHAUSTED     next worker                 fails: the caller reads too slowly
wrong field or model   fails; of a stream that     fails
                       was started: next worker
anything else          fails                       fails
=====================  ==========================  ================================================

A stream whose KV is in part of other numerics (``--allow-foreign-kv``) goes on nowhere: it fails
with CannotResume, since other tokens might come.

A stream that was started goes around among the workers, with growing pauses, for ``patience_s``
since it broke. So does a request that no worker took in (one may just be restarting), but only once
where they are full, and for ``START_PATIENCE_S`` as long as none has ever served this client.

The poison rule: where two workers die at the same token of a stream, the stream is taken for the
cause, and fails. One worker more is never risked for it; a stream that moved on in between is not
suspected.

Imports neither torch, grpc nor redis, and reads no clock but the one it is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence

from engine.errors import (
    CannotResume,
    EngineFault,
    EngineStopped,
    InvalidRequest,
    ModelError,
    PeerUnavailable,
    QuireError,
    RequestCancelled,
    ResourceExhausted,
    ShuttingDown,
)
from engine.stream_so_far import CannotContinue, StreamSoFar

AVOID_S = 5.0
START_PATIENCE_S = 1.0
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0

LOST = (PeerUnavailable, EngineStopped, RequestCancelled)
"""What an attempt ends with when its worker is lost. Nobody but the caller cancels a request, and
a caller who does waits for no error."""

UNFIT = (InvalidRequest, ModelError, CannotContinue)
"""What a started stream meets at a worker smaller than the first, or of another model."""


class Endpoints:
    """The decode services a client knows: those it was given, and those they told of."""

    def __init__(self, given: Sequence[str], clock: Callable[[], float]) -> None:
        self._given = tuple(dict.fromkeys(given))
        self._learned: tuple[str, ...] = ()
        self.have_served = False
        self._clock = clock
        self._avoid: dict[str, float] = {}
        self._turn = 0

    @property
    def known(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._given + self._learned))

    def learn(self, endpoints: Iterable[str]) -> None:
        """What services told of in place of what they had told before."""
        self._learned = tuple(sorted(set(endpoints)))

    def choose(self, without: Collection[str]) -> str | None:
        """The given ones take turns, learned ones stand in; those that failed lately come last."""
        first = self._turn % len(self._given)
        self._turn += 1
        in_turn = self._given[first:] + self._given[:first] + self._learned
        left = [endpoint for endpoint in dict.fromkeys(in_turn) if endpoint not in without]
        now = self._clock()
        return min(left, key=lambda each: self._avoid.get(each, 0.0) > now, default=None)

    def failed(self, endpoint: str) -> None:
        """Ask the others first for a while."""
        self._avoid[endpoint] = self._clock() + AVOID_S


class Course:
    """One stream's way over the workers."""

    def __init__(
        self,
        endpoints: Endpoints,
        so_far: StreamSoFar,
        patience_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._endpoints = endpoints
        self._so_far = so_far
        self._patience_s = patience_s
        self._clock = clock
        self._asked: set[str] = set()
        self._unfit: set[str] = set()
        self._failures: dict[str, Exception] = {}
        self._broke: QuireError | None = None
        self._num_tokens = -1
        most_s = patience_s if endpoints.have_served else START_PATIENCE_S
        self._give_up_at = clock() + min(most_s, patience_s)
        self._died_at: int | None = None
        self._pause_s = FIRST_PAUSE_S

    def choose(self) -> str | None:
        """The worker to ask next; None if all were asked in this round."""
        endpoint = self._endpoints.choose(self._asked | self._unfit)
        if endpoint is not None:
            self._asked.add(endpoint)
        return endpoint

    def ended(self, endpoint: str, error: QuireError | CannotContinue) -> None:
        """Takes in how an attempt ended. Raises what the stream fails with, if it does."""
        self._check_goes_on(error)
        self._endpoints.failed(endpoint)
        if self._so_far.started is not None and self._so_far.num_tokens != self._num_tokens:
            self._begin_search(endpoint, error)
        self._failures[endpoint] = error
        if isinstance(error, UNFIT):
            self._unfit.add(endpoint)
        if isinstance(error, LOST) and self._so_far.admitted:
            self._note_death(error)

    def next_round(self) -> float:
        """Seconds to wait until all may be asked again. Raises if the stream is given up."""
        given_up = self._clock() >= self._give_up_at
        if self._so_far.started is None:
            refusal = self._refusal()
            if given_up or isinstance(refusal, ResourceExhausted):
                raise refusal
        elif given_up or self._unfit >= {*self._endpoints.known}:
            raise self._given_up()
        self._asked.clear()
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.5, 1.0)  # many streams may have lost the same worker

    def _check_goes_on(self, error: QuireError | CannotContinue) -> None:
        so_far = self._so_far
        if so_far.foreign_kv and isinstance(error, (*LOST, ShuttingDown)):
            raise CannotResume(
                f"{error}; the stream's KV is in part of other numerics"
                f" ({so_far.foreign_kv.hex()}), so no worker would go on with the same tokens"
            ) from error
        if isinstance(error, (*LOST, ShuttingDown, CannotContinue)):
            return
        if isinstance(error, ResourceExhausted) and not so_far.admitted:
            return
        if isinstance(error, UNFIT) and so_far.started is not None and not so_far.admitted:
            return
        raise error

    def _begin_search(self, endpoint: str, error: QuireError | CannotContinue) -> None:
        """The stream has moved on since it broke last: everything may be tried afresh."""
        self._num_tokens = self._so_far.num_tokens
        self._give_up_at = self._clock() + self._patience_s
        self._pause_s = FIRST_PAUSE_S
        self._asked = {endpoint}
        self._failures.clear()
        assert isinstance(error, QuireError)
        self._broke = error

    def _note_death(self, error: QuireError | CannotContinue) -> None:
        if self._died_at == self._so_far.num_tokens:
            raise EngineFault(
                f"two workers died at token {self._died_at} of this request: {error}"
            ) from None
        self._died_at = self._so_far.num_tokens

    def _refusal(self) -> Exception:
        """What to tell who was refused everywhere: to come back later, if anybody said so."""
        failures = list(self._failures.values())
        waits = [each for each in failures if isinstance(each, ResourceExhausted)]
        return (waits or failures)[-1]

    def _given_up(self) -> QuireError:
        broke = self._broke
        assert broke is not None
        others = "; ".join(f"{endpoint}: {why}" for endpoint, why in self._failures.items())
        return type(broke)(f"{broke}; no worker continues the stream ({others})")

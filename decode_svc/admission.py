"""Admission to the decode service: limits are checked before a request costs anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import ResourceExhausted, ShuttingDown


class Admission:
    """Counts requests and the prompt tokens of those that have no token yet."""

    def __init__(self, max_requests: int, max_queued_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_queued_tokens = max_queued_tokens
        self.num_requests = 0
        self.queued_tokens = 0
        self.draining = False

    def check_open(self) -> None:
        """Raises unless one more request may come in; before any work is spent on it."""
        if self.draining:
            raise ShuttingDown("the service is draining")
        if self.num_requests >= self._max_requests:
            raise ResourceExhausted(f"{self.num_requests} requests are in progress")

    @contextmanager
    def admit(self, num_tokens: int) -> Iterator[Ticket]:
        """Counts a request while it lasts. Raises ResourceExhausted."""
        self.check_open()
        if self.queued_tokens and self.queued_tokens + num_tokens > self._max_queued_tokens:
            raise ResourceExhausted(f"{self.queued_tokens} prompt tokens are queued")
        ticket = Ticket(self, num_tokens)
        self.num_requests += 1
        self.queued_tokens += num_tokens
        try:
            yield ticket
        finally:
            self.num_requests -= 1
            ticket.first_token()


class Ticket:
    """One admitted request."""

    def __init__(self, admission: Admission, num_tokens: int) -> None:
        self._admission = admission
        self._num_tokens = num_tokens

    def first_token(self) -> None:
        """Its prompt is done with. Idempotent."""
        self._admission.queued_tokens -= self._num_tokens
        self._num_tokens = 0

"""Every error a caller can meet, in one tree::

    QuireError                       our base; never raised itself
    ├── InvalidRequest               a field of the request is wrong           INVALID_ARGUMENT
    ├── ModelError                   a model cannot be loaded or is unknown    NOT_FOUND
    ├── ResourceExhausted            a queue or pool is full; retry later      RESOURCE_EXHAUSTED
    ├── DeadlineExceeded             the request's time ran out                DEADLINE_EXCEEDED
    ├── RequestCancelled             the caller went away                      CANCELLED
    ├── ShuttingDown                 the service drains                        UNAVAILABLE
    ├── PeerUnavailable              another service cannot be reached         UNAVAILABLE
    ├── CannotResume                 a broken stream cannot go on alike        UNAVAILABLE
    ├── EngineStopped                a worker's engine broke; its process ends UNAVAILABLE
    ├── HandoverRejected             a page or commit did not verify           FAILED_PRECONDITION
    ├── StaleAttempt                 a message of an older attempt             ABORTED
    └── EngineFault                  our bug or broken hardware                INTERNAL

``engine.serving.status`` maps them to gRPC codes and back.
"""

from __future__ import annotations


class QuireError(Exception):
    """Base of all errors that may cross a service's border; the message is fit for a client."""


class InvalidRequest(QuireError):
    """A request's ``field`` is wrong; ``allowed`` says in words what would be right."""

    def __init__(self, field: str, problem: str, allowed: str) -> None:
        super().__init__(f"{field}: {problem}; allowed: {allowed}")
        self.field = field
        self.problem = problem
        self.allowed = allowed


class ModelError(QuireError):
    """A model is unknown, damaged, or of a kind that is not supported."""


class ResourceExhausted(QuireError):
    """A limit is reached for now; ``retry_after_s`` is a hint in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(QuireError):
    """The request's deadline passed before it finished."""


class RequestCancelled(QuireError):
    """The caller cancelled or vanished."""


class ShuttingDown(QuireError):
    """The service takes no new work; another one may."""


class PeerUnavailable(QuireError):
    """Another service could not be reached or broke off."""


class CannotResume(QuireError):
    """A stream broke, and whoever went on with it might give other tokens."""


class EngineStopped(QuireError):
    """The engine that ran the request broke down; another worker may take it."""


class HandoverRejected(QuireError):
    """A page, reference or commit is not what was asked for; nothing of it is used."""


class StaleAttempt(QuireError):
    """The message belongs to an older attempt of its request and had no effect."""


class EngineFault(QuireError):
    """Something of ours is broken; the request fails, the service goes on."""

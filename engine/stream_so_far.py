"""What the caller of one stream has got, however many workers it took: each token once, in order.

Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.completion import Delta, Finished, Started, StreamItem
from engine.errors import EngineFault
from engine.resume import ChoiceSoFar


class CannotContinue(Exception):
    """This worker would go on with other tokens than the one that the stream was started on."""


class StreamSoFar:
    """Takes the items of one attempt after another in, and says which of them are news."""

    def __init__(self, resume: Sequence[ChoiceSoFar]) -> None:
        self.started: Started | None = None
        self.attempt = 0
        self.admitted = False
        """Whether the current attempt's worker has taken the request in."""
        self.foreign_kv = b""
        """What the tokens' KV stands under, if nobody else would go on with the same tokens."""
        self._ids = {choice.choice_index: list(choice.token_ids) for choice in resume}
        self._ended = {choice.choice_index for choice in resume if choice.finished}

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._ids.values()))

    def begin_attempt(self) -> None:
        self.attempt += 1
        self.admitted = False

    def choices(self) -> list[ChoiceSoFar]:
        """For ``resume``: every choice that has tokens."""
        return [
            ChoiceSoFar(index, tuple(ids), index in self._ended)
            for index, ids in sorted(self._ids.items())
        ]

    def take(self, item: StreamItem) -> StreamItem | None:
        """The item, or None if the caller has it already.

        Raises CannotContinue, and EngineFault where tokens are missing or are not the same again.
        """
        match item:
            case Started():
                return self._start(item)
            case Delta():
                return self._extend(item)
            case Finished():
                return item

    def _start(self, started: Started) -> Started | None:
        if self.started is not None:
            _check_same(self.started, started)
        self.admitted = True
        first, self.started = self.started, self.started or started
        return started if first is None else None

    def _extend(self, delta: Delta) -> Delta | None:
        ids = self._ids.setdefault(delta.choice_index, [])
        start, end = delta.first_index, delta.first_index + len(delta.token_ids)
        if end <= len(ids) and tuple(ids[start:end]) == delta.token_ids:
            return None
        if start != len(ids) or delta.choice_index in self._ended:
            raise EngineFault(
                f"choice {delta.choice_index} has {len(ids)} tokens"
                f" and was sent those from {start} to {end}"
            )
        self._check_foreign(delta)
        ids += delta.token_ids
        if delta.finish_reason is not None:
            self._ended.add(delta.choice_index)
        return delta

    def _check_foreign(self, delta: Delta) -> None:
        """A worker may not go on with KV of other numerics where another one has begun."""
        if delta.foreign_kv and not self.foreign_kv and self.num_tokens and self.attempt > 1:
            raise CannotContinue(f"it took KV of other numerics, {delta.foreign_kv.hex()}")
        self.foreign_kv = self.foreign_kv or delta.foreign_kv


def _check_same(first: Started, now: Started) -> None:
    """Raises CannotContinue unless the same tokens would come from both workers."""
    if now.numerics_digest != first.numerics_digest:
        raise CannotContinue(
            f"its numerics are {now.numerics_digest.hex()}, not {first.numerics_digest.hex()}"
        )
    if now.max_tokens != first.max_tokens:
        raise CannotContinue(f"it holds {now.max_tokens} output tokens, not {first.max_tokens}")
    if (now.seed, now.prompt_ids) != (first.seed, first.prompt_ids):
        raise CannotContinue("it took another seed or prompt than it was sent")

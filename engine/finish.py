"""When an output ends, why, and what of its text can be told so far.

Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum

from engine.sampling_params import SamplingParams
from engine.text_stream import TextStream


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or no room for more
    CANCELLED = "cancelled"  # the caller went away
    ERROR = "error"  # the request failed


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one token adds: certain text, and with the last token why it is the last.

    ``matched_stop`` is the stop string or the end-of-sequence or stop id that ended the output.
    """

    text: str
    finish: FinishReason | None = None
    matched_stop: str | int | None = None


class OutputTracker:
    """Follows the output of one choice; pushing the same tokens again rebuilds it.

    The deltas' texts put together are the text of the output. The last token ends it with, in this
    order: STOP for a stop id, or an end-of-sequence id unless ``ignore_eos``; STOP for a stop
    string; LENGTH for ``max_tokens``. The text of an id that ended the output and a stop string are
    left out unless ``include_stop``. A stop string counts if the token that completes it is at
    least the ``min_tokens``-th. ``token_bytes`` gives the bytes of a token, none for special ones.
    """

    def __init__(
        self,
        params: SamplingParams,
        eos_ids: Collection[int],
        token_bytes: Callable[[int], bytes],
        max_tokens: int,
    ) -> None:
        self._ending_ids = {*params.stop_token_ids} | (set() if params.ignore_eos else {*eos_ids})
        self._include_stop = params.include_stop
        self._min_tokens = params.min_tokens
        self._max_tokens = max_tokens
        self._token_bytes = token_bytes
        self._stream = TextStream(params.stop, params.include_stop)
        self._num_tokens = 0

    def push(self, token_id: int) -> TextDelta:
        """Takes the next token. Not to be called after one that finished the output."""
        self._num_tokens += 1
        if token_id in self._ending_ids:
            return self._end_with_id(token_id)
        may_stop = self._num_tokens >= self._min_tokens
        text = self._stream.push(self._token_bytes(token_id), may_stop=may_stop)
        if self._stream.matched is not None:
            return TextDelta(text, FinishReason.STOP, self._stream.matched)
        if self._num_tokens >= self._max_tokens:
            return TextDelta(text + self._stream.flush(), FinishReason.LENGTH)
        return TextDelta(text)

    def flush(self) -> str:
        """The text held back, for an output that ends before its last token."""
        return self._stream.flush()

    def _end_with_id(self, token_id: int) -> TextDelta:
        text = ""
        if self._include_stop:
            text = self._stream.push(self._token_bytes(token_id), may_stop=False)
        return TextDelta(text + self._stream.flush(), FinishReason.STOP, token_id)

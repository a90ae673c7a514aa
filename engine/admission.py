"""What is checked before a request costs anything: its prompt against model and pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequest
from engine.model import ModelSpec
from engine.sampling_params import SamplingParams

MAX_PROMPT_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class Capacity:
    """``max_context`` tokens per sequence by the model, ``pool_tokens`` by the pool."""

    vocab_size: int
    max_context: int
    pool_tokens: int

    @classmethod
    def of(cls, spec: ModelSpec, num_pages: int, page_size: int) -> Capacity:
        return cls(spec.vocab_size, spec.max_context, num_pages * page_size)

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that leaves room for one output token."""
        return min(self.max_context - 1, self.pool_tokens)


def check_prompt(prompt_ids: Sequence[int], capacity: Capacity) -> None:
    """Raises InvalidRequest unless the prompt can be served here."""
    if not prompt_ids:
        raise InvalidRequest("prompt", "it is empty", "at least 1 token")
    longest = capacity.max_prompt_tokens
    if len(prompt_ids) > longest:
        raise InvalidRequest("prompt", f"it has {len(prompt_ids)} tokens", f"1 to {longest} tokens")
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= capacity.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(
            "prompt.token_ids", f"token id {wrong}", f"0 to {capacity.vocab_size - 1}"
        )


def check_text(text: str) -> None:
    """Raises InvalidRequest for text that is empty or too long to be worth tokenizing."""
    if not text:
        raise InvalidRequest("prompt", "it is empty", "at least 1 character")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            "prompt", f"it has {len(text)} characters", f"1 to {MAX_PROMPT_CHARACTERS} characters"
        )


def output_limit(params: SamplingParams, num_prompt: int, capacity: Capacity) -> int:
    """Output tokens at most: what was asked for, or what still fits in the context and the pool.

    The last token of an output needs no page of its own.
    """
    room = min(capacity.max_context - num_prompt, capacity.pool_tokens - num_prompt + 1)
    return min(params.max_tokens or room, room)

"""The token function of one choice, and of all rows of a step at once."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineFault, InvalidRequest, QuireError
from engine.sampling_params import SamplingParams
from engine.token_function.rules import rule_of
from kernels.sample import NOT_NUMBERS, NOTHING_LEFT, Row, sample

Fp32 = NDArray[np.float32]
TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token and, if the request wants logprobs, its own and the highest, best first."""

    token_id: int
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()


class TokenFunction:
    """Chooses the tokens of one choice of one request.

    A pure function of (logits, tokens before): calls may come in any order, repeated, or on
    another machine, and choose the same tokens. ``seed`` (64 bits) and ``choice_index`` say which
    noise this choice gets; ``params.seed`` and ``params.n`` are not looked at.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        choice_index: int,
        prompt_ids: Sequence[int],
        eos_ids: Collection[int],
        vocab_size: int,
    ) -> None:
        self._rule = rule_of(params, seed, choice_index, prompt_ids, eos_ids, vocab_size)
        self._vocab_size = vocab_size

    def __call__(self, logits: Fp32, output_ids: Sequence[int]) -> TokenChoice:
        """The token after ``output_ids``, from ``logits`` ``[vocab_size]`` fp32, left unchanged.

        Raises EngineFault if a logit is NaN or +Inf or all are -Inf, and InvalidRequest if the
        request's masks leave no token.
        """
        (choice,) = choose([self.row(logits, array("i", output_ids))])
        if isinstance(choice, QuireError):
            raise choice
        return choice

    def row(self, logits: Fp32, output_ids: array[int]) -> Row:
        """What ``choose`` takes for the token after ``output_ids``."""
        assert logits.shape == (self._vocab_size,)
        assert logits.dtype == np.float32
        return Row(logits, self._rule, output_ids)

    @property
    def argmax_from(self) -> int | None:
        """After so many output tokens, ``chosen`` of the highest logit's id is the next one; None:
        never."""
        return self._rule.argmax_from


def choose(rows: Sequence[Row]) -> list[TokenChoice | QuireError]:
    """The token of each row, or the error that its token function raises."""
    tokens = sample(rows)
    choices = [chosen(token_id) for token_id in tokens.ids.tolist()]
    for index, row in enumerate(rows):
        choice, num_top = choices[index], row.rule.num_top
        if num_top is not None and isinstance(choice, TokenChoice):
            ids = tokens.top_ids[index, :num_top].tolist()
            logprobs = tokens.top_logprobs[index, :num_top].tolist()
            top = tuple(pair for pair in zip(ids, logprobs, strict=True) if pair[0] >= 0)
            choices[index] = TokenChoice(choice.token_id, float(tokens.logprobs[index]), top)
    return choices


def chosen(token_id: int) -> TokenChoice | QuireError:
    """What a token id of ``kernels.sample``, or a reason in its place, means to a request."""
    if token_id == NOT_NUMBERS:
        return EngineFault("the model produced logits that are not numbers")
    if token_id == NOTHING_LEFT:
        return InvalidRequest(
            "allowed_token_ids",
            "with banned_token_ids and min_tokens it leaves no token to choose",
            "at least 1 token that does not end the output",
        )
    return TokenChoice(token_id)

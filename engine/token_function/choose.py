"""The token function of one choice: from logits to a token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineFault, InvalidRequest
from engine.sampling_params import SamplingParams
from engine.token_function.filters import min_p_border, top_k_border, top_p_border
from engine.token_function.gumbel import gumbel_argmax
from engine.token_function.logprobs import TopLogprobs, log_softmax, top_logprobs
from engine.token_function.penalties import LARGEST, Penalties
from engine.token_function.philox import token_words

Fp32 = NDArray[np.float32]
Mask = NDArray[np.bool_]


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
        self._params = params
        self._seed = seed
        self._choice_index = choice_index
        self._num_prompt = len(prompt_ids)
        self._vocab_size = vocab_size
        self._temperature = np.float32(params.temperature)
        self._penalties = Penalties(params, prompt_ids)
        self._forbidden = _forbidden(params, vocab_size)
        self._forbidden_early = self._forbidden
        if params.min_tokens:
            endings = {*params.stop_token_ids} | (set() if params.ignore_eos else {*eos_ids})
            self._forbidden_early = _mark(self._forbidden, sorted(endings), vocab_size)

    def __call__(self, logits: Fp32, output_ids: Sequence[int]) -> TokenChoice:
        """The token after ``output_ids``, from ``logits`` ``[vocab_size]`` fp32, left unchanged.

        Raises EngineFault if a logit is NaN or +Inf or all are -Inf, and InvalidRequest if the
        request's masks leave no token.
        """
        assert logits.shape == (self._vocab_size,)
        assert logits.dtype == np.float32
        impossible = _check_logits(logits)
        with np.errstate(over="ignore"):  # what overflows is given its value where it matters
            token_id = self._choose(logits, impossible, output_ids)
        if self._params.logprobs is None:
            return TokenChoice(token_id)
        logprobs = log_softmax(logits)
        return TokenChoice(
            token_id, float(logprobs[token_id]), top_logprobs(logprobs, self._params.logprobs)
        )

    def _choose(self, logits: Fp32, impossible: Mask | None, output_ids: Sequence[int]) -> int:
        adjusted = self._adjust(logits, output_ids)
        forbidden = _either(impossible, self._forbidden_at(len(output_ids)))
        ids, values = _candidates(adjusted, forbidden)
        if self._params.is_greedy:
            return int(ids[np.argmax(values)])
        values = np.clip(values / self._temperature, -LARGEST, LARGEST)
        ids, values = self._filter(ids, values)
        position = self._num_prompt + len(output_ids)
        words = token_words(self._seed, position, self._choice_index, ids)
        return int(ids[gumbel_argmax(values, words)])

    def _adjust(self, logits: Fp32, output_ids: Sequence[int]) -> Fp32:
        if self._penalties.change_nothing:
            return logits
        adjusted = logits.copy()
        self._penalties.apply(adjusted, output_ids)
        return adjusted

    def _forbidden_at(self, num_output: int) -> Mask | None:
        early = num_output < self._params.min_tokens
        return self._forbidden_early if early else self._forbidden

    def _filter(self, ids: NDArray[np.intp], values: Fp32) -> tuple[NDArray[np.intp], Fp32]:
        params = self._params
        if params.min_p > 0:
            ids, values = _at_least(min_p_border(values, params.min_p), ids, values)
        if params.top_k > 0:
            ids, values = _at_least(top_k_border(values, params.top_k), ids, values)
        if params.top_p < 1:
            ids, values = _at_least(top_p_border(values, params.top_p), ids, values)
        return ids, values


def _check_logits(logits: Fp32) -> Mask | None:
    """Which logits are -Inf, if any; raises EngineFault for what no model may produce."""
    if np.isfinite(logits).all():
        return None
    impossible = np.isneginf(logits)
    if not np.isfinite(logits[~impossible]).all() or impossible.all():
        raise EngineFault("the model produced logits that are not numbers")
    return impossible


def _forbidden(params: SamplingParams, vocab_size: int) -> Mask | None:
    forbidden = None
    if params.allowed_token_ids:
        forbidden = np.ones(vocab_size, dtype=np.bool_)
        forbidden[np.array(params.allowed_token_ids)] = False
    return _mark(forbidden, params.banned_token_ids, vocab_size)


def _mark(mask: Mask | None, ids: Sequence[int], vocab_size: int) -> Mask | None:
    """``mask`` and ``ids`` together, as a new mask if there are any ids."""
    if not ids:
        return mask
    marked = np.zeros(vocab_size, dtype=np.bool_) if mask is None else mask.copy()
    marked[np.array(ids)] = True
    return marked


def _either(first: Mask | None, second: Mask | None) -> Mask | None:
    if first is None or second is None:
        return second if first is None else first
    return first | second


def _candidates(logits: Fp32, forbidden: Mask | None) -> tuple[NDArray[np.intp], Fp32]:
    """The ids that may be chosen, ascending, and their logits; raises InvalidRequest if none."""
    if forbidden is None:
        return np.arange(logits.size), logits
    ids = np.flatnonzero(~forbidden)
    if not ids.size:
        raise InvalidRequest(
            "allowed_token_ids",
            "with banned_token_ids and min_tokens it leaves no token to choose",
            "at least 1 token that does not end the output",
        )
    return ids, logits[ids]


def _at_least(
    border: np.float32, ids: NDArray[np.intp], values: Fp32
) -> tuple[NDArray[np.intp], Fp32]:
    kept = values >= border
    return ids[kept], values[kept]

"""What sampling parameters mean to the token function."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf, log

import numpy as np

from engine.sampling_params import SamplingParams
from kernels.sample.rule import Mask, Rule, unique_ids

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def rule_of(
    params: SamplingParams,
    seed: int,
    choice_index: int,
    prompt_ids: Sequence[int],
    eos_ids: Collection[int],
    vocab_size: int,
) -> Rule:
    """The rule of one choice; ``params.seed`` and ``params.n`` are not looked at.

    Parameters are rounded to fp32, but ``top_p``; a repetition penalty below 2^-126 counts as that.
    """
    forbidden = _forbidden(params, vocab_size)
    return Rule(
        seed=seed,
        choice_index=choice_index,
        num_prompt=len(prompt_ids),
        temperature=0.0 if params.is_greedy else _fp32(params.temperature),
        log_min_p=_fp32(log(params.min_p)) if params.min_p > 0 else -inf,
        top_k=params.top_k,
        top_p=params.top_p,
        bias_ids=np.array(list(params.logit_bias), dtype=np.int32),
        biases=np.array(list(params.logit_bias.values()), dtype=np.float32),
        repetition=max(_fp32(params.repetition_penalty), SMALLEST_NORMAL),
        presence=_fp32(params.presence_penalty),
        frequency=_fp32(params.frequency_penalty),
        seen_ids=unique_ids(prompt_ids if params.repetition_penalty != 1 else ()),
        forbidden=forbidden,
        forbidden_early=_mark(forbidden, _ends(params, eos_ids), vocab_size),
        min_tokens=params.min_tokens,
        num_top=params.logprobs,
    )


def _fp32(x: float) -> float:
    return float(np.float32(x))


def _ends(params: SamplingParams, eos_ids: Collection[int]) -> Sequence[int]:
    """The ids that end the output and have to wait for ``min_tokens``."""
    if not params.min_tokens:
        return ()
    return sorted({*params.stop_token_ids} | (set() if params.ignore_eos else {*eos_ids}))


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

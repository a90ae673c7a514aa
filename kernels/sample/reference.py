from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kernels.sample import NOT_NUMBERS, NOTHING_LEFT, Row, Tokens, empty_tokens
from kernels.sample.filters import min_p_border, top_k_border, top_p_border
from kernels.sample.gumbel import gumbel_argmax
from kernels.sample.logprobs import log_softmax, top_logprobs
from kernels.sample.penalties import LARGEST, penalize
from kernels.sample.philox import token_words
from kernels.sample.rule import Fp32, Mask, Rule

Places = NDArray[np.intp]


def sample(rows: Sequence[Row]) -> Tokens:
    with np.errstate(over="ignore"):  # what overflows is given its value where it matters
        return _sample(rows)


def _sample(rows: Sequence[Row]) -> Tokens:
    tokens = empty_tokens(rows)
    for index, row in enumerate(rows):
        tokens.ids[index] = token_id = _choose(row)
        num_top = row.rule.num_top
        if num_top is not None and token_id >= 0:
            logprobs = log_softmax(row.logits)
            tokens.logprobs[index] = logprobs[token_id]
            best = tokens.top_ids[index, :num_top], tokens.top_logprobs[index, :num_top]
            top_logprobs(logprobs, *best)
    return tokens


def _choose(row: Row) -> int:
    logits, rule, output_ids = row
    impossible = np.isneginf(logits)
    if impossible.all() or not np.isfinite(logits[~impossible]).all():
        return NOT_NUMBERS
    ids = _candidates(impossible, rule.forbidden_at(len(output_ids)))
    if not ids.size:
        return NOTHING_LEFT
    values = penalize(logits, rule, output_ids)[ids]
    if rule.temperature == 0:
        return int(ids[np.argmax(values)])
    values = np.clip(values / np.float32(rule.temperature), -LARGEST, LARGEST)
    ids, values = _filter(rule, ids, values)
    position = rule.num_prompt + len(output_ids)
    words = token_words(rule.seed, position, rule.choice_index, ids)
    return int(ids[gumbel_argmax(values, words)])


def _candidates(impossible: Mask, forbidden: Mask | None) -> Places:
    """The ids that may be chosen, ascending."""
    return np.flatnonzero(~(impossible if forbidden is None else impossible | forbidden))


def _filter(rule: Rule, ids: Places, values: Fp32) -> tuple[Places, Fp32]:
    if rule.log_min_p > -np.inf:
        ids, values = _at_least(min_p_border(values, rule.log_min_p), ids, values)
    if rule.top_k > 0:
        ids, values = _at_least(top_k_border(values, rule.top_k), ids, values)
    if rule.top_p < 1:
        ids, values = _at_least(top_p_border(values, rule.top_p), ids, values)
    return ids, values


def _at_least(border: np.float32, ids: Places, values: Fp32) -> tuple[Places, Fp32]:
    kept = values >= border
    return ids[kept], values[kept]

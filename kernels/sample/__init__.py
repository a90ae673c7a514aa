"""The choice of tokens from logits; also the definition of it, in numpy.

In this order, all in fp32:

1. log-probabilities, from the raw logits (``logprobs``)
2. masks: a forbidden id stays out whatever comes later, and so does one whose logit is -Inf
3. biases, then repetition, frequency and presence penalties (``penalties``)
4. temperature 0: the highest logit, ties to the lowest id, and done
5. division by the temperature, then min_p, top_k, top_p (``filters``)
6. the highest ``fp32(logit + g(id))``, ties to the lowest id (``gumbel``), where ``g`` comes from
   word ``id % 4`` of Philox4x32-10 with the seed as key and the counter
   ``(id // 4, position, choice index, 0)`` (``philox``); ``position`` is the index of the token
   being chosen in prompt + output

Steps 3 and 5 keep finite logits finite: after the penalties and after the division, what overflows
becomes the largest number of its sign.

Every operation is one IEEE operation or exact in any order, exponentials and logarithms are fixed
polynomials: every back end gives the same tokens and the same bits of logprobs. Imports no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels import dispatch
from kernels.sample.rule import Rule

NOT_NUMBERS, NOTHING_LEFT = -1, -2


class Row(NamedTuple):
    """``logits`` ``[vocab_size]`` fp32, never written; ``output_ids`` int32, chosen so far."""

    logits: NDArray[np.float32]
    rule: Rule
    output_ids: array[int]


class Tokens(NamedTuple):
    """One entry per row.

    ``ids``           ``[R]`` int32; NOT_NUMBERS if a logit is NaN or +Inf or all are -Inf,
                      NOTHING_LEFT if all other logits are -Inf or forbidden
    ``logprobs``      ``[R]`` fp32 of the tokens; undefined where the rule wants none
    ``top_ids``       ``[R, max_top]`` int32, highest logprob first, equal ones by id, -1 where
                      there are no more; undefined beyond the rule's ``num_top``
    ``top_logprobs``  ``[R, max_top]`` fp32, likewise

    Where there is no token, all else is undefined.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


def sample(rows: Sequence[Row]) -> Tokens:
    """Chooses a token for each row, which depends on nothing but the row.

    All rows have the same ``vocab_size``. Raises ``ValueError`` naming an argument of the wrong
    size or dtype, or with ids outside the vocabulary.
    """
    tokens: Tokens = dispatch.implementation("sample").sample(rows)
    return tokens


def empty_tokens(rows: Sequence[Row]) -> Tokens:
    """Room for the tokens of ``rows``."""
    max_top = max((row.rule.num_top or 0 for row in rows), default=0)
    return Tokens(
        np.empty(len(rows), dtype=np.int32),
        np.empty(len(rows), dtype=np.float32),
        np.empty((len(rows), max_top), dtype=np.int32),
        np.empty((len(rows), max_top), dtype=np.float32),
    )

"""Log-probabilities of the raw logits, before anything a rule asks for changes them.

The definition
--------------
All arithmetic is IEEE fp64, round to nearest even, each operation rounded by itself. Decimal
constants stand for the nearest fp64 number::

    logprob(id) = fp32((logit(id) - highest) - log(total))

``total`` is the sum of ``exp(logit - highest)``: lane j of 16 adds up ids j, j + 16, ... in
ascending order; then lane j + 8 is added to lane j, then + 4, + 2, + 1.

``exp(x)`` of ``x`` at most 0, with a relative error of about 2^-42::

    x < -700: 0
    n = the integer nearest to x * 1.4426950408889634, ties to even
    r = x - n * 6.93147180369123816490e-1 - n * 1.90821492927058770002e-10
    y = 1 / 10!
    y = y * r + 1 / i!     for i = 9 .. 0
    return y * 2^n

``log(x)`` of ``x`` at least 1, the series of the inverse hyperbolic tangent. With ``x = m * 2^e``
and ``m`` in ``[sqrt(1/2), sqrt(2))``, the borders rounded to fp64::

    f = (m - 1) / (m + 1)
    s = f * f
    y = 1 / 23
    y = y * s + 1 / k      for k = 21, 19 .. 1
    return (2 * f) * y + e * 0.693147180559945309
"""

from __future__ import annotations

from math import factorial, frexp, inf, sqrt

import numpy as np
from numpy.typing import NDArray

from kernels.sample.rule import Fp32, Ids

Fp64 = NDArray[np.float64]

LANES = 16
_LOG2_E = 1.4426950408889634
_LN2 = 0.693147180559945309
_LN2_HIGH = 6.93147180369123816490e-1
_LN2_LOW = 1.90821492927058770002e-10
_NOTHING_BELOW = -700.0
_DEGREE = 10


def log_softmax(logits: Fp32) -> Fp32:
    """``[vocab_size]`` to the same shape, as the module defines it; -Inf below all fp32 numbers."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return (shifted - _log(_total(_exp(shifted)))).astype(np.float32)


def top_logprobs(logprobs: Fp32, ids: Ids, best: Fp32) -> None:
    """The highest of ``logprobs`` and their ids, into ``ids`` and ``best`` ``[num_top]``.

    Best first, ties to the lower id; none of -Inf: then the id is -1.
    """
    ids[:], best[:] = -1, -inf
    num_top = min(ids.size, logprobs.size)
    if num_top:
        border = np.partition(logprobs, -num_top)[-num_top]
        found = np.flatnonzero((logprobs >= border) & np.isfinite(logprobs))
        found = found[np.argsort(-logprobs[found], kind="stable")][:num_top]
        ids[: found.size], best[: found.size] = found, logprobs[found]


def _exp(x: Fp64) -> Fp64:
    has_mass = x >= _NOTHING_BELOW
    x = np.where(has_mass, x, 0.0)
    n = np.rint(x * _LOG2_E)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    y = np.full_like(r, 1 / factorial(_DEGREE))
    for i in reversed(range(_DEGREE)):
        y *= r
        y += 1 / factorial(i)
    return np.where(has_mass, np.ldexp(y, n.astype(np.int32)), 0.0)


def _total(terms: Fp64) -> float:
    padded = np.zeros(-(-terms.size // LANES) * LANES)
    padded[: terms.size] = terms
    lanes = padded.reshape(-1, LANES).cumsum(axis=0)[-1]  # cumsum adds in order
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return float(lanes[0])


def _log(x: float) -> float:
    m, e = frexp(x)
    if m < sqrt(0.5):
        m, e = 2 * m, e - 1
    f = (m - 1) / (m + 1)
    y = 1 / 23
    for k in range(21, 0, -2):
        y = y * (f * f) + 1 / k
    return (2 * f) * y + e * _LN2

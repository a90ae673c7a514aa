"""min_p, top_k and top_p: which ids may still be drawn.

All three are defined so that any back end can meet them exactly, in any order of summation. Each
looks at what the former left, and ids whose logits tie with the last one kept are kept.

``min_p``  keeps logits of at least ``fp32(highest + fp32(ln(min_p)))``.
``top_k``  keeps logits of at least the k-th highest, counted with repeats.
``top_p``  keeps an id if the mass of all strictly higher logits is below ``fp64(top_p * total)``.
           Masses are integers, so sums are exact, in fp64 too (up to 2^20 ids).

The *mass* of a logit is ``floor(2^32 * exp(x))`` of ``x = fp32(logit - highest)``, with the
exponential in fp32, each operation rounded by itself, after ``expf`` of Cephes (S. L. Moshier)::

    x < -23: mass 0
    n = floor(x * 1.44269504088896341 + 0.5)          rounded after the product and after the sum
    x = x - n * 0.693359375
    x = x - n * -2.12194440e-4
    y = E0
    y = y * x + Ei         for i = 1 .. 5
    y = y * (x * x)
    y = y + x
    y = y + 1
    mass = floor(y * 2^(n + 32))                      exact before the floor
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Fp32 = NDArray[np.float32]
Ids = NDArray[np.intp]

_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_NO_MASS_BELOW = np.float32(-23)


def min_p_border(logits: Fp32, log_min_p: float) -> np.float32:
    """The lowest logit that ``min_p`` of this logarithm keeps; ``logits`` ``[num_ids]``."""
    border: np.float32 = logits.max() + np.float32(log_min_p)
    return border


def top_k_border(logits: Fp32, top_k: int) -> np.float32:
    """The lowest logit that ``top_k`` (at least 1) keeps; ``logits`` ``[num_ids]``."""
    index = max(logits.size - top_k, 0)
    border: np.float32 = np.partition(logits, index)[index]
    return border


def top_p_border(logits: Fp32, top_p: float) -> np.float32:
    """The lowest logit that ``top_p`` (above 0 to 1) keeps; ``logits`` ``[num_ids]``."""
    descending = np.sort(logits)[::-1]
    up_to_here = masses(descending - descending[0]).cumsum().astype(np.float64)
    last_kept = np.searchsorted(up_to_here, top_p * up_to_here[-1])
    border: np.float32 = descending[last_kept]
    return border


def masses(x: Fp32) -> NDArray[np.uint64]:
    """``floor(2^32 * exp(x))`` of ``x`` (at most 0), any shape, as the module defines it."""
    has_mass = x >= _NO_MASS_BELOW
    x = np.where(has_mass, x, np.float32(0))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    x = x - n * _LN2_HIGH
    x -= n * _LN2_LOW
    y = np.full_like(x, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        y *= x
        y += coefficient
    y *= x * x
    y += x
    y += np.float32(1)
    scaled = np.ldexp(y.astype(np.float64), n.astype(np.int32) + 32)
    return np.where(has_mass, np.floor(scaled), 0).astype(np.uint64)

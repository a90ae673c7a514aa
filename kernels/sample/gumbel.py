"""Gumbel noise in fp32, the same bits in every language.

``g = -log(-log(u))`` with ``u = (x + 0.5) / 2^32`` for a random word ``x``. Adding ``g`` to the
logits and taking the argmax draws from their softmax (Gumbel 1954; Maddison et al. 2014).

The definition
--------------
All arithmetic is IEEE fp32, round to nearest even, each operation rounded by itself: no fused
multiply-add, no reassociation. Decimal constants stand for the nearest fp32 number. ``fp32(i)`` is
an integer rounded once to the nearest fp32 number, ties to even.

``log1(f, e)``, the logarithm of ``(1 + f) * 2^e`` for ``1 + f`` in about ``[sqrt(1/2), sqrt(2)]``
and an integer ``e`` held as fp32, with the coefficients of ``logf`` of Cephes (S. L. Moshier,
*Methods and Programs for Mathematical Functions*, 1989)::

    z = f * f
    y = C0
    y = y * f + Ci         for i = 1 .. 8: the product is rounded, then the sum
    y = y * f
    y = y * z
    y = y + e * -2.12194440e-4
    y = y + z * -0.5
    r = f + y
    return r + e * 0.693359375

``split(v)`` of a positive normal number gives the ``(f, e)`` of ``v``. With ``b`` the bits of ``v``
as a signed 32-bit integer and ``S = 0x3F3504F3`` (the bits of the fp32 number at ``sqrt(1/2)``)::

    e = (b - S) >> 23       arithmetic shift
    m = the number with the bits b - (e << 23)
    f = m - 1               exact

``u`` itself is never rounded near 1, where fp32 has no number left below 1 that is close enough::

    x >= 3037000500, that is u > sqrt(1/2):
        f = fp32(2 * (2^32 - 1 - x) + 1) * -2^-33         the product is exact
        e = 0
    otherwise:
        f, e' = split(fp32(2 * x + 1))
        e = e' - 33
    q = -log1(f, e)
    g = -log1(split(q))

The relative error of ``q`` stays below 2^-22 for every ``x``, and ``g`` is finite for every ``x``:
it grows from -3.13 at x = 0 to 22.88 at x = 2^32 - 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAR_ONE = np.uint32(3037000500)
LUCKY = np.uint32(2**32 - 2**26)
UNLUCKY_BOUND = np.float32(4.16)  # g of every word below LUCKY is less: -log(-log(63/64)) = 4.151

_ROOT_HALF_BITS = np.int32(0x3F3504F3)
_MANTISSA_BITS = np.int32(23)
_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
_LN2_LOW = np.float32(-2.12194440e-4)
_LN2_HIGH = np.float32(0.693359375)
_MINUS_HALF = np.float32(-0.5)

Fp32 = NDArray[np.float32]


def gumbel(words: NDArray[np.uint32]) -> Fp32:
    """``g`` of random words, any shape, as the module defines it."""
    return -_log1(*_split(minus_log_uniform(words)))


def gumbel_argmax(values: Fp32, words: NDArray[np.uint32]) -> int:
    """The first index of the largest ``fp32(values + g)``, both ``[num_ids]``, not empty.

    Computes ``g`` only where it can matter: for the one word in 64 that is LUCKY, and for values
    that could overtake the best of those with the most an unlucky word brings. Rounding a sum is
    monotone, so what is left out could not have won.
    """
    contends = words >= LUCKY
    contends[np.argmax(values)] = True
    reached = np.max(values[contends] + gumbel(words[contends]))
    contends |= values + UNLUCKY_BOUND >= reached
    indices = np.flatnonzero(contends)
    return int(indices[np.argmax(values[indices] + gumbel(words[indices]))])


def minus_log_uniform(words: NDArray[np.uint32]) -> Fp32:
    """``q = -log(u)`` of random words, any shape."""
    odd = words.astype(np.float64) * 2 + 1  # 33 bits, exact in fp64
    f, e = _split(odd.astype(np.float32))
    e -= np.float32(33)
    near_one = words >= NEAR_ONE
    below_one = (2.0**33 - odd[near_one]).astype(np.float32)
    f[near_one] = below_one * np.float32(-(2.0**-33))
    e[near_one] = 0
    return -_log1(f, e)


def _split(values: Fp32) -> tuple[Fp32, Fp32]:
    bits = values.view(np.int32)
    e = (bits - _ROOT_HALF_BITS) >> _MANTISSA_BITS
    m = (bits - (e << _MANTISSA_BITS)).view(np.float32)
    return m - np.float32(1), e.astype(np.float32)


def _log1(f: Fp32, e: Fp32) -> Fp32:
    z = f * f
    y = np.full_like(f, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        y *= f
        y += coefficient
    y *= f
    y *= z
    y += e * _LN2_LOW
    y += z * _MINUS_HALF
    y += f
    y += e * _LN2_HIGH
    return y

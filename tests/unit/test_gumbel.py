"""The fp32 noise against fp64, at both ends and all between."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from kernels.sample.gumbel import (
    LUCKY,
    NEAR_ONE,
    UNLUCKY_BOUND,
    gumbel,
    gumbel_argmax,
    minus_log_uniform,
)

ENDS = 1 << 16
GRID = np.unique(
    np.concatenate(
        [
            np.arange(0, 2**32, 4099, dtype=np.int64),
            np.arange(ENDS, dtype=np.int64),
            np.arange(2**32 - ENDS, 2**32, dtype=np.int64),
            np.arange(int(NEAR_ONE) - ENDS, int(NEAR_ONE) + ENDS, dtype=np.int64),
        ]
    )
)


def minus_log_uniform_fp64(words):
    odd = 2.0 * words + 1
    return np.where(odd < 2**32, -np.log(odd / 2**33), -np.log1p(-(2.0**33 - odd) / 2**33))


def test_minus_log_of_u_is_accurate_for_all_words():
    q = minus_log_uniform(GRID.astype(np.uint32))
    assert np.max(np.abs(q / minus_log_uniform_fp64(GRID) - 1)) < 2**-22


@pytest.mark.parametrize("word", [0, 1, 2**31, int(NEAR_ONE) - 1, 2**32 - 2, 2**32 - 1])
def test_the_fp64_oracle_agrees_with_forty_decimal_digits(word):
    with localcontext() as context:
        context.prec = 40
        exact = -((Decimal(2 * word + 1) / Decimal(2**33)).ln())
    assert minus_log_uniform_fp64(np.array([word]))[0] == pytest.approx(float(exact), rel=1e-15)


def test_gumbel_noise_is_finite_and_close_to_its_formula():
    g = gumbel(GRID.astype(np.uint32))
    exact = -np.log(minus_log_uniform_fp64(GRID))
    assert np.isfinite(g).all()
    assert np.max(np.abs(g - exact) / np.maximum(np.abs(exact), 1)) < 2**-21


def test_gumbel_noise_grows_with_its_word():
    assert (np.diff(gumbel(GRID.astype(np.uint32))) >= 0).all()


def test_gumbel_noise_has_the_mean_and_variance_of_its_distribution():
    middles = np.arange(20_004, 2**32, 40_009, dtype=np.int64)
    g = gumbel(middles.astype(np.uint32)).astype(np.float64)
    assert g.mean() == pytest.approx(0.5772156649, abs=1e-4)
    assert g.var() == pytest.approx(math.pi**2 / 6, abs=1e-3)


def test_no_unlucky_word_brings_more_than_its_bound():
    unlucky = GRID[int(LUCKY) > GRID].astype(np.uint32)
    last_unlucky = np.array([LUCKY - np.uint32(1)])
    assert gumbel(unlucky).max() < UNLUCKY_BOUND
    assert gumbel(last_unlucky)[0] < UNLUCKY_BOUND


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("num_ids", [1, 2, 100, 5000])
def test_leaving_out_noise_that_cannot_matter_changes_no_choice(spread, num_ids):
    generator = np.random.default_rng(num_ids)
    for _ in range(30):
        values = (generator.standard_normal(num_ids) * spread).round(2).astype(np.float32)
        words = generator.integers(0, 2**32, num_ids, dtype=np.uint32)
        assert gumbel_argmax(values, words) == np.argmax(values + gumbel(words))

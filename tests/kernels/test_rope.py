import math

import pytest
import torch

from kernels.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    rope,
    rope_tables,
)
from tests.kernels.bits import EPS, same_bits


def test_tables_are_fp64_angles_rounded_once():
    cos, sin = rope_tables(300, 64, 10_000.0)
    assert cos.shape == sin.shape == (300, 32)
    for position, pair in [(0, 0), (1, 31), (299, 0), (299, 17)]:
        angle = position * 10_000.0 ** (-2 * pair / 64)
        assert cos[position, pair].item() == pytest.approx(math.cos(angle), rel=2 * EPS)
        assert sin[position, pair].item() == pytest.approx(math.sin(angle), rel=2 * EPS, abs=1e-15)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_pair_turns_as_a_complex_number(ops, head_dim):
    x, positions = torch.randn(17, 3, head_dim), torch.randint(0, 200, (17,))
    out = ops.rope(x, positions, *rope_tables(200, head_dim, 10_000.0))

    half = head_dim // 2
    speeds = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(17, half, dtype=torch.float64), positions[:, None] * speeds)
    exact = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn[:, None]
    error = torch.cat((exact.real, exact.imag), dim=-1) - out
    assert error.abs().max() <= 8 * EPS * x.abs().max()


def test_a_row_alone_has_the_bits_it_has_in_any_batch(ops, everywhere):
    x, positions = torch.randn(37, 3, 64), torch.randperm(37)
    tables = rope_tables(37, 64, 10_000.0)
    together = everywhere(lambda: ops.rope(x, positions, *tables))
    for row in range(37):
        one = slice(row, row + 1)
        assert same_bits(ops.rope(x[one], positions[one], *tables)[0], together[row])


@pytest.mark.parametrize("position", [-1, 8])
def test_a_position_outside_the_tables_is_refused(position):
    with pytest.raises(ValueError, match=r"^positions must be in 0\.\.7"):
        rope(torch.zeros(1, 1, 4), torch.tensor([position]), *rope_tables(8, 4, 10_000.0))


def speeds_of(scaling, theta=10_000.0):
    """Radians per token and pair, from the first position's angle."""
    cos, sin = rope_tables(2, 64, theta, scaling)
    return torch.atan2(sin[1].double(), cos[1].double())


PLAIN = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)


def test_linear_scaling_slows_every_pair():
    torch.testing.assert_close(speeds_of(LinearScaling(4.0)), PLAIN / 4, rtol=1e-6, atol=0)


def test_frequency_factors_slow_each_pair_by_its_own():
    factors = torch.linspace(1, 8, 32, dtype=torch.float64)
    scaling = FrequencyFactors(tuple(factors.tolist()))
    torch.testing.assert_close(speeds_of(scaling), PLAIN / factors, rtol=1e-6, atol=0)


def test_llama3_scaling_keeps_fast_pairs_slows_slow_ones_and_mixes_between():
    share = speeds_of(Llama3Scaling(8.0, 1.0, 4.0, original_context=1024)) / PLAIN
    turns = PLAIN * 1024 / (2 * math.pi)
    between = (turns > 1) & (turns < 4)
    ones = torch.ones(32, dtype=torch.float64)
    torch.testing.assert_close(share[turns >= 4], ones[turns >= 4], rtol=1e-6, atol=0)
    torch.testing.assert_close(share[turns <= 1], ones[turns <= 1] / 8, rtol=1e-6, atol=0)
    assert between.sum() >= 3
    kept = (turns[between] - 1) / 3
    torch.testing.assert_close(share[between], kept + (1 - kept) / 8, rtol=1e-6, atol=0)


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_scales_the_tables():
    scaling = YarnScaling(factor=8.0, original_context=1024, amplitude=1.25)
    share = speeds_of(scaling) / PLAIN
    first = math.floor(32 * math.log(1024 / (2 * math.pi * 32)) / math.log(10_000))
    last = math.ceil(32 * math.log(1024 / (2 * math.pi)) / math.log(10_000))
    assert 0 < first < last < 31
    slowed = ((torch.arange(32, dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    torch.testing.assert_close(share, 1 - slowed + slowed / 8, rtol=1e-6, atol=0)
    cos, sin = rope_tables(5, 64, 10_000.0, scaling)
    torch.testing.assert_close(cos**2 + sin**2, torch.full((5, 32), 1.25**2))

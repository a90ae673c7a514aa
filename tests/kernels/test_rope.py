import math

import pytest
import torch

from kernels.rope import rope, rope_tables
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

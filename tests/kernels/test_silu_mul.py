import pytest
import torch

from kernels import _native
from tests.kernels.bits import EPS, same_bits


def exact_silu(x: torch.Tensor) -> torch.Tensor:
    return x.double() / (1 + torch.exp(-x.double()))


@pytest.mark.parametrize("shape", [(1, 1), (1, 1536), (17, 33), (9, 2000)])
def test_silu_mul_is_close_to_fp64(ops, everywhere, shape):
    gate, up = torch.randn(shape) * 10, torch.randn(shape)
    out = everywhere(lambda: ops.silu_mul(gate, up))
    exact = exact_silu(gate) * up
    assert ((out.double() - exact).abs() <= 10 * EPS * exact.abs()).all()


def test_silu_is_close_to_fp64_over_the_whole_range_of_exp(ops, everywhere):
    gate = torch.linspace(-120, 120, 100_001)[None]
    out = everywhere(lambda: ops.silu_mul(gate, torch.ones_like(gate)))
    exact = exact_silu(gate)
    assert ((out.double() - exact).abs() <= 10 * EPS * exact.abs() + 2e-36).all()


def test_an_element_has_the_same_bits_wherever_it_stands(ops):
    gate, up = torch.randn(23, 1111), torch.randn(23, 1111)
    together = ops.silu_mul(gate, up)
    for row in range(23):
        alone = ops.silu_mul(gate[row : row + 1, row:].contiguous(), up[row : row + 1, row:])
        assert same_bits(alone[0], together[row, row:])


def test_special_values_show(ops):
    gate = torch.tensor([[torch.nan, torch.inf, 0.0, -200.0]])
    out = ops.silu_mul(gate, torch.ones(1, 4))
    assert out[0, 0].isnan()
    assert out[0, 1:].tolist() == [torch.inf, 0.0, 0.0]


def test_native_silu_mul_writes_every_output():
    out = torch.full((3, 3001), torch.nan)
    _native.silu_mul(torch.randn(3, 3001), torch.randn(3, 3001), out)
    assert not out.isnan().any()


def test_native_silu_mul_refuses_unequal_shapes():
    with pytest.raises(ValueError, match=r"^up must have shape"):
        _native.silu_mul(torch.zeros(2, 8), torch.zeros(2, 7), torch.zeros(2, 8))

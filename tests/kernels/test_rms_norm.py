import pytest
import torch

from kernels import _native
from tests.kernels.bits import EPS, same_bits


@pytest.mark.parametrize("shape", [(1, 576), (1, 1), (17, 33), (40, 128)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_rms_norm_is_within_the_rounding_bound_of_fp64(ops, everywhere, shape, size):
    x, weight = torch.randn(shape) * size, torch.randn(shape[1])
    out = everywhere(lambda: ops.rms_norm(x, weight, 1e-5))

    wide = x.double()
    exact = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight
    assert ((out.double() - exact).abs() <= (shape[1] / 2 + 8) * EPS * exact.abs()).all()


def test_a_row_alone_has_the_bits_it_has_in_any_batch(ops):
    x, weight = torch.randn(37, 100), torch.randn(100)
    x[9] = torch.nan
    x[10] = 1e30
    together = ops.rms_norm(x, weight, 1e-5)
    assert together[9].isnan().all()
    assert not together[8].isnan().any()
    for row in range(37):
        if row != 9:
            assert same_bits(ops.rms_norm(x[row : row + 1], weight, 1e-5)[0], together[row])


def test_native_rms_norm_writes_every_output():
    out = torch.full((3, 37), torch.nan)
    _native.rms_norm(torch.randn(3, 37), torch.randn(37), 1e-5, out)
    assert not out.isnan().any()


def test_native_rms_norm_refuses_a_weight_of_another_width():
    with pytest.raises(ValueError, match=r"^weight must have shape"):
        _native.rms_norm(torch.zeros(2, 8), torch.zeros(9), 1e-5, torch.zeros(2, 8))

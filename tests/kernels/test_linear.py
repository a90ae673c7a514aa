import pytest
import torch

from kernels import _native
from tests.kernels.bits import EPS, same_bits

SHAPES = [(1, 16, 4), (1, 576, 192), (3, 7, 5), (6, 64, 33), (17, 100, 37), (113, 48, 70)]
DTYPES = [torch.float32, torch.bfloat16]


def operands(rows, inputs, outputs, dtype=torch.float32):
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).to(dtype)
    return x, weight, torch.randn(outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_within_the_rounding_bound_of_fp64(ops, everywhere, shape, dtype):
    x, weight, bias = operands(*shape, dtype)
    out = everywhere(lambda: ops.linear(x, weight, bias))

    wide_x, wide_weight = x.to(dtype).double(), weight.double()
    exact = wide_x @ wide_weight.T + bias.double()
    magnitude = wide_x.abs() @ wide_weight.abs().T + bias.double().abs()
    assert ((out.double() - exact).abs() <= (shape[1] + 2) * EPS * magnitude).all()


def test_bf16_weights_round_the_input_but_not_the_output(ops):
    x = torch.tensor([[1.0 + 2**-9, 3.0]])  # 1 + 2^-9 lies between two bf16 numbers; even is 1
    weight = torch.tensor([[1.0, 2**-9]]).to(torch.bfloat16)
    assert ops.linear(x, weight).item() == 1.0 + 3 * 2**-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_in_any_batch(ops, dtype):
    x, weight, bias = operands(37, 100, 50, dtype)
    together = ops.linear(x, weight, bias)
    order = torch.randperm(37)
    assert same_bits(ops.linear(x[order], weight, bias), together[order])
    for rows in (1, 2, 5, 16, 23):
        assert same_bits(ops.linear(x[:rows], weight, bias), together[:rows])
    for row in range(37):
        assert same_bits(ops.linear(x[row : row + 1], weight, bias)[0], together[row])


def test_nan_in_a_row_shows_in_that_row_only(ops):
    x, weight, bias = operands(20, 33, 9)
    clean = ops.linear(x, weight, bias)
    x[4, 32] = torch.nan
    out = ops.linear(x, weight, bias)
    assert out[4].isnan().all()
    others = torch.arange(20) != 4
    assert same_bits(out[others], clean[others])


def test_nan_in_a_weight_row_shows_in_that_output_only(ops):
    x, weight, bias = operands(5, 33, 9)
    weight[7, 0] = torch.nan
    assert ops.linear(x, weight, bias).isnan().all(dim=0).tolist() == [n == 7 for n in range(9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_native_linear_writes_every_output(shape):
    x, weight, _ = operands(*shape)
    out = torch.full((shape[0], shape[2]), torch.nan)
    _native.linear(x, weight, None, out)
    assert not out.isnan().any()


def test_no_rows_give_no_rows(ops):
    assert ops.linear(torch.empty(0, 8), torch.randn(4, 8)).shape == (0, 4)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x", torch.zeros(2, 8, dtype=torch.float64)),
        ("x", torch.zeros(2, 16)[:, ::2]),
        ("x", torch.zeros(8)),
        ("weight", torch.zeros(4, 9)),
        ("weight", torch.zeros(4, 8, dtype=torch.float16)),
        ("bias", torch.zeros(5)),
        ("out", torch.zeros(2, 5)),
    ],
)
def test_native_linear_refuses_what_does_not_fit_by_name(argument, value):
    arguments = {
        "x": torch.zeros(2, 8),
        "weight": torch.zeros(4, 8),
        "bias": torch.zeros(4),
        "out": torch.zeros(2, 4),
    }
    with pytest.raises(ValueError, match=f"^{argument} must"):
        _native.linear(**(arguments | {argument: value}))

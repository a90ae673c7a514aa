import pytest
import torch

from kernels import _native
from kernels.linear.reference import _cut
from kernels.packed_matrix import pack_floats
from tests.kernels.bits import EPS, same_bits
from tests.kernels.conftest import all_ops
from tests.kernels.matrices import KINDS

SHAPES = [(1, 16, 4), (1, 576, 192), (3, 7, 5), (6, 64, 33), (17, 100, 37), (113, 256, 70)]


def operands(kind, rows, inputs, outputs):
    return torch.randn(rows, inputs), KINDS[kind](outputs, inputs), torch.randn(outputs)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_within_the_rounding_bound_of_fp64(ops, everywhere, shape, kind):
    x, weight, bias = operands(kind, *shape)
    out = everywhere(lambda: ops.linear(x, weight, bias))

    wide_x = _cut(torch.nn.functional.pad(x, (0, weight.padded_inputs - weight.inputs)), weight)
    exact = wide_x.double() @ weight.unpacked.double().T + bias.double()
    # Zeros and minimums enter as products of their own: count them with the weights.
    magnitude = wide_x.double().abs() @ _magnitudes(weight).T + bias.double().abs()
    assert ((out.double() - exact).abs() <= (weight.padded_inputs + 8) * EPS * magnitude).all()


@pytest.mark.parametrize("kind", ["int8-rotated"])
def test_of_millions_of_inputs_none_is_cut_to_another_integer_than_the_reference_s(kind):
    x, weight, bias = operands(kind, 8192, 576, 32)
    wide_x = _cut(torch.nn.functional.pad(x, (0, weight.padded_inputs - weight.inputs)), weight)
    exact = (wide_x.double() @ weight.unpacked.double().T + bias.double()).float()
    out = all_ops("cpu").linear(x, weight, bias)
    assert torch.allclose(out, exact, rtol=0, atol=1e-5 * exact.abs().max())


def _magnitudes(weight):
    if weight.offsets == "none":
        return weight.unpacked.double().abs()
    groups = weight.unpacked.unflatten(1, (-1, weight.group)).abs()
    return groups.amax(dim=2, keepdim=True).expand_as(groups).flatten(1).double() * 16


def test_bf16_weights_round_the_input_but_not_the_output(ops):
    x = torch.tensor([[1.0 + 2**-9, 3.0]])  # 1 + 2^-9 lies between two bf16 numbers; even is 1
    weight = pack_floats(torch.tensor([[1.0, 2**-9]]), torch.bfloat16)
    assert ops.linear(x, weight).item() == 1.0 + 3 * 2**-9


def test_a_row_alone_has_the_bits_it_has_in_any_batch(ops, kind):
    x, weight, bias = operands(kind, 37, 128, 50)
    together = ops.linear(x, weight, bias)
    order = torch.randperm(37)
    assert same_bits(ops.linear(x[order], weight, bias), together[order])
    for rows in (1, 2, 5, 16, 23):
        assert same_bits(ops.linear(x[:rows], weight, bias), together[:rows])
    for row in range(37):
        assert same_bits(ops.linear(x[row : row + 1], weight, bias)[0], together[row])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_nan_or_infinity_has_no_number_and_the_others_keep_theirs(ops, kind, value):
    x, weight, bias = operands(kind, 20, 128, 9)
    clean = ops.linear(x, weight, bias)
    x[4, 32] = value
    out = ops.linear(x, weight, bias)
    assert not out[4].isfinite().any()
    others = torch.arange(20) != 4
    assert same_bits(out[others], clean[others])


def test_a_row_of_zeros_gives_zeros(ops, kind):
    _, weight, _ = operands(kind, 1, 128, 9)
    assert not ops.linear(torch.zeros(2, 128), weight).any()


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e4, 1e25])
def test_inputs_of_any_magnitude_keep_their_precision(ops, kind, scale):
    x, weight, _ = operands(kind, 4, 128, 40)
    out, scaled = ops.linear(x, weight), ops.linear(x * scale, weight)
    assert torch.allclose(scaled, out * scale, rtol=0, atol=float(out.abs().amax()) * scale * 2e-2)


def test_nan_in_a_weight_row_shows_in_that_output_only(ops):
    weight = torch.randn(9, 33)
    weight[7, 0] = torch.nan
    out = ops.linear(torch.randn(5, 33), pack_floats(weight, torch.float32))
    assert out.isnan().all(dim=0).tolist() == [n == 7 for n in range(9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_native_linear_writes_every_output(shape, kind):
    x, weight, _ = operands(kind, *shape)
    out = torch.full((shape[0], shape[2]), torch.nan)
    _native.linear(x, weight.native, None, out)
    assert not out.isnan().any()


def test_no_rows_give_no_rows(ops, kind):
    assert ops.linear(torch.empty(0, 128), KINDS[kind](4, 128)).shape == (0, 4)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x", torch.zeros(2, 8, dtype=torch.float64)),
        ("x", torch.zeros(2, 16)[:, ::2]),
        ("x", torch.zeros(2, 9)),
        ("x", torch.zeros(8)),
        ("bias", torch.zeros(5)),
        ("out", torch.zeros(2, 5)),
    ],
)
def test_native_linear_refuses_what_does_not_fit_by_name(argument, value):
    arguments = {
        "x": torch.zeros(2, 8),
        "weight": KINDS["f32"](4, 8).native,
        "bias": torch.zeros(4),
        "out": torch.zeros(2, 4),
    }
    with pytest.raises(ValueError, match=f"^{argument} must"):
        _native.linear(**(arguments | {argument: value}))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("format", "int2"),
        ("reads", "bf16"),
        ("offsets", "some"),
        ("outputs", 0),
        ("width", 65),
        ("inputs", 96),
        ("group", 16),
        ("data", torch.zeros(2, 64 * 32 + 64, dtype=torch.uint8)),
    ],
)
def test_a_matrix_that_does_not_fit_its_data_is_refused_by_name(argument, value):
    arguments = {
        "format": "int8",
        "reads": "int8",
        "offsets": "none",
        "bf16_scales": False,
        "rotated": True,
        "outputs": 20,
        "width": 60,
        "inputs": 64,
        "group": 64,
        "data": torch.zeros(1, 64 * 32 + 64, dtype=torch.uint8),
    }
    with pytest.raises(ValueError, match=f"^{argument} must"):
        _native.make_matrix(**(arguments | {argument: value}))


@pytest.mark.parametrize("ahead", [(0, False), (2048, False), (8192, False), (2048, True)])
def test_weights_fetched_ahead_change_no_bit(everywhere, kind, ahead):
    x, weight, _ = operands(kind, 37, 128, 500)

    def some_rows():
        out = torch.empty(1, 500), torch.empty(5, 500), torch.empty(37, 500)
        for each in out:
            _native.linear(x[: len(each)], weight.native, None, each)
        return torch.cat(out)

    usual, expected = _native.fetch_ahead(), some_rows()
    _native.set_fetch_ahead([_native.Ahead(*ahead)] * len(usual))
    try:
        assert same_bits(everywhere(some_rows), expected)
    finally:
        _native.set_fetch_ahead(usual)

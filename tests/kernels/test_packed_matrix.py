import pytest
import torch

from kernels.packed_matrix import pack_floats, pack_quantized, pack_rotated_int8, quantize_int4
from kernels.quantized import QuantizedMatrix, stacked
from kernels.rotation import ROTATION, rotate
from tests.kernels.matrices import blocks

SHAPES = [(1, 64), (33, 100), (70, 576)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_floats_come_back_as_they_were_put_in_and_padding_is_zero(shape, dtype):
    weight = torch.randn(shape)
    packed = pack_floats(weight, dtype)
    assert torch.equal(packed.unpacked[:, : shape[1]], weight.to(dtype).float())
    assert not packed.unpacked[:, shape[1] :].any()
    assert packed.weight_bytes == weight.numel() * dtype.itemsize


@pytest.mark.parametrize("offsets", ["none", "zeros", "minimums"])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoints_blocks_mean_the_same_after_packing(bits, group, offsets):
    matrix = blocks(70, 768, bits, group, offsets)
    packed = pack_quantized(matrix)
    assert packed.offsets == offsets
    assert torch.equal(packed.unpacked, matrix.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_to_rotated_8_bits_is_off_by_half_a_step_at_most(shape):
    weight = torch.randn(shape) * torch.logspace(-6, 2, shape[1])
    packed = pack_rotated_int8(weight)
    rotated = rotate(torch.nn.functional.pad(weight, (0, packed.padded_inputs - shape[1])))
    groups = (rotated / ROTATION).unflatten(1, (-1, ROTATION))
    error = (packed.unpacked.unflatten(1, (-1, ROTATION)) - groups).abs()
    step = groups.abs().amax(dim=2, keepdim=True) / 127
    assert (error <= 0.51 * step + 127 * step * 2**-8).all()


def test_rounding_to_4_bits_is_off_by_half_a_step_at_most():
    weight = torch.randn(40, 96)
    matrix = quantize_int4(weight)
    groups = weight.unflatten(1, (-1, 32))
    step = (groups.amax(dim=2) - groups.amin(dim=2)).repeat_interleave(32, dim=1) / 15
    assert ((matrix.dequantize() - weight).abs() <= 0.52 * step + 2e-3).all()


def test_a_constant_or_empty_group_survives_rounding():
    assert torch.equal(
        quantize_int4(torch.full((2, 32), 0.5)).dequantize(), torch.full((2, 32), 0.5)
    )
    assert not pack_rotated_int8(torch.zeros(3, 64)).unpacked.any()


def test_tiny_scales_are_not_lost():
    packed = pack_rotated_int8(torch.randn(4, 64) * 1e-7)
    assert packed.scale_dtype == "bf16"
    assert packed.unpacked.abs().amax() > 0


def test_a_group_that_is_no_multiple_of_32_is_refused():
    with pytest.raises(ValueError, match=r"^group must be a multiple of 32, not 16"):
        pack_quantized(blocks(4, 64, 4, 16, "none"))


@pytest.mark.parametrize("offsets", ["zeros", "minimums"])
def test_rows_are_put_in_any_order_with_rows_of_zeros_between(offsets):
    matrix = blocks(5, 64, 4, 32, offsets)
    rows = matrix.rows(torch.tensor([3, -1, 0]))
    assert torch.equal(rows.dequantize()[[0, 2]], matrix.dequantize()[[3, 0]])
    assert not rows.dequantize()[1].any()


def test_matrices_of_one_kind_are_stacked_and_others_are_not():
    first, second = blocks(5, 64, 4, 32, "zeros"), blocks(3, 64, 4, 32, "zeros")
    both = stacked([first, second])
    assert isinstance(both, QuantizedMatrix)
    assert torch.equal(both.dequantize(), torch.cat((first.dequantize(), second.dequantize())))
    assert stacked([first, blocks(3, 64, 4, 32, "minimums")]) is None
    assert stacked([first, blocks(3, 64, 8, 32, "zeros")]) is None


def test_rotating_twice_multiplies_by_the_block_size():
    x = torch.randn(7, 128)
    assert torch.allclose(rotate(rotate(x)) / ROTATION, x, atol=1e-6)

"""Quantized matrices of every format against integers packed by the formats' own definitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import ModelError
from engine.model.checkpoint_formats import checkpoint_tensors
from engine.model.hf_folder import FolderTensor, folder_tensors
from engine.model.weights import StoredTensor
from tests.quantized_checkpoints import (
    Integers,
    Tensors,
    awq,
    awq_config,
    compressed_config,
    gptq,
    gptq_config,
    int_quantized,
    pack_quantized,
    random_integers,
    scattered,
    without_zero_points_of_0,
)

NAMES = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}
GROUPS = (32, 64, 128, None)
MATRIX = "layer.proj"


def read(
    config: Mapping[str, Any], parts: Tensors, wanted: tuple[str, ...] = ()
) -> dict[str, StoredTensor]:
    tensors = {}
    for suffix, tensor in parts.items():
        name = f"{MATRIX}.{suffix}"
        tensors[name] = FolderTensor(
            name, NAMES[tensor.dtype], tuple(tensor.shape), lambda found=tensor: found
        )
    return checkpoint_tensors({"quantization_config": config}, tensors, wanted)


def refused(config: Mapping[str, Any], parts: Tensors) -> str:
    """What is said when the matrix is found or read."""
    with pytest.raises(ModelError) as caught:
        read(config, parts)[f"{MATRIX}.weight"].read()
    return str(caught.value)


def matrix(config: Mapping[str, Any], parts: Tensors) -> StoredTensor:
    stored = read(config, parts)
    assert list(stored) == [f"{MATRIX}.weight"]
    return stored[f"{MATRIX}.weight"]


def assert_reads(stored: StoredTensor, known: Integers) -> None:
    """The same integers, and the same weights to the bit, read either way."""
    assert stored.shape == known.values.shape
    assert stored.quantized is not None
    found = stored.quantized()
    assert (found.bits, found.group) == (known.bits, known.group)
    assert found.values.dtype is torch.uint8
    assert np.array_equal(found.values.numpy(), known.values)
    assert torch.equal(found.scales, known.scales.to(torch.float32))
    assert found.zeros is not None
    assert np.array_equal(found.zeros.numpy(), known.zeros)
    assert same_bits(stored.read(), found.dequantize())
    assert torch.equal(stored.read(), known.weights())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


@st.composite
def cases(draw: st.DrawFn, bits: tuple[int, ...] = (4, 8)) -> tuple[Integers, int | None]:
    """A matrix and its group size, None for one scale per row."""
    group = draw(st.sampled_from(GROUPS))
    rows = 8 * draw(st.integers(1, 5))
    columns = draw(st.integers(1, 3)) * (group or 8)
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    known = random_integers(
        draw(st.integers(0, 2**32)),
        (rows, columns),
        draw(st.sampled_from(bits)),
        group or columns,
        symmetric=draw(st.booleans()),
        dtype=dtype,
    )
    return known, group


@settings(deadline=None)
@given(case=cases(), version=st.sampled_from((1, 2)), with_columns=st.booleans())
def test_gptq_matrices_are_the_integers_that_were_packed(
    case: tuple[Integers, int | None], version: int, with_columns: bool
) -> None:
    known, group = case
    kind = {1: "gptq", 2: "gptq_v2"}[version]
    known = without_zero_points_of_0(known) if version == 1 else known
    parts = gptq(known, version)
    if not with_columns:
        del parts["g_idx"]
    config = gptq_config(known.bits, -1 if group is None else group, checkpoint_format=kind)
    assert_reads(matrix(config, parts), known)


@settings(deadline=None)
@given(case=cases(bits=(4,)))
def test_awq_matrices_are_the_integers_that_were_packed(case: tuple[Integers, int | None]) -> None:
    known, group = case
    config = awq_config(-1 if group is None else group)
    assert_reads(matrix(config, awq(known)), known)


@settings(deadline=None)
@given(case=cases(), cut=st.integers(0, 7))
def test_packed_matrices_are_the_integers_that_were_packed(
    case: tuple[Integers, int | None], cut: int
) -> None:
    """``cut`` leaves the last word of the zero points not full."""
    known, group = case
    rows = len(known.values) - cut
    known = Integers(
        known.bits, known.values[:rows], known.scales[:rows], known.zeros[:rows], known.columns
    )
    symmetric = bool((known.zeros == 2 ** (known.bits - 1)).all())
    config = compressed_config("pack-quantized", known.bits, group, symmetric)
    assert_reads(matrix(config, pack_quantized(known, symmetric=symmetric)), known)


@settings(deadline=None)
@given(case=cases(bits=(8,)))
def test_int8_matrices_are_the_integers_that_were_stored(
    case: tuple[Integers, int | None],
) -> None:
    known, group = case
    symmetric = bool((known.zeros == 128).all())
    config = compressed_config("int-quantized", 8, group, symmetric)
    assert_reads(matrix(config, int_quantized(known, symmetric=symmetric)), known)


def test_rows_that_do_not_fill_their_words_are_read_without_the_rest() -> None:
    known = random_integers(1, (5, 13), 4, 13)
    parts = pack_quantized(known, symmetric=False)
    assert parts["weight_packed"].shape == (5, 2)
    assert_reads(matrix(compressed_config("pack-quantized", 4, None, False), parts), known)


def test_version_2_of_gptq_has_every_zero_point() -> None:
    known = random_integers(2, (16, 64), 4, 32)
    known.zeros[:, 0] = range(16)
    config = gptq_config(4, 32, checkpoint_format="gptq_v2")
    assert_reads(matrix(config, gptq(known, version=2)), known)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_that_programs_read_differently_is_refused(bits: int) -> None:
    known = random_integers(3, (8, 64), bits, 32)
    known.zeros[3, 1] = 2**bits - 1  # all ones, whatever was meant by it
    said = refused(gptq_config(bits, 32), gptq(known, version=2))
    assert f"{MATRIX}.qzeros holds zero point {2**bits - 1}; 0 to {2**bits - 2}" in said


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_scattered_columns_are_read_in_the_columns_own_order(
    bits: int, symmetric: bool
) -> None:
    known = random_integers(4, (16, 128), bits, 32, symmetric=symmetric)
    known = scattered(without_zero_points_of_0(known))
    packed = pack_quantized(known, symmetric=symmetric, ordered=True)
    ordered = compressed_config("pack-quantized", bits, 32, symmetric, actorder="group")
    for config, parts in (
        (gptq_config(bits, 32, desc_act=True), gptq(known)),
        (gptq_config(bits, 32, desc_act=False), gptq(known)),
        (ordered, packed),
    ):
        stored = matrix(config, parts)
        assert stored.quantized is None
        assert torch.equal(stored.read(), known.weights())


def test_columns_in_order_are_mapped_directly_whatever_the_config_says() -> None:
    known = without_zero_points_of_0(random_integers(5, (16, 128), 4, 32))
    assert_reads(matrix(gptq_config(4, 32, desc_act=True), gptq(known)), known)
    for order in ("group", "dynamic"):
        parts = pack_quantized(known, symmetric=False, ordered=True)
        config = compressed_config("pack-quantized", 4, 32, False, actorder=order)
        assert_reads(matrix(config, parts), known)
    for order in ("weight", "static"):
        parts = pack_quantized(known, symmetric=False)
        config = compressed_config("pack-quantized", 4, 32, False, actorder=order)
        assert_reads(matrix(config, parts), known)


def test_each_module_has_the_scheme_that_its_tensors_fit() -> None:
    small = random_integers(6, (8, 128), 4, 32, symmetric=True)
    large = random_integers(7, (8, 128), 8, 128)
    one = compressed_config("mixed-precision", 4, 32, True)
    other = compressed_config("mixed-precision", 8, None, False)
    group, second = one["config_groups"]["group_0"], other["config_groups"]["group_0"]
    one["config_groups"] = {
        "group_0": group | {"format": "pack-quantized"},
        "group_1": second | {"format": "int-quantized"},
        "group_2": second | {"format": "pack-quantized"},
        "group_3": {"format": "dense"},
    }
    assert_reads(matrix(one, pack_quantized(small, symmetric=True)), small)
    assert_reads(matrix(one, int_quantized(large, symmetric=False)), large)
    assert_reads(matrix(one, pack_quantized(large, symmetric=False)), large)


def test_a_module_that_fits_no_scheme_is_refused_by_what_the_first_one_misses() -> None:
    config = compressed_config("pack-quantized", 4, 32, True)
    other = compressed_config("pack-quantized", 8, None, True)
    config["config_groups"]["group_1"] = other["config_groups"]["group_0"]
    known = random_integers(15, (8, 128), 4, 64, symmetric=True)
    said = refused(config, pack_quantized(known, symmetric=True))
    assert f"tensor {MATRIX}.weight_scale has shape (8, 2), not (8, 4)" in said


def test_activations_quantized_on_the_fly_change_nothing() -> None:
    known = random_integers(8, (8, 64), 8, 64, symmetric=True)
    config = compressed_config("int-quantized", 8, None, True)
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    config["config_groups"]["group_0"]["input_activations"] = activations
    assert_reads(matrix(config, int_quantized(known, symmetric=True)), known)


def test_a_dense_module_beside_quantized_ones_is_read_as_it_is() -> None:
    weight = torch.randn(8, 32).to(torch.bfloat16)
    for config in (gptq_config(4, 32), awq_config(32)):
        stored = matrix(config, {"weight": weight})
        assert stored.quantized is None
        assert torch.equal(stored.read(), weight.to(torch.float32))


def test_a_bias_is_kept_where_the_model_has_one_and_dropped_if_it_is_of_zeros() -> None:
    parts = gptq(without_zero_points_of_0(random_integers(9, (8, 32), 4, 32)))
    zero, other = torch.zeros(8, dtype=torch.float16), torch.ones(8, dtype=torch.float16)
    bias, config = f"{MATRIX}.bias", gptq_config(4, 32)
    assert bias not in read(config, parts | {"bias": zero})
    assert bias in read(config, parts | {"bias": zero}, (bias,))
    assert bias in read(config, parts | {"bias": other})
    assert bias in read(config, {"bias": zero})
    with pytest.raises(ModelError, match=f"{bias} has dtype I8"):
        read(config, parts | {"bias": zero.to(torch.int8)})


def test_the_same_bytes_of_another_format_are_other_weights_to_the_digest() -> None:
    known = without_zero_points_of_0(random_integers(10, (32, 32), 4, 32))
    parts = gptq(known)
    del parts["g_idx"]
    configs = (
        gptq_config(4, 32),
        gptq_config(4, 32, checkpoint_format="gptq_v2"),
        gptq_config(4, -1),
    )
    digests = [bytes(matrix(config, parts).stored()) for config in configs]
    assert digests[0] != digests[1]
    assert digests[0] == bytes(matrix(gptq_config(4, 32, sym=True), parts).stored())
    changed = parts | {"scales": parts["scales"] * 2}
    assert bytes(matrix(configs[0], changed).stored()) != digests[0]


# -- what is refused

METHODS = [
    ("fp8", {}),
    ("bitsandbytes", {"load_in_4bit": True}),
    ("auto-round", {}),
    (None, {}),
    (7, {}),
]


@pytest.mark.parametrize(("method", "more"), METHODS)
def test_other_methods_are_refused_by_name(method: object, more: dict[str, Any]) -> None:
    said = refused({"quant_method": method} | more, {})
    assert f"quantization_config.quant_method {method!r} is not supported" in said
    assert "awq, compressed-tensors, gptq" in said


@pytest.mark.parametrize("config", ["gptq", [], 7, True])
def test_a_config_that_is_no_object_is_refused(config: Any) -> None:
    assert "quantization_config is" in refused(config, {})


GPTQ_SETTINGS = [
    ({"bits": 3}, "quantization_config.bits 3 is not supported; supported: 4, 8"),
    ({"bits": 2}, "bits 2"),
    ({"bits": True}, "bits True"),
    ({"bits": "4"}, "bits '4'"),
    ({"bits": None}, "bits None"),
    ({"group_size": 16}, "group_size 16 is not supported; supported: 32, 64, 128, -1"),
    ({"group_size": 0}, "group_size 0"),
    ({"group_size": -2}, "group_size -2"),
    ({"group_size": 32.0}, "group_size 32.0"),
    ({"group_size": None}, "group_size None"),
    ({"desc_act": "yes"}, "desc_act 'yes'"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({"checkpoint_format": None, "format": "bitblas"}, "format 'bitblas'"),
    ({"is_marlin_format": True}, "is_marlin_format True"),
    ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
    ({"dynamic": [1]}, "dynamic"),
]


@pytest.mark.parametrize(("changes", "said"), GPTQ_SETTINGS)
def test_other_settings_of_gptq_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    assert said in refused(gptq_config(4, 32) | changes, {})


def test_gptq_modules_that_a_rule_leaves_as_they_are_need_no_support() -> None:
    known = without_zero_points_of_0(random_integers(11, (8, 32), 4, 32))
    config = gptq_config(4, 32, dynamic={"-:.*lm_head.*": {}})
    assert_reads(matrix(config, gptq(known)), known)


AWQ_SETTINGS = [
    ({"version": "gemv"}, "version 'gemv' is not supported; supported: gemm"),
    ({"version": "marlin"}, "version 'marlin'"),
    ({"version": None, "format": "llm-awq"}, "format 'llm-awq'"),
    ({"bits": 8}, "bits 8"),
    ({"bits": None, "w_bit": 3}, "w_bit 3"),
    ({"zero_point": False}, "zero_point False"),
    ({"group_size": None, "q_group_size": 256}, "q_group_size 256"),
]


@pytest.mark.parametrize(("changes", "said"), AWQ_SETTINGS)
def test_other_settings_of_awq_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    assert said in refused(awq_config(32) | changes, {})


def test_awq_settings_under_their_older_names_are_read() -> None:
    known = random_integers(12, (8, 64), 4, 32)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    assert_reads(matrix(config, awq(known)), known)


WEIGHTS = [
    ({"num_bits": 2}, "group_0.weights.num_bits 2 is not supported; supported: 4, 8"),
    ({"type": "float"}, "group_0.weights.type 'float'"),
    ({"strategy": "tensor"}, "strategy 'tensor' is not supported; supported: channel, group"),
    ({"strategy": "block"}, "strategy 'block'"),
    ({"strategy": None}, "strategy None"),
    ({"group_size": 256}, "group_size 256"),
    ({"group_size": None}, "group_size None"),
    ({"symmetric": "no"}, "symmetric 'no'"),
    ({"dynamic": True}, "dynamic True"),
    ({"actorder": "random"}, "actorder 'random'"),
]


@pytest.mark.parametrize(("changes", "said"), WEIGHTS)
def test_other_weights_of_compressed_tensors_are_refused_by_name(
    changes: dict[str, Any], said: str
) -> None:
    config = compressed_config("pack-quantized", 4, 32, True)
    config["config_groups"]["group_0"]["weights"] |= changes
    assert said in refused(config, {})


STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
GROUP_SETTINGS = [
    ({"input_activations": STATIC}, "input_activations.dynamic False is not supported"),
    ({"input_activations": STATIC | {"type": "float"}}, "input_activations.type 'float'"),
    ({"input_activations": STATIC | {"num_bits": 4}}, "input_activations.num_bits 4"),
    ({"output_activations": STATIC}, "output_activations"),
    ({"weights": None}, "group_0.weights is None, not an object"),
    ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
]


@pytest.mark.parametrize(("changes", "said"), GROUP_SETTINGS)
def test_other_groups_of_compressed_tensors_are_refused_by_name(
    changes: dict[str, Any], said: str
) -> None:
    config = compressed_config("pack-quantized", 4, 32, True)
    config["config_groups"]["group_0"] |= changes
    assert said in refused(config, {})


TOP_SETTINGS = [
    ({"format": "float-quantized"}, "quantization_config.format 'float-quantized'"),
    ({"format": "marlin-24"}, "format 'marlin-24'"),
    ({"format": "mixed-precision"}, "format 'mixed-precision'"),
    ({"format": None}, "format None"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ({"transform_config": {"config_groups": {"R3": {}}}}, "transform_config"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format"),
    ({"config_groups": None}, "config_groups is None"),
    ({"config_groups": {"W8A8": ["Linear"]}}, "config_groups.W8A8 is ['Linear']"),
]


@pytest.mark.parametrize(("changes", "said"), TOP_SETTINGS)
def test_other_formats_of_compressed_tensors_are_refused_by_name(
    changes: dict[str, Any], said: str
) -> None:
    assert said in refused(compressed_config("pack-quantized", 4, 32, True) | changes, {})


def test_int8_storage_of_4_bits_is_refused_by_name() -> None:
    said = refused(compressed_config("int-quantized", 4, 32, True), {})
    assert "num_bits 4 is not supported; supported: 8" in said


KNOWN = without_zero_points_of_0(random_integers(13, (16, 96), 4, 32))
GPTQ = (gptq_config(4, 32), gptq(KNOWN))
AWQ = (awq_config(32), awq(KNOWN))
PACKED = (
    compressed_config("pack-quantized", 4, 32, False),
    pack_quantized(KNOWN, symmetric=False),
)
ORDERED = (
    compressed_config("pack-quantized", 4, 32, False, actorder="group"),
    pack_quantized(KNOWN, symmetric=False, ordered=True),
)
BYTES = random_integers(14, (16, 96), 8, 32)
PLAIN = (
    compressed_config("int-quantized", 8, 32, False),
    int_quantized(BYTES, symmetric=False),
)
FORMATS = {"gptq": GPTQ, "awq": AWQ, "packed": PACKED, "ordered": ORDERED, "plain": PLAIN}
PARTS = [(name, suffix) for name, (_, parts) in FORMATS.items() for suffix in parts]


@pytest.mark.parametrize(("name", "suffix"), PARTS)
def test_a_part_of_another_shape_is_refused_before_it_is_read(name: str, suffix: str) -> None:
    """No tensor but the shape itself and the order of columns may be read to find out."""
    config, parts = FORMATS[name]
    whole = parts[suffix]
    wrong = [whole.repeat(2, *[1] * (whole.ndim - 1)), whole[:-1], whole.unsqueeze(0), whole[:0]]
    if whole.ndim == 2:
        wrong += [whole.repeat(1, 2), whole[:, :-1], whole.flatten()]
    for tensor in wrong:
        tensors = {}
        for each, part in (parts | {suffix: tensor}).items():
            path = f"{MATRIX}.{each}"
            may_read = each in ("weight_shape", "g_idx", "weight_g_idx")
            tensors[path] = FolderTensor(
                path,
                NAMES[part.dtype],
                tuple(part.shape),
                (lambda found=part: found) if may_read else unread,
            )
        with pytest.raises(ModelError, match=MATRIX):
            checkpoint_tensors({"quantization_config": config}, tensors, ())


def unread() -> torch.Tensor:
    raise AssertionError("read before all shapes were checked")


@pytest.mark.parametrize(("name", "suffix"), PARTS)
def test_a_part_of_another_dtype_is_refused(name: str, suffix: str) -> None:
    config, parts = FORMATS[name]
    said = refused(config, parts | {suffix: parts[suffix].to(torch.float64)})
    assert f"tensor {MATRIX}.{suffix} has dtype F64" in said


OPTIONAL = {("gptq", "g_idx")}


@pytest.mark.parametrize(("name", "suffix"), PARTS)
def test_a_missing_part_is_named(name: str, suffix: str) -> None:
    config, parts = FORMATS[name]
    left = {each: part for each, part in parts.items() if each != suffix}
    if (name, suffix) in OPTIONAL:
        assert f"tensor {MATRIX}.g_idx is missing" in refused(config | {"desc_act": True}, left)
        assert_reads(matrix(config, left), KNOWN)
    elif suffix in ("qweight", "weight_packed", "weight"):  # the module counts as dense then
        with pytest.raises(ModelError, match=MATRIX):
            read(config, left)
    else:
        assert f"tensor {MATRIX}.{suffix} is missing" in refused(config, left)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_no_number_is_refused_before_values_are_read(
    name: str, value: float
) -> None:
    config, parts = FORMATS[name]
    (suffix,) = parts.keys() & {"scales", "weight_scale"}
    scales = parts[suffix].clone()
    scales[1, 2] = value
    assert f"{MATRIX}.{suffix} holds NaN or infinity" in refused(config, parts | {suffix: scales})


@pytest.mark.parametrize("group", [64, 128])
def test_a_group_that_does_not_divide_the_columns_is_refused(group: int) -> None:
    said = f"module {MATRIX}: group_size {group} does not divide 96 columns"
    assert said in refused(GPTQ[0] | {"group_size": group}, GPTQ[1])
    assert said in refused(AWQ[0] | {"group_size": group}, AWQ[1])
    packed = compressed_config("pack-quantized", 4, group, False)
    assert said in refused(packed, PACKED[1])
    plain = compressed_config("int-quantized", 8, group, False)
    assert said in refused(plain, PLAIN[1])


@pytest.mark.parametrize("group", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize(("name", "suffix"), [("gptq", "g_idx"), ("ordered", "weight_g_idx")])
def test_a_column_of_no_group_is_refused(name: str, suffix: str, group: int) -> None:
    config, parts = FORMATS[name]
    columns = parts[suffix].clone()
    columns[5] = group
    said = refused(config, parts | {suffix: columns})
    assert f"{MATRIX}.{suffix} holds groups other than 0 to 2" in said


@pytest.mark.parametrize("shape", [(0, 96), (16, 0), (-16, 96), (16, 2**62), (15, 96), (16, 88)])
def test_a_packed_matrix_that_lies_about_its_shape_is_refused(shape: tuple[int, int]) -> None:
    assert MATRIX in refused(PACKED[0], PACKED[1] | {"weight_shape": torch.tensor(shape)})


def test_tensors_that_a_scheme_has_none_of_are_named() -> None:
    symmetric = compressed_config("pack-quantized", 4, 32, True)
    assert f"{MATRIX}.weight_zero_point does not belong" in refused(symmetric, PACKED[1])
    assert f"{MATRIX}.weight_g_idx does not belong" in refused(PACKED[0], ORDERED[1])


def test_a_module_both_quantized_and_dense_is_refused() -> None:
    for name in ("gptq", "awq", "packed"):
        config, parts = FORMATS[name]
        assert f"{MATRIX}.weight is there twice" in refused(
            config, parts | {"weight": torch.zeros(16, 96)}
        )


def test_parts_of_a_quantized_matrix_without_a_config_are_refused() -> None:
    for _, parts in FORMATS.values():
        with pytest.raises(ModelError, match=rf"{MATRIX}\.\w+ has dtype I"):
            checkpoint_tensors({}, tensors_of(parts), ())


def tensors_of(parts: Tensors) -> dict[str, FolderTensor]:
    return {
        f"{MATRIX}.{suffix}": FolderTensor(
            f"{MATRIX}.{suffix}", NAMES[part.dtype], tuple(part.shape), unread
        )
        for suffix, part in parts.items()
    }


def test_a_file_gives_its_tensors_as_they_are_stored(tmp_path: Path) -> None:
    parts = {f"{MATRIX}.{suffix}": part for suffix, part in {**GPTQ[1], **PLAIN[1]}.items()}
    save_file(parts, tmp_path / "model.safetensors")
    found = folder_tensors(tmp_path, tied_head=False)
    assert found.keys() == parts.keys()
    for name, part in parts.items():
        assert found[name].dtype == NAMES[part.dtype]
        assert torch.equal(found[name].load(), part)
        assert bytes(found[name].stored()) == part.numpy().tobytes()

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.layout import (
    CANONICAL_LAYOUT_ID,
    LAYOUT_ID,
    PageLayout,
    key_view,
    kv_view,
    read_tokens,
    scale_views,
    value_view,
)

PAGES = 4


def empty_pool(layout: PageLayout) -> torch.Tensor:
    """Every byte 0xFF, which is NaN in fp32 (so in every scale) and in bf16."""
    return torch.full((PAGES, layout.page_bytes), 0xFF, dtype=torch.uint8)


def rows(layout: PageLayout, count: int):
    """Keys, values and distinct slots of ``count`` rows."""
    shape = (count, layout.num_kv_heads, layout.head_dim)
    slots = torch.randperm(PAGES * layout.page_size)[:count]
    return (
        torch.randn(shape),
        torch.randn(shape),
        slots // layout.page_size,
        (slots % layout.page_size),
    )


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("page_size", "head_dim", "count"), [(16, 64, 1), (32, 128, 17), (32, 80, 70), (16, 5, 9)]
)
def test_rows_land_rounded_in_their_slots_and_nowhere_else(
    ops, page_size, head_dim, count, kv_dtype
):
    layout = PageLayout(2, 3, head_dim, page_size, kv_dtype)
    memory = empty_pool(layout)
    k, v, pages, offsets = rows(layout, count)
    ops.kv_write(k, v, kv_view(memory, layout), 1, pages, offsets, layout)

    expected = empty_pool(layout)
    heads = kv_view(expected, layout)[:, 1]
    keys, values = key_view(heads, layout), value_view(heads, layout)
    key_scales, value_scales = scale_views(heads, layout)
    for row in range(count):
        page, offset = int(pages[row]), int(offsets[row])
        for head in range(3):
            stored_key, key_scale = stored(k[row, head], layout)
            stored_value, value_scale = stored(v[row, head], layout)
            keys[page, head, offset // 16, :, offset % 16] = stored_key
            values[page, head, offset] = stored_value
            if kv_dtype == "int8":
                key_scales[page, head, offset] = key_scale
                value_scales[page, head, offset] = value_scale
    assert torch.equal(memory, expected)


def stored(x: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, float]:
    """What a page holds for one head of one token, and its scale, if it has one."""
    if layout.kv_dtype != "int8":
        return x.to(layout.dtype), 1.0
    scale = np.float32(x.abs().max()) / np.float32(127)
    return torch.from_numpy(np.rint(x.numpy() / scale).astype(np.int8)), float(scale)


def written(ops, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One head of one token in int8: its integers as K and V hold them, and both scales."""
    layout = PageLayout(1, 1, len(x), 16, "int8")
    heads = kv_view(empty_pool(layout), layout)
    zero = torch.zeros(1, dtype=torch.int64)
    ops.kv_write(x.view(1, 1, -1), x.view(1, 1, -1), heads, 0, zero, zero, layout)
    key, value = key_view(heads, layout)[0, 0, 0, 0, :, 0], value_view(heads, layout)[0, 0, 0, 0]
    scales = [scale[0, 0, 0, 0] for scale in scale_views(heads, layout)]
    assert torch.equal(key, value)
    assert torch.equal(scales[0], scales[1]) or all(scale.isnan() for scale in scales)
    return key, scales[0]


def test_int8_rounds_to_nearest_with_ties_to_even(ops):
    integers, scale = written(ops, torch.tensor([127, 0.5, 1.5, -2.5, 2.51, -127.0]))
    assert integers.tolist() == [127, 0, 2, -2, 3, -127]
    assert scale == 1.0


def test_int8_zeros_have_scale_zero(ops):
    integers, scale = written(ops, torch.tensor([0.0, -0.0] * 10))
    assert integers.tolist() == [0] * 20
    assert scale == 0.0


@pytest.mark.parametrize("smallest_units", [1, 63, 64, 190])
def test_int8_of_subnormal_numbers_stays_in_range(ops, smallest_units):
    x = torch.tensor([1.0, -1.0, 0.5]) * smallest_units * 2.0**-149
    integers, scale = written(ops, x)
    assert scale == smallest_units * 2.0**-149 / 127 if scale else smallest_units < 64
    assert integers[0] == -integers[1]
    assert integers[0] in ((0,) if scale == 0 else (64, 127))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("lane", [0, 15, 16, 19])
def test_int8_of_anything_not_finite_has_a_scale_of_nan(ops, wrong, lane):
    x = torch.randn(20)
    x[lane] = wrong
    _, scale = written(ops, x)
    assert scale.isnan()


def test_bf16_rounds_to_nearest_with_ties_to_even_and_keeps_nan(ops):
    layout = PageLayout(1, 1, 4, 16, "bf16")
    kv = kv_view(empty_pool(layout), layout)
    numbers = torch.tensor([[[1 + 2**-8, 1 + 3 * 2**-8, torch.inf, torch.nan]]])
    zero = torch.zeros(1, dtype=torch.int64)
    ops.kv_write(numbers, numbers, kv, 0, zero, zero, layout)
    stored = value_view(kv, layout)[0, 0, 0, 0].float()
    assert stored[:3].tolist() == [1.0, 1 + 2**-6, torch.inf]
    assert stored[3].isnan()


@pytest.mark.parametrize(
    ("argument", "page", "offset", "layer"),
    [
        ("pages", -1, 0, 0),
        ("pages", PAGES, 0, 0),
        ("offsets", 0, -1, 0),
        ("offsets", 0, 16, 0),
        ("layer", 0, 0, 2),
        ("layer", 0, 0, -1),
    ],
)
def test_an_index_out_of_range_is_refused_before_anything_is_written(
    ops, argument, page, offset, layer
):
    layout = PageLayout(2, 3, 16, 16)
    memory = empty_pool(layout)
    k = torch.randn(2, 3, 16)
    pages, offsets = torch.tensor([0, page]), torch.tensor([1, offset])
    with pytest.raises(ValueError, match=f"^{argument} must be in"):
        ops.kv_write(k, k, kv_view(memory, layout), layer, pages, offsets, layout)
    assert torch.equal(memory, empty_pool(layout))


def test_another_order_of_bytes_is_written_right_or_refused(ops):
    layout = PageLayout(1, 2, 5, 16, "int8", CANONICAL_LAYOUT_ID)
    usual = replace(layout, layout_id=LAYOUT_ID)
    memory, expected = empty_pool(layout), empty_pool(usual)
    k, v, pages, offsets = rows(layout, 9)
    refusal = ""
    try:
        ops.kv_write(k, v, kv_view(memory, layout), 0, pages, offsets, layout)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "layout_id" in refusal
        assert torch.equal(memory, empty_pool(layout))
        return
    ops.kv_write(k, v, kv_view(expected, usual), 0, pages, offsets, usual)
    found = read_tokens(kv_view(memory, layout), layout)
    for ours, theirs in zip(found, read_tokens(kv_view(expected, usual), usual), strict=True):
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))

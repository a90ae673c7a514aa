import pytest
import torch

from kernels.layout import PageLayout, key_view, kv_view, value_view

PAGES = 4


def empty_pool(layout: PageLayout) -> torch.Tensor:
    """Every byte 0xFF, which is NaN in fp32 and in bf16."""
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


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("page_size", "head_dim", "count"), [(16, 64, 1), (32, 128, 17), (32, 80, 70)]
)
def test_rows_land_rounded_in_their_slots_and_nowhere_else(
    ops, page_size, head_dim, count, kv_dtype
):
    layout = PageLayout(2, 3, head_dim, page_size, kv_dtype)
    memory = empty_pool(layout)
    k, v, pages, offsets = rows(layout, count)
    ops.kv_write(k, v, kv_view(memory, layout), 1, pages, offsets, layout)

    expected = empty_pool(layout)
    keys = key_view(kv_view(expected, layout), 1, layout)
    values = value_view(kv_view(expected, layout), 1, layout)
    for row in range(count):
        page, offset = int(pages[row]), int(offsets[row])
        keys[page, :, offset // 16, :, offset % 16] = k[row].to(layout.dtype)
        values[page, :, offset] = v[row].to(layout.dtype)
    assert torch.equal(memory, expected)


def test_bf16_rounds_to_nearest_with_ties_to_even_and_keeps_nan(ops):
    layout = PageLayout(1, 1, 4, 16, "bf16")
    kv = kv_view(empty_pool(layout), layout)
    numbers = torch.tensor([[[1 + 2**-8, 1 + 3 * 2**-8, torch.inf, torch.nan]]])
    zero = torch.zeros(1, dtype=torch.int64)
    ops.kv_write(numbers, numbers, kv, 0, zero, zero, layout)
    stored = value_view(kv, 0, layout)[0, 0, 0].float()
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

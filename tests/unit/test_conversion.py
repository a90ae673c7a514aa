"""Pages of one layout become pages of another, and no bit of any number changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layout import KV_DTYPES, LAYOUT_IDS, PageLayout, read_tokens
from kvstore.conversion import MAX_PAGE_TOKENS, PageConverter, Rounding, layout_of, spans_of
from kvstore.fingerprint import LayoutFingerprint
from kvstore.memory import PageMemory

LAYERS, HEADS, DIM = 3, 2, 4
sizes = st.integers(1, 8).map(lambda blocks: 16 * blocks)
layout_ids = st.sampled_from(LAYOUT_IDS)


def layout(page_size: int, kv_dtype: str, layout_id: str = LAYOUT_IDS[0]) -> PageLayout:
    return PageLayout(LAYERS, HEADS, DIM, page_size, kv_dtype, layout_id)


class Contents:
    """Random bytes for every element and scale of a sequence: NaNs and all."""

    def __init__(self, num_tokens: int, kv_dtype: str, seed: int) -> None:
        self.num_tokens = num_tokens
        self.itemsize = KV_DTYPES[kv_dtype].itemsize
        random = np.random.default_rng(seed)
        shape = (2, LAYERS, HEADS, num_tokens)
        self.elements = random.integers(0, 256, (*shape, DIM, self.itemsize), dtype=np.uint8)
        self.scales = random.integers(0, 256, (*shape, 4), dtype=np.uint8)

    def pages(self, of: PageLayout) -> np.ndarray:
        """``[num_pages, page_bytes]``, every byte put where the layout's description says."""
        num_pages = -(-self.num_tokens // of.page_size)
        heads = np.zeros((num_pages, LAYERS, HEADS, of.head_bytes), dtype=np.uint8)
        for token in range(self.num_tokens):
            page, offset = divmod(token, of.page_size)
            self._put(heads[page], of, token, offset)
        return heads.reshape(num_pages, of.page_bytes)

    def _put(self, heads: np.ndarray, of: PageLayout, token: int, at: int) -> None:
        half = of.head_elements * self.itemsize
        for dim in range(DIM):
            by_token = at * DIM + dim
            by_lane = (at // 16 * DIM + dim) * 16 + at % 16
            key = by_lane if of.layout_id == "k16t_vtd" else by_token
            for kind, start in ((0, key * self.itemsize), (1, half + by_token * self.itemsize)):
                heads[..., start : start + self.itemsize] = self.elements[kind, :, :, token, dim]
        if of.kv_dtype == "int8":
            for kind in range(2):
                start = 2 * half + 4 * (kind * of.page_size + at)
                heads[..., start : start + 4] = self.scales[kind, :, :, token]


def converted(
    pages: np.ndarray, source: PageLayout, target: PageLayout, num_tokens: int, first_page: int
) -> np.ndarray:
    """The target's pages from ``first_page`` on, converted in two groups of layers."""
    staged = PageMemory(source, len(pages))
    staged.bytes.copy_(torch.from_numpy(pages))
    num_pages = -(-num_tokens // target.page_size)
    memory = PageMemory(target, num_pages + 1)
    slots = list(range(num_pages, first_page, -1))
    converter = PageConverter(source, memory, first_page, slots)
    for index in range(first_page * target.page_size // source.page_size, len(pages)):
        valid = min(source.page_size, num_tokens - index * source.page_size)
        for layers in (range(1), range(1, LAYERS)):
            heads = staged.kv[index, layers.start : layers.stop]
            converter.write(heads, index, valid, layers)
    converter.finish(num_tokens)
    assert converter.rounding.num_elements == 0
    return memory.bytes[slots].numpy()


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    kv_dtype=st.sampled_from(sorted(KV_DTYPES)),
    source_size=sizes,
    target_size=sizes,
    source_id=layout_ids,
    target_id=layout_ids,
    num_tokens=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_converted_pages_are_the_bytes_the_receiver_would_have_written(
    data: st.DataObject,
    kv_dtype: str,
    source_size: int,
    target_size: int,
    source_id: str,
    target_id: str,
    num_tokens: int,
    seed: int,
) -> None:
    """Many to one, one to many, a partial last page, and leading pages that are there already."""
    source = layout(source_size, kv_dtype, source_id)
    target = layout(target_size, kv_dtype, target_id)
    first_page = data.draw(st.integers(0, (num_tokens - 1) // target_size))
    contents = Contents(num_tokens, kv_dtype, seed)
    found = converted(contents.pages(source), source, target, num_tokens, first_page)
    assert np.array_equal(found, contents.pages(target)[first_page:])


@given(
    source_page=st.integers(0, 5),
    source_size=sizes,
    target_size=sizes,
    first_block=st.integers(0, 20),
    data=st.data(),
)
def test_every_token_goes_to_one_place(
    source_page: int, source_size: int, target_size: int, first_block: int, data: st.DataObject
) -> None:
    num_tokens = data.draw(st.integers(1, source_size))
    first_token = 16 * first_block
    spans = list(spans_of(source_page, num_tokens, first_token, source_size, target_size))
    moved = {
        source_page * source_size + span.source_offset + index: (
            span.target_page * target_size + span.target_offset + index
        )
        for span in spans
        for index in range(span.count)
    }
    assert sum(span.count for span in spans) == len(moved)
    assert all(source == target for source, target in moved.items())
    start = source_page * source_size
    assert moved.keys() >= {t for t in range(start, start + num_tokens) if t >= first_token}
    assert all(span.target_offset + span.count <= target_size for span in spans)


@pytest.mark.parametrize(("kv_dtype", "bound"), [("bf16", 2**-8), ("int8", 1 / 254)])
def test_another_kv_dtype_rounds_once_and_says_by_how_much(kv_dtype: str, bound: float) -> None:
    """The bound is relative to the largest number of the token and head."""
    source, target = layout(32, "fp32"), layout(32, kv_dtype)
    staged, memory = PageMemory(source, 1), PageMemory(target, 1)
    staged.bytes.view(torch.float32).normal_(generator=torch.manual_seed(1))
    converter = PageConverter(source, memory, 0, [0])
    converter.write(staged.kv[0], 0, 32, range(LAYERS))
    before = torch.stack(read_tokens(staged.kv[0], source))
    moved = (torch.stack(read_tokens(memory.kv[0], target)) - before).abs()
    relative = moved / before.abs().amax(-1, keepdim=True)
    assert 0 < float(relative.max()) <= bound * (1 + 1e-6)
    assert converter.rounding.num_elements == moved.numel()
    assert converter.rounding.largest == float(moved.max())
    assert converter.rounding.mean == pytest.approx(float(moved.mean()), rel=1e-6)


def test_a_number_that_is_none_shows_in_the_error() -> None:
    rounding = Rounding()
    rounding.note(torch.tensor([1.0, torch.nan]), torch.tensor([1.5, torch.nan]))
    rounding.note(torch.tensor([1.0]), torch.tensor([3.0]))
    assert np.isnan(rounding.largest)
    assert np.isnan(rounding.mean)


def fingerprint(**changes: object) -> LayoutFingerprint:
    values: dict[str, object] = {
        "model_digest": "00" * 16,
        "numerics": "int8/bf16/1",
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "head_dim": DIM,
        "page_size": 64,
        "kv_dtype": "bf16",
        "layout_id": LAYOUT_IDS[0],
    }
    return LayoutFingerprint(**(values | changes))  # type: ignore[arg-type]


def test_the_layout_of_a_peer_is_that_of_its_fingerprint() -> None:
    assert layout_of(fingerprint()) == layout(64, "bf16")


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 40},
        {"page_size": 0},
        {"page_size": MAX_PAGE_TOKENS + 16},
        {"layout_id": "unheard_of"},
        {"kv_dtype": "fp4"},
    ],
)
def test_a_layout_unknown_here_is_refused_by_name(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        layout_of(fingerprint(**change))


def test_fp32_into_int8_and_back_has_the_error_of_one_rounding() -> None:
    source, middle = layout(16, "fp32"), layout(48, "int8")
    staged, memory, back = PageMemory(source, 3), PageMemory(middle, 1), PageMemory(source, 3)
    staged.bytes.view(torch.float32).normal_(generator=torch.manual_seed(2))
    down = PageConverter(source, memory, 0, [0])
    for index in range(3):
        down.write(staged.kv[index], index, 16, range(LAYERS))
    up = PageConverter(middle, back, 0, [0, 1, 2])
    up.write(memory.kv[0], 0, 48, range(LAYERS))
    assert up.rounding.largest == 0
    expected = read_tokens(memory.kv[0], middle)
    for kind, found in enumerate(read_tokens(back.kv, source)):
        by_token = found.permute(1, 2, 0, 3, 4).flatten(2, 3)
        assert torch.equal(by_token, expected[kind])

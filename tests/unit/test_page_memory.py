"""The bytes of a pool, whatever the KV dtype."""

from __future__ import annotations

import pytest
import torch

from kernels.layout import PageLayout, read_tokens, scale_views
from kvstore.memory import PageMemory


@pytest.fixture(params=["fp32", "bf16", "int8"])
def layout(request: pytest.FixtureRequest) -> PageLayout:
    return PageLayout(3, 2, 16, 32, request.param)


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 20, 31, 32])
def test_clearing_a_tail_leaves_the_tokens_before_it_and_nothing_after(
    layout: PageLayout, num_tokens: int
) -> None:
    memory = PageMemory(layout, 3)
    memory.kv.fill_(1)
    one = [each.clone() for each in read_tokens(memory.kv[1], layout)]
    memory.clear_tail(1, num_tokens)
    for found, before in zip(read_tokens(memory.kv[1], layout), one, strict=True):
        assert torch.equal(found[:, :, :num_tokens], before[:, :, :num_tokens])
        assert not found[:, :, num_tokens:].any()
    for scales in scale_views(memory.kv[1], layout):
        assert not scales[:, :, num_tokens:].any()
    cleared = 32 - num_tokens
    assert int((memory.bytes[1] == 0).sum()) == cleared * layout.token_bytes
    assert (memory.bytes[[0, 2]] == 1).all()


def test_a_page_never_written_reads_as_nan(layout: PageLayout) -> None:
    memory = PageMemory(layout, 1)
    assert all(each.isnan().all() for each in read_tokens(memory.kv, layout))


def test_int8_takes_a_byte_per_element_and_a_scale_per_token_and_head() -> None:
    layout = PageLayout(30, 3, 64, 32, "int8")
    assert layout.token_bytes == 30 * 3 * 2 * (64 + 4)
    assert layout.page_bytes == 32 * layout.token_bytes


def test_layer_groups_are_the_bytes_of_the_page(layout: PageLayout) -> None:
    memory = PageMemory(layout, 1)
    groups = [bytes(memory.group(0, index)) for index in range(memory.groups.count)]
    assert b"".join(groups) == bytes(memory.bytes[0].numpy())

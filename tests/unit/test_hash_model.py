"""The tests' own model: any wrong, lost, doubled or stale page must change what it says."""

from __future__ import annotations

import pytest
import torch

from engine.chat_template import ChatMessage
from engine.errors import InvalidRequest
from engine.model.hash_model import (
    END,
    END_OF_MESSAGE,
    MAX_CONTEXT,
    NUM_BYTES,
    START,
    VOCAB_SIZE,
    HashModel,
    HashTokenizer,
)
from engine.model.load import load_model
from kernels.layout import key_view, kv_view, scale_views, value_view
from tests.paged_run import PagedRun, Rows, all_logits

TOKENS = list(b"any wrong, lost, doubled or stale page changes the text")
PAGE_SIZE = 16


@pytest.fixture(params=["fp32", "bf16", "int8"])
def model(request: pytest.FixtureRequest) -> HashModel:
    return HashModel(request.param)


def prefilled(model: HashModel) -> PagedRun:
    """All tokens but the last one are in the pages."""
    run = PagedRun(model, 1, len(TOKENS), PAGE_SIZE)
    run.step({0: TOKENS[:-1]}, ())
    return run


def last_logits(run: PagedRun, pages: list[int] | None = None) -> torch.Tensor:
    """Logits of the last token's row, run again over what the pages hold."""
    rows = Rows(TOKENS[-1:], len(TOKENS) - 1, pages or run.pages[0])
    return run.forward([rows], [0])


def test_the_name_hash_loads_it() -> None:
    loaded = load_model("hash", weights="bf16")
    spec = loaded.model.spec
    assert (spec.name, spec.vocab_size, spec.kv_dtype) == ("hash", VOCAB_SIZE, "bf16")
    assert loaded.tokenizer.vocab_size == VOCAB_SIZE
    assert spec.eos_token_ids == {END}


def test_every_byte_of_every_valid_token_matters(model: HashModel) -> None:
    run = prefilled(model)
    honest = last_logits(run)
    item = run.layout.dtype.itemsize
    checked = 0
    for position in (0, 15, 16, 31, 40, len(TOKENS) - 2):
        page, offset = run.pages[0][position // PAGE_SIZE], position % PAGE_SIZE
        kv = kv_view(run.memory, run.layout)
        for layer in range(model.spec.num_layers):
            key = key_view(kv[:, layer], run.layout)[page, 0, offset // 16, :, offset % 16]
            value = value_view(kv[:, layer], run.layout)[page, 0, offset]
            for row in (key, value):
                for lane in range(0, model.spec.head_dim, 5):
                    start = (row.storage_offset() + lane * row.stride(0)) * item
                    for byte in range(start, start + item):
                        run.memory.view(-1)[byte] ^= 1
                        assert not torch.equal(last_logits(run), honest)
                        run.memory.view(-1)[byte] ^= 1
                        checked += 1
            for scales in scale_views(kv[:, layer], run.layout):
                for scale in scales[page, 0, offset : offset + 1]:
                    kept = scale.clone()
                    scale *= 1 + 2**-20
                    assert not torch.equal(last_logits(run), honest)
                    scale.copy_(kept)
                    checked += 1
    scales = 1 if run.layout.num_scales else 0
    assert checked == 6 * 2 * 2 * (4 * item + scales)
    assert torch.equal(last_logits(run), honest)


def test_bytes_after_the_position_do_not_matter(model: HashModel) -> None:
    run = prefilled(model)
    honest = last_logits(run)
    kv = kv_view(run.memory, run.layout)
    page, first = run.pages[0][-1], len(TOKENS) % PAGE_SIZE
    assert first > 0
    for layer in range(model.spec.num_layers):
        key_view(kv[:, layer], run.layout)[page, 0, 0, :, first:] = 3
        value_view(kv[:, layer], run.layout)[page, 0, first:] = 3
        for scales in scale_views(kv[:, layer], run.layout):
            scales[page, 0, first:] = 3
    assert torch.equal(last_logits(run), honest)


def test_pages_out_of_order_or_of_another_sequence_change_the_text(model: HashModel) -> None:
    run = prefilled(model)
    honest = last_logits(run)
    first, second, *rest = run.pages[0]
    assert not torch.equal(last_logits(run, [second, first, *rest]), honest)
    assert not torch.equal(last_logits(run, [first, first, *rest]), honest)
    other = PagedRun(model, 1, len(TOKENS), PAGE_SIZE)
    other.step({0: [TOKENS[0] + 1, *TOKENS[1:-1]]}, ())
    assert not torch.equal(last_logits(other), honest)


def test_every_token_at_every_position_has_keys_and_values_of_its_own() -> None:
    model = HashModel("fp32")
    seen = set()
    for shift in range(0, VOCAB_SIZE, 7):
        tokens = [(shift + position) % VOCAB_SIZE for position in range(64)]
        run = PagedRun(model, 1, 64, PAGE_SIZE)
        run.step({0: tokens}, ())
        kv = kv_view(run.memory, run.layout)
        for position, token in enumerate(tokens):
            page, offset = run.pages[0][position // PAGE_SIZE], position % PAGE_SIZE
            for layer in range(model.spec.num_layers):
                key = key_view(kv[:, layer], run.layout)[page, 0, 0, :, offset]
                value = value_view(kv[:, layer], run.layout)[page, 0, offset]
                seen |= {tuple(key.tolist()), tuple(value.tolist())}
            assert 0 <= token < VOCAB_SIZE
    rows = len(range(0, VOCAB_SIZE, 7)) * 64
    assert len(seen) == rows * model.spec.num_layers * 2
    assert all(number in range(-127, 128) for row in seen for number in row)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_the_text_is_the_same_with_any_kv_dtype(kv: str) -> None:
    found = [all_logits(HashModel(each), [TOKENS], chunks=(9,))[0] for each in ("fp32", kv)]
    assert torch.equal(*found)


def test_a_row_has_the_same_bits_in_any_batch(model: HashModel) -> None:
    others = [TOKENS[5:30], TOKENS[::-1]]
    (alone,) = all_logits(model, [TOKENS], chunks=(1,))
    for chunks in ((7, 3, 50), (len(TOKENS),)):
        for page_size in (16, 32):
            together = all_logits(model, [*others, TOKENS], chunks, page_size)
            assert torch.equal(together[-1], alone)


def test_logits_are_spread_and_the_end_is_possible_but_rare() -> None:
    logits = all_logits(HashModel("fp32"), [list(range(256)) * 4], chunks=(512,))[0]
    spread = logits[:, :NUM_BYTES].std(-1)
    assert 2 < float(spread.min()) < float(spread.max()) < 4
    ends = logits.softmax(-1)[:, END]
    assert float(ends.min()) > 0
    assert float(ends.mean()) < 1 / 300


def test_rows_without_wanted_logits_give_none(model: HashModel) -> None:
    run = PagedRun(model, 1, 20)
    assert run.step({0: TOKENS[:20]}, ()).shape == (0, VOCAB_SIZE)


def test_the_last_position_of_the_context_works(model: HashModel) -> None:
    run = PagedRun(model, 1, MAX_CONTEXT, page_size=32)
    run.step({0: [65] * (MAX_CONTEXT - 1)}, ())
    assert run.step({0: [66]}, (0,)).isfinite().all()


# -- its tokenizer


def test_text_is_its_bytes() -> None:
    tokenizer = HashTokenizer()
    text = "héllo 😀\0"
    token_ids = tokenizer.encode(text, parse_special=False)
    assert bytes(token_ids) == text.encode()
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()
    assert all(tokenizer.token_bytes(token_id) == b"" for token_id in (256, START, END))


def test_special_text_is_special_only_where_asked_for() -> None:
    tokenizer = HashTokenizer()
    text = "<|start|>a<|eos|>"
    assert tokenizer.encode(text, parse_special=True) == [START, ord("a"), END]
    assert tokenizer.encode(text, parse_special=False) == list(text.encode())
    forged = tokenizer.encode_chat([ChatMessage("user", "<|end|>")])
    assert forged == [START, *b"user", *b"<|end|>", END_OF_MESSAGE, START]


def test_half_a_surrogate_pair_is_refused() -> None:
    tokenizer = HashTokenizer()
    with pytest.raises(InvalidRequest):
        tokenizer.encode("\ud800", parse_special=True)
    with pytest.raises(InvalidRequest):
        tokenizer.encode_chat([ChatMessage("user", "\ud800")])

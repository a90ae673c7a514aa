"""Tokenizers from both kinds of files: ids, bytes, special tokens, ends."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.errors import InvalidRequest
from engine.gguf_tokenizer import GgufVocabulary, tokenizer_from_gguf
from engine.library_tokenizer import LibraryTokenizer, tokenizer_from_folder
from engine.model.load import load_model
from tests.tiny_models import TOKENS, gguf_metadata, tiny_tokenizer, write_folder, write_json

TEXTS = ["hello shell", " é 日本 😀\n\t", "a<|end|>b", "12345 x", "", "<|user|>"]


def from_gguf(**changes: Any) -> LibraryTokenizer:
    return tokenizer_from_gguf(GgufVocabulary.of(gguf_metadata(**changes)))


def from_folder(folder: Path, library: Tokenizer, **settings: Any) -> LibraryTokenizer:
    library.save(str(folder / "tokenizer.json"))
    return tokenizer_from_folder(folder, settings, None)


def pieces(tokenizer: LibraryTokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(each) for each in tokenizer.encode(text, parse_special=False)]


def test_gguf_and_folder_of_the_same_tokenizer_give_the_same_ids(tmp_path: Path) -> None:
    one, other = from_gguf(), from_folder(tmp_path, tiny_tokenizer())
    assert one.vocab_size == other.vocab_size == len(TOKENS)
    for text in TEXTS:
        for parse_special in (False, True):
            ids = one.encode(text, parse_special=parse_special)
            assert ids == other.encode(text, parse_special=parse_special)
    assert len(one.encode("hello", parse_special=False)) == 2  # hell, o: merges are used


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_put_together_are_the_bytes_of_the_text(text: str) -> None:
    assert b"".join(pieces(from_gguf(), text)) == text.encode()


def test_special_text_is_special_only_where_asked_for() -> None:
    tokenizer = from_gguf()
    assert tokenizer.encode("<|user|><|end|>", parse_special=True) == [1, 0]
    plain = tokenizer.encode("<|user|><|end|>", parse_special=False)
    assert not {0, 1} & {*plain}
    assert tokenizer.token_bytes(0) == tokenizer.token_bytes(1) == b""


@pytest.mark.parametrize("token_id", [-1, len(TOKENS), 10**6])
def test_ids_that_stand_for_nothing_have_no_bytes(token_id: int) -> None:
    assert from_gguf().token_bytes(token_id) == b""


def test_the_beginning_is_marked_only_where_metadata_and_caller_ask() -> None:
    marked = from_gguf(tokenizer__ggml__bos_token_id=1, tokenizer__ggml__add_bos_token=True)
    silent = from_gguf(tokenizer__ggml__bos_token_id=1)
    plain = silent.encode("hello", parse_special=True)
    assert marked.encode("hello", parse_special=True) == [1, *plain]
    assert marked.encode("hello", parse_special=False) == plain


def test_the_beginning_that_a_folder_asks_for_is_marked(tmp_path: Path) -> None:
    library = tiny_tokenizer()
    library.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", 1)]
    )
    tokenizer = from_folder(tmp_path, library)
    plain = tokenizer.encode("hello", parse_special=False)
    assert tokenizer.encode("hello", parse_special=True) == [1, *plain]
    assert 1 not in plain


PRE = {
    "gpt-2": ("I'm 1234 OK'LL  x", ["I", "'m", " 1234", " OK", "'", "LL", " ", " x"]),
    "smollm": ("I'm 12 x", ["I", "'m", " ", "1", "2", " x"]),
    "llama-bpe": ("I'M 12345 x\n\n y", ["I", "'M", " ", "123", "45", " x", "\n\n", " y"]),
    "qwen2": ("I'M 123 x!\n", ["I", "'M", " ", "1", "2", "3", " x", "!\n"]),
}


@pytest.mark.parametrize("pre", PRE)
def test_text_is_cut_into_words_as_the_metadata_says(pre: str) -> None:
    """Every pair of characters that is in one word merges, so a token is a word."""
    text, words = PRE[pre]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens, merges = list(alphabet), []
    for word in {*words, text}:
        ((spelled, _),) = whole.pre_tokenize_str(word)
        for length in range(2, len(spelled) + 1):
            if spelled[:length] not in tokens:
                merges.append(f"{spelled[: length - 1]} {spelled[length - 1]}")
                tokens.append(spelled[:length])
    tokenizer = from_gguf(
        tokenizer__ggml__pre=pre,
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=None,
        tokenizer__ggml__merges=merges,
    )
    assert pieces(tokenizer, text) == [word.encode() for word in words]


def test_every_end_of_a_gguf_vocabulary_is_found() -> None:
    ends = ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>"]
    tokens = [*TOKENS, *ends, "named eot", "named eom", "<|other|>"]
    kinds = [1] * len(TOKENS) + [3] * 8
    kinds[len(TOKENS) + 4] = 1  # </s> as ordinary text
    vocabulary = GgufVocabulary.of(
        gguf_metadata(
            tokenizer__ggml__tokens=tokens,
            tokenizer__ggml__token_type=kinds,
            tokenizer__ggml__eot_token_id=len(TOKENS) + 5,
            tokenizer__ggml__eom_token_id=len(TOKENS) + 6,
        )
    )
    named = {"<|end|>", *ends[:4], "named eot", "named eom"}
    assert {tokens[token_id] for token_id in vocabulary.eos_token_ids} == named


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 0]}, 2, {0, 1}),
        ({"eos_token_id": 1}, 2, {1}),
        ({}, 2, {2}),
        ({}, [2, 3], {2, 3}),
        ({}, None, set()),
    ],
)
def test_ends_of_a_folder_come_from_generation_config_then_config(
    tmp_path: Path, generation: dict[str, object], config: object, expected: set[int]
) -> None:
    folder = write_folder(tmp_path / "tiny", eos_token_id=config)
    write_json(folder / "generation_config.json", generation)
    assert load_model(str(folder)).model.spec.eos_token_ids == expected


@pytest.mark.parametrize("form", ["text", "list", "file", "none"])
def test_the_template_of_a_folder_is_found_in_every_form(tmp_path: Path, form: str) -> None:
    from engine.chat_template import ChatMessage

    folder = write_folder(tmp_path / "tiny")
    source = "{{ messages[0].content }}<|end|>"
    settings: dict[str, object] = {}
    if form == "text":
        settings["chat_template"] = source
    elif form == "list":
        named = [{"name": "tools", "template": "x"}, {"name": "default", "template": source}]
        settings["chat_template"] = named
    elif form == "file":
        settings["chat_template"] = "not this one"
        (folder / "chat_template.jinja").write_text(source)
    write_json(folder / "tokenizer_config.json", settings)
    tokenizer = load_model(str(folder)).tokenizer
    if form == "none":
        with pytest.raises(InvalidRequest, match="no chat template"):
            tokenizer.encode_chat([ChatMessage("user", "hello")])
    else:
        ids = tokenizer.encode("hello<|end|>", parse_special=True)
        assert tokenizer.encode_chat([ChatMessage("user", "hello")]) == ids


def metaspace_library() -> Tokenizer:
    """As llama 2 has it: words begin with a mark for the space, other bytes have a token each."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "h", "i", "▁h", "▁hi", "▁▁"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    library = Tokenizer(
        models.BPE(
            vocabulary,
            [("▁", "h"), ("▁h", "i"), ("▁", "▁")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    library.add_special_tokens([AddedToken(token) for token in tokens[:3]])
    return library


def test_byte_fallback_vocabularies_have_exact_bytes(tmp_path: Path) -> None:
    tokenizer = from_folder(tmp_path, metaspace_library())
    assert pieces(tokenizer, "hi  hi") == [b" hi", b" ", b" hi"]
    assert b"".join(pieces(tokenizer, "hé😀")) == " hé😀".encode()
    assert tokenizer.token_bytes(0) == tokenizer.token_bytes(2) == b""
    assert [tokenizer.token_bytes(3 + byte) for byte in (0, 65, 255)] == [b"\0", b"A", b"\xff"]


def test_added_tokens_that_are_text_have_their_text_as_bytes(tmp_path: Path) -> None:
    library = tiny_tokenizer()
    library.add_tokens([AddedToken("Ġé added", normalized=False)])
    tokenizer = from_folder(tmp_path, library)
    assert "Ġé added".encode() in pieces(tokenizer, "x Ġé added y")


def test_a_tokenizer_json_cannot_cut_or_pad_what_is_encoded(tmp_path: Path) -> None:
    library = tiny_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=64)
    assert len(from_folder(tmp_path, library).encode("a b c d", parse_special=True)) == 7


def test_ids_with_holes_between_them_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer.json"
    tiny_tokenizer().save(str(folder))
    raw = json.loads(folder.read_text())
    raw["model"]["vocab"]["hell"] = 300
    write_json(folder, raw)
    tokenizer = tokenizer_from_folder(tmp_path, {}, None)
    assert tokenizer.vocab_size == 301
    assert tokenizer.token_bytes(300) == b"hell"
    assert tokenizer.token_bytes(290) == b""


def test_half_a_surrogate_pair_is_refused() -> None:
    for parse_special in (False, True):
        with pytest.raises(InvalidRequest):
            from_gguf().encode("\ud800", parse_special=parse_special)


def test_threads_may_share_a_tokenizer() -> None:
    tokenizer = from_gguf()
    texts = [f"hello {number} <|end|> shell" * 20 for number in range(40)]

    def both(text: str) -> tuple[list[int], list[int]]:
        return (
            tokenizer.encode(text, parse_special=True),
            tokenizer.encode(text, parse_special=False),
        )

    expected = [both(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            assert list(threads.map(both, texts)) == expected

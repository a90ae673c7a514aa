"""A tokenizer on top of the `tokenizers` library, from GGUF metadata or a tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from engine.chat_template import ChatMessage, ChatTemplate
from engine.errors import InvalidRequest, ModelError

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_END_NAMES = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class LibraryTokenizer:
    """``bos`` is put in front of text whose special tokens are parsed, unless the library's own
    post-processing does it (``bos`` None)."""

    def __init__(self, library: Library, template: ChatTemplate | None, bos: int | None) -> None:
        self._parsing = library
        self._plain = Library.from_str(library.to_str())
        self._plain.encode_special_tokens = True
        self._template = template
        self._bos = bos
        self._bytes = _byte_table(library)

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        if not parse_special:
            return self._encode_plain(text)
        front = [] if self._bos is None else [self._bos]
        return front + _encode(self._parsing, text, add_special_tokens=self._bos is None)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        if self._template is None:
            raise InvalidRequest("messages", "this model has no chat template", "raw text")
        return self._template.encode(messages, self._encode_plain)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def _encode_plain(self, text: str) -> list[int]:
        return _encode(self._plain, text, add_special_tokens=False)


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> LibraryTokenizer:
    """From the metadata of a GGUF file. Raises ModelError naming what is not supported."""
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(f"GGUF tokenizer model {kind!r} is not supported; gpt2 is")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", ())]
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"GGUF pre-tokenizer {pre!r} is not supported; {', '.join(_PRE_TOKENIZERS)} are"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    library = Library(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    library.pre_tokenizer = _PRE_TOKENIZERS[pre]
    library.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        library.normalizer = normalizers.NFC()
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            library.add_tokens([AddedToken(token, special=special, normalized=False)])
    bos = fields.get("tokenizer.ggml.bos_token_id")
    eos = fields.get("tokenizer.ggml.eos_token_id")
    template = _template(
        fields.get("tokenizer.chat_template"),
        library,
        tokens[bos] if bos is not None else "",
        tokens[eos] if eos is not None else "",
    )
    return LibraryTokenizer(
        library, template, bos if fields.get("tokenizer.ggml.add_bos_token") else None
    )


def eos_from_gguf(fields: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end a text: those the metadata names, and control tokens of well-known name."""
    named = {fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    known = {
        index
        for index, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type == _CONTROL and token in _END_NAMES
    }
    return frozenset({index for index in named if index is not None} | known)


def tokenizer_from_folder(
    folder: Path, settings: Mapping[str, Any], template: str | None
) -> LibraryTokenizer:
    """From tokenizer.json; ``settings`` are those of tokenizer_config.json. Raises ModelError."""
    try:
        library = Library.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises Exception itself
        raise ModelError(f"tokenizer.json cannot be read ({error})") from None
    library.no_padding()
    library.no_truncation()
    bos, eos = _content(settings.get("bos_token")), _content(settings.get("eos_token"))
    return LibraryTokenizer(library, _template(template, library, bos, eos), None)


def _content(token: object) -> str:
    """Special tokens are strings or objects with a ``content``."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return token if isinstance(token, str) else ""


def _template(source: str | None, library: Library, bos: str, eos: str) -> ChatTemplate | None:
    if not source:
        return None
    specials = {
        token.content: index
        for index, token in library.get_added_tokens_decoder().items()
        if token.special
    }
    return ChatTemplate(source, specials, bos, eos)


def _encode(library: Library, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        ids: list[int] = library.encode(text, add_special_tokens=add_special_tokens).ids
    except UnicodeEncodeError:
        raise InvalidRequest("prompt", "it holds half a surrogate pair", "Unicode text") from None
    return ids


def _byte_table(library: Library) -> list[bytes]:
    """The bytes of every token id, by the kind of decoder the library has."""
    decoder = json.dumps(json.loads(library.to_str()).get("decoder") or {})
    to_bytes = _byte_level_bytes if '"ByteLevel"' in decoder else _metaspace_bytes
    added = library.get_added_tokens_decoder()
    table = [b""] * library.get_vocab_size(with_added_tokens=True)
    for token, index in library.get_vocab(with_added_tokens=True).items():
        if index >= len(table):
            raise ModelError(f"token id {index} is beyond the vocabulary of {len(table)}")
        if index in added:
            table[index] = b"" if added[index].special else token.encode()
        else:
            table[index] = to_bytes(token)
    return table


def _byte_level_bytes(token: str) -> bytes:
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


def _metaspace_bytes(token: str) -> bytes:
    fallback = _BYTE_FALLBACK.fullmatch(token)
    if fallback:
        return bytes([int(fallback.group(1), 16)])
    return token.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al., 2019): itself if it is printable
    Latin-1 and no space, else the next code point from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + number): byte for number, byte in enumerate(others)}
    return alphabet


_BYTE_OF = _byte_level_alphabet()


def _byte_level(*before: Any, regex: bool) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([*before, byte_level])


def _split(numbers: str) -> Any:
    return pre_tokenizers.Split(Regex(_WORDS % numbers), behavior="isolated")


_PRE_TOKENIZERS = {
    "default": _byte_level(regex=True),
    "gpt-2": _byte_level(regex=True),
    "smollm": _byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "llama-bpe": _byte_level(_split("{1,3}"), regex=False),
    "qwen2": _byte_level(_split(""), regex=False),
}

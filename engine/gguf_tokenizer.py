"""The tokenizer that a GGUF file describes in its metadata."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from engine.errors import ModelError
from engine.library_tokenizer import LibraryTokenizer, template_of

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type
_END_NAMES = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The ``tokenizer.*`` metadata of a GGUF file, checked.

    ``tokens`` are in GPT-2's byte alphabet and their index is their id; ``types`` has one entry per
    token; ``ends`` are the ids the metadata names as eos, eot or eom.
    """

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    pre: str
    bos: int | None
    eos: int | None
    ends: frozenset[int]
    add_bos: bool
    chat_template: str | None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> GgufVocabulary:
        """Raises ModelError naming what is missing, wrong or not supported."""
        kind = fields.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ModelError(f"GGUF tokenizer model {reprlib.repr(kind)} is not supported; gpt2 is")
        pre = fields.get("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
            supported = ", ".join(_PRE_TOKENIZERS)
            raise ModelError(
                f"GGUF pre-tokenizer {reprlib.repr(pre)} is not supported; {supported} are"
            )
        tokens = _texts(fields, "tokenizer.ggml.tokens")
        if len(set(tokens)) != len(tokens):
            raise ModelError("tokenizer.ggml.tokens holds a token twice")
        bos, *ends = (_token_id(fields, kind, len(tokens)) for kind in ("bos", "eos", "eot", "eom"))
        template = fields.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ModelError(f"tokenizer.chat_template is {reprlib.repr(template)}, not text")
        return cls(
            tokens=tokens,
            types=_types(fields, len(tokens)),
            merges=[_merge(text) for text in _texts(fields, "tokenizer.ggml.merges")],
            pre=pre,
            bos=bos,
            eos=ends[0],
            ends=frozenset(end for end in ends if end is not None),
            add_bos=fields.get("tokenizer.ggml.add_bos_token") is True,
            chat_template=template,
        )

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a text: the named ones, and control tokens of a well-known name."""
        return self.ends | {
            index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind == _CONTROL and token in _END_NAMES
        }

    def text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self.tokens[token_id]


def tokenizer_from_gguf(vocabulary: GgufVocabulary) -> LibraryTokenizer:
    """Raises ModelError if merges and tokens do not fit."""
    library = _library(vocabulary)
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=kind == _CONTROL, normalized=False)
            library.add_tokens([added])
    template = template_of(
        vocabulary.chat_template,
        library,
        vocabulary.text_of(vocabulary.bos),
        vocabulary.text_of(vocabulary.eos),
    )
    return LibraryTokenizer(library, template, vocabulary.bos if vocabulary.add_bos else None)


def _library(vocabulary: GgufVocabulary) -> Library:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    ignore_merges = vocabulary.pre == "llama-bpe"  # a word that is a token needs no merging
    try:
        library = Library(models.BPE(ids, vocabulary.merges, ignore_merges=ignore_merges))
    except Exception as error:  # the library raises Exception itself
        raise ModelError(f"tokenizer.ggml.merges do not fit the tokens ({error})") from None
    library.pre_tokenizer = _PRE_TOKENIZERS[vocabulary.pre]
    library.decoder = decoders.ByteLevel()
    if vocabulary.pre == "qwen2":
        library.normalizer = normalizers.NFC()
    return library


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    found = fields.get(name)
    if isinstance(found, list) and found and all(isinstance(text, str) for text in found):
        return found
    raise ModelError(f"{name} is {reprlib.repr(found)}, not a list of texts")


def _merge(text: str) -> tuple[str, str]:
    parts = text.split(" ")
    if len(parts) != 2:
        raise ModelError(f"tokenizer.ggml.merges: {reprlib.repr(text)} is not two tokens")
    return parts[0], parts[1]


def _types(fields: Mapping[str, Any], num_tokens: int) -> list[int]:
    found = fields.get("tokenizer.ggml.token_type", [_NORMAL] * num_tokens)
    if not isinstance(found, list) or len(found) != num_tokens:
        raise ModelError(f"tokenizer.ggml.token_type is not a list of {num_tokens} types")
    return found


def _token_id(fields: Mapping[str, Any], kind: str, num_tokens: int) -> int | None:
    name = f"tokenizer.ggml.{kind}_token_id"
    found = fields.get(name)
    if found is None or (type(found) is int and 0 <= found < num_tokens):
        return found
    raise ModelError(f"{name} is {reprlib.repr(found)}, not 0 to {num_tokens - 1}")


def _byte_level(*before: Any, regex: bool) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([*before, byte_level])


def _split(numbers: str) -> Any:
    return pre_tokenizers.Split(Regex(_WORDS % numbers), behavior="isolated")


_PRE_TOKENIZERS = {
    "gpt-2": _byte_level(regex=True),
    "smollm": _byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "llama-bpe": _byte_level(_split("{1,3}"), regex=False),
    "qwen2": _byte_level(_split(""), regex=False),
}

"""A tokenizer on top of the `tokenizers` library, and how one is read from a tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library

from engine.chat_template import ChatMessage, ChatTemplate
from engine.errors import InvalidRequest, ModelError

MAX_IDS = 1 << 24
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
        if self._bos is None:
            return _encode(self._parsing, text, add_special_tokens=True)
        return [self._bos, *self._encode_joint(text)]

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        if self._template is None:
            raise InvalidRequest("messages", "this model has no chat template", "raw text")
        return self._template.encode(messages, self._encode_plain, self._encode_joint)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def _encode_joint(self, text: str) -> list[int]:
        return _encode(self._parsing, text, add_special_tokens=False)

    def _encode_plain(self, text: str) -> list[int]:
        return _encode(self._plain, text, add_special_tokens=False)


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
    return LibraryTokenizer(library, template_of(template, library, bos, eos), None)


def _content(token: object) -> str:
    """Special tokens are strings or objects with a ``content``."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return token if isinstance(token, str) else ""


def template_of(source: str | None, library: Library, bos: str, eos: str) -> ChatTemplate | None:
    """The chat template with the library's special tokens; None if there is no ``source``."""
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
        text.encode()  # the library answers with a TypeError that says something else
    except UnicodeEncodeError:
        raise InvalidRequest("prompt", "it holds half a surrogate pair", "Unicode text") from None
    ids: list[int] = library.encode(text, add_special_tokens=add_special_tokens).ids
    return ids


def _byte_table(library: Library) -> list[bytes]:
    """The bytes of every token id, by the kind of decoder the library has."""
    decoder = json.dumps(json.loads(library.to_str()).get("decoder") or {})
    to_bytes = _byte_level_bytes if '"ByteLevel"' in decoder else _metaspace_bytes
    added = library.get_added_tokens_decoder()
    vocabulary = library.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=-1)
    if highest >= MAX_IDS:
        raise ModelError(f"the tokenizer has id {highest}; 0 to {MAX_IDS - 1} are supported")
    table = [b""] * (highest + 1)
    for token, index in vocabulary.items():
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

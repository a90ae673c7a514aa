"""Text to token ids and back, byte-exact and free of context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.chat_template import ChatMessage


class Tokenizer(Protocol):
    """Safe to use from several threads."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids of ``text``; special-token text becomes special ids only if ``parse_special``.

        Adds the model's beginning-of-sequence id only where its metadata asks for one and
        ``parse_special`` is set. Raises InvalidRequest for text that is not Unicode.
        """
        ...

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation with the prompt for an answer. Raises InvalidRequest."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for, wherever it stands; empty for special tokens."""
        ...

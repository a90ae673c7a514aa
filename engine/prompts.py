"""A prompt in any of its forms, and its token ids."""

from __future__ import annotations

from collections.abc import Sequence

from engine.admission import check_text
from engine.chat_template import ChatMessage
from engine.errors import InvalidRequest
from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Raw text, token ids, or a conversation to be rendered with the model's chat template."""


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of a prompt in any of its forms. Raises InvalidRequest."""
    if isinstance(prompt, str):
        check_text(prompt)
        return tuple(tokenizer.encode(prompt, parse_special=True))
    if not prompt:
        raise InvalidRequest("prompt", "it is empty", "at least 1 token or message")
    messages = [part for part in prompt if isinstance(part, ChatMessage)]
    if len(messages) == len(prompt):
        return tuple(tokenizer.encode_chat(messages))
    ids = tuple(part for part in prompt if isinstance(part, int) and not isinstance(part, bool))
    if len(ids) != len(prompt):
        raise InvalidRequest("prompt", "it mixes types", "text, token ids, or chat messages")
    return ids

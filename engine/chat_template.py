"""Conversations to token ids, by the model's own chat template, in a sandbox.

A template is code that came with the model: it runs in Jinja's immutable sandbox, may not make more
than ``MAX_RENDERED`` characters, and never comes from a request. What users write stays text:
special-token strings inside a message are hidden from the template behind a random sentinel, the
rendering is cut at the template's *own* special tokens, and the parts between are encoded with
special tokens switched off. Where no message holds such a string, the ids are those of encoding the
rendering whole, unless that finds special tokens which the template did not write (a tokenizer that
normalizes can make one of other characters).
"""

from __future__ import annotations

import io
import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequest, ModelError

ROLES = ("system", "user", "assistant")
MAX_RENDERED = 8_000_000


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """``role`` is one of ``ROLES``."""

    role: str
    content: str


class ChatTemplate:
    """One model's template. ``specials`` maps special-token texts to ids."""

    def __init__(
        self,
        source: str,
        specials: dict[str, int],
        bos: str,
        eos: str,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"the chat template cannot be parsed ({error})") from None
        self._specials = specials
        self._special_ids = frozenset(specials.values())
        self._names = {"bos_token": bos, "eos_token": eos}
        longest_first = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(
        self,
        messages: Sequence[ChatMessage],
        encode_plain: Callable[[str], list[int]],
        encode_joint: Callable[[str], list[int]],
    ) -> list[int]:
        """Token ids of a conversation with the prompt for an answer. Raises InvalidRequest.

        ``encode_plain`` encodes text in which nothing is special, ``encode_joint`` text with its
        special tokens.
        """
        check_messages(messages)
        sentinel = secrets.token_hex(16)
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{sentinel}{len(hidden) - 1:08x}"

        shown = [
            {"role": message.role, "content": self._special.sub(hide, message.content)}
            for message in messages
        ]
        rendered = self._render(shown)
        own = [self._specials[special.group()] for special in self._special.finditer(rendered)]
        if not hidden:
            joint = encode_joint(rendered)
            if [token_id for token_id in joint if token_id in self._special_ids] == own:
                return joint
        reveal = re.compile(sentinel + "([0-9a-f]{8})")
        ids: list[int] = []
        start = 0
        for special in self._special.finditer(rendered):
            ids += self._text(rendered[start : special.start()], reveal, hidden, encode_plain)
            ids.append(self._specials[special.group()])
            start = special.end()
        return ids + self._text(rendered[start:], reveal, hidden, encode_plain)

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            parts = self._template.generate(
                messages=messages, add_generation_prompt=True, **self._names
            )
            rendered = _joined(parts)
        except _Refused as refusal:
            raise InvalidRequest("messages", str(refusal), "what the chat template takes") from None
        except Exception as error:
            raise InvalidRequest(
                "messages", f"the chat template failed ({type(error).__name__})", "other messages"
            ) from None
        if rendered is None:
            raise InvalidRequest(
                "messages", "they render too long", f"up to {MAX_RENDERED} characters"
            )
        return rendered

    @staticmethod
    def _text(
        text: str,
        reveal: re.Pattern[str],
        hidden: list[str],
        encode_plain: Callable[[str], list[int]],
    ) -> list[int]:
        text = reveal.sub(lambda match: hidden[int(match.group(1), 16)], text)
        return encode_plain(text) if text else []


def _joined(parts: Iterable[str]) -> str | None:
    """The parts as one text, or None as soon as it is longer than MAX_RENDERED."""
    text = io.StringIO()
    for part in parts:
        if text.tell() + len(part) > MAX_RENDERED:
            return None
        text.write(part)
    return text.getvalue()


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raises InvalidRequest for an empty conversation or an unknown role."""
    if not messages:
        raise InvalidRequest("messages", "there is none", "at least 1 message")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"messages[{index}].role", repr(message.role), ", ".join(ROLES))


class _Refused(Exception):
    """The template itself does not take these messages."""


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

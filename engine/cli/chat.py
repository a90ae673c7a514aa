"""``quire chat``: a conversation; each turn's pages are found again in the prefix cache.

Ctrl-C cancels the answer in progress (its pages are freed) and keeps the conversation; Ctrl-D ends.
"""

from __future__ import annotations

import argparse
import sys

from engine.chat_template import ChatMessage
from engine.cli.options import add_model, add_place, add_sampling, open_engine, sampling_params
from engine.client import BlockingClient
from engine.completion import Delta, Finished
from engine.errors import QuireError
from engine.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    add_sampling(parser, temperature=0.2)
    add_model(parser)
    add_place(parser)


def run(options: argparse.Namespace) -> int:
    params = sampling_params(options)
    messages = [ChatMessage("system", options.system)] if options.system else []
    with open_engine(options) as engine:
        while (text := _ask()) is not None:
            if not text.strip():
                continue
            messages.append(ChatMessage("user", text))
            try:
                answer = _answer(engine, messages, params)
            except QuireError as error:
                print(f"quire chat: {error}", file=sys.stderr)
                messages.pop()
                continue
            messages.append(ChatMessage("assistant", answer))
    return 0


def _ask() -> str | None:
    """The next message; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(engine: BlockingClient, messages: list[ChatMessage], params: SamplingParams) -> str:
    """Streams one answer to the terminal; an interrupt ends it early."""
    parts: list[str] = []
    items = engine.items(list(messages), params)
    try:
        for item in items:
            if isinstance(item, Delta) and item.choice_index == 0:
                parts.append(item.text)
                print(item.text, end="", flush=True)
            if isinstance(item, Finished):
                usage = item.usage
                print(
                    f"\n[{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} from the "
                    f"prefix cache, {usage.output_tokens} out]",
                    file=sys.stderr,
                )
    except KeyboardInterrupt:
        print("\n[cancelled]", file=sys.stderr)
    finally:
        items.close()
    return "".join(parts)

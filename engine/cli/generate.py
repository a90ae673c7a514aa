"""``quire generate``: one prompt in, one JSON object or plain text out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from engine.chat_template import ChatMessage
from engine.cli.options import add_model, add_place, add_sampling, open_engine, sampling_params
from engine.completion import Collector, Completion, Delta
from engine.errors import InvalidRequest
from engine.prompts import Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-ids", metavar="1,2,3")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="the text as it is (default)")
    form.add_argument("--chat", action="store_true", help="the text as a user's message")
    add_sampling(parser, temperature=0.0)
    add_model(parser)
    add_place(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(options: argparse.Namespace) -> int:
    params, prompt = sampling_params(options), prompt_of(options)
    with open_engine(options) as engine:
        collector = Collector(wants_logprobs=params.logprobs is not None)
        for item in engine.items(prompt, params):
            collector.add(item)
            if isinstance(item, Delta) and item.choice_index == 0 and not options.json:
                print(item.text, end="", flush=True)
    completions = collector.completions()
    if options.json:
        print(json.dumps(_report(completions)))
    else:
        _print_rest(completions)
    return 0


def prompt_of(options: argparse.Namespace) -> Prompt:
    """The prompt the flags describe. Raises InvalidRequest."""
    if options.prompt_ids is not None:
        try:
            return [int(part) for part in options.prompt_ids.split(",")]
        except ValueError:
            raise InvalidRequest(
                "--prompt-ids", repr(options.prompt_ids), "numbers between commas"
            ) from None
    if options.chat:
        return [ChatMessage("user", options.prompt)]
    return str(options.prompt)


def _report(completions: list[Completion]) -> dict[str, Any]:
    first = completions[0]
    report: dict[str, Any] = {"prompt_ids": first.prompt_ids, **_choice(first)}
    report |= {
        "seed": first.seed,
        "timings": asdict(first.timings),
        "usage": asdict(first.usage),
        "prefilled": first.prefilled,
    }
    if len(completions) > 1:
        report["choices"] = [_choice(completion) for completion in completions]
    return report


def _choice(completion: Completion) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": str(completion.finish_reason),
    }
    if completion.logprobs is not None:
        choice["logprobs"] = [asdict(each) for each in completion.logprobs]
    return choice


def _print_rest(completions: list[Completion]) -> None:
    """Ends the streamed text, shows the other choices, and says how it went on stderr."""
    print()
    for completion in completions[1:]:
        print(f"--- choice {completion.choice_index}\n{completion.text}")
    first = completions[0]
    timings = first.timings
    print(
        f"[{first.usage.output_tokens} tokens, {first.finish_reason}, prompt {first.prefilled}, "
        f"first token {timings.first_token_s:.3f} s, total {timings.total_s:.3f} s, "
        f"seed {first.seed}]",
        file=sys.stderr,
    )

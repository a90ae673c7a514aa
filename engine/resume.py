"""Where an interrupted stream stands, and whether that can be: checked before it is continued.

A stream is continued from its prompt, its parameters with the seed, and the tokens each choice has:
all else (penalties, stop strings, unfinished characters) is rebuilt by replaying them. The text of
the continuation begins where the unbroken stream's text for those tokens had ended.

Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequest
from engine.finish import OutputTracker
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class ChoiceSoFar:
    """The tokens one choice has, and whether they are all. A choice not named has none."""

    choice_index: int
    token_ids: tuple[int, ...] = ()
    finished: bool = False


def check_resume(
    resume: Sequence[ChoiceSoFar],
    params: SamplingParams,
    max_tokens: int,
    vocab_size: int,
    eos_ids: Collection[int],
    token_bytes: Callable[[int], bytes],
) -> None:
    """Raises InvalidRequest, naming the entry, for what no stream of these parameters can be.

    ``max_tokens`` is the limit in effect. Takes time in proportion to the tokens.
    """
    seen: set[int] = set()
    for position, choice in enumerate(resume):
        field = f"resume[{position}]"
        _check_index(field, choice.choice_index, params.n, seen)
        _check_ids(field, choice.token_ids, max_tokens, vocab_size)
        tracker = OutputTracker(params, eos_ids, token_bytes, max_tokens)
        _check_end(field, choice, tracker)


def check_seed(resume: Sequence[ChoiceSoFar], params: SamplingParams) -> None:
    """Raises InvalidRequest if another seed than the stream's could be drawn."""
    if resume and params.seed is None and not params.is_greedy:
        raise InvalidRequest("seed", "it is missing", "the seed of the stream that is resumed")


def _check_index(field: str, index: int, num_choices: int, seen: set[int]) -> None:
    allowed = f"0 to {num_choices - 1}, each once"
    if not 0 <= index < num_choices:
        raise InvalidRequest(f"{field}.choice_index", f"choice {index}", allowed)
    if index in seen:
        raise InvalidRequest(f"{field}.choice_index", f"choice {index} again", allowed)
    seen.add(index)


def _check_ids(field: str, ids: Sequence[int], max_tokens: int, vocab_size: int) -> None:
    if len(ids) > max_tokens:
        raise InvalidRequest(
            f"{field}.token_ids", f"it has {len(ids)} tokens", f"at most max_tokens ({max_tokens})"
        )
    wrong = next((each for each in ids if not 0 <= each < vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"{field}.token_ids", f"token id {wrong}", f"0 to {vocab_size - 1}")


def _check_end(field: str, choice: ChoiceSoFar, tracker: OutputTracker) -> None:
    """The tokens must end the choice with the last one, or not at all, as ``finished`` says."""
    for index, token_id in enumerate(choice.token_ids):
        if tracker.push(token_id).finish is None:
            continue
        rest = len(choice.token_ids) - index - 1
        if rest:
            raise InvalidRequest(
                f"{field}.token_ids",
                f"token {index} ended the choice, yet {rest} follow",
                "tokens up to the end of the choice",
            )
        if not choice.finished:
            raise InvalidRequest(
                f"{field}.finished", f"false, yet token {index} ended the choice", "true"
            )
        return
    if choice.finished:
        raise InvalidRequest(
            f"{field}.finished",
            f"true, yet its {len(choice.token_ids)} tokens do not end the choice",
            "false, or all tokens of the choice",
        )

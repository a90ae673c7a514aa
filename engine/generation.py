"""One choice of one request in the engine: its token function and what became of its tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.finish import OutputTracker
from engine.model import ModelSpec
from engine.outputs import TokenOutput
from engine.sampling_params import SamplingParams
from engine.token_function import TokenChoice, TokenFunction
from kernels.sample import Row


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """Wants the pages of all but the last prompt token."""

    name: str
    prompt_ids: tuple[int, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class GenerateTask:
    """Wants up to ``max_tokens`` output tokens of choice ``choice_index``.

    ``output_ids`` are those it has already, without its end (``engine.resume``). ``remote`` lets
    the pages of these tokens come from a prefill service; ``after`` names the choice whose prompt
    pages this one shares.
    """

    name: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_tokens: int
    choice_index: int = 0
    tenant: str = ""
    remote: bool = False
    after: str | None = None
    output_ids: tuple[int, ...] = ()


class Generation:
    """The output of one choice so far."""

    def __init__(
        self, task: GenerateTask, spec: ModelSpec, token_bytes: Callable[[int], bytes]
    ) -> None:
        self._name = task.name
        self._max_tokens = task.max_tokens
        self._output_ids = array("i")
        self._function = TokenFunction(
            params=task.params,
            seed=task.seed,
            choice_index=task.choice_index,
            prompt_ids=task.prompt_ids,
            eos_ids=spec.eos_token_ids,
            vocab_size=spec.vocab_size,
        )
        self._argmax_from = self._function.argmax_from
        self._tracker = OutputTracker(
            params=task.params,
            eos_ids=spec.eos_token_ids,
            token_bytes=token_bytes,
            max_tokens=task.max_tokens,
        )
        for token_id in task.output_ids:
            self._output_ids.append(token_id)
            self._tracker.push(token_id)

    @property
    def num_left(self) -> int:
        """Tokens until its limit."""
        return self._max_tokens - len(self._output_ids)

    @property
    def needs_logits(self) -> bool:
        """False if the ids of the highest logits, the lowest of equal ones, are the next tokens,
        however many."""
        return self._argmax_from is None or len(self._output_ids) < self._argmax_from

    def prepare(self, logits: np.ndarray, drafts: tuple[int, ...] = ()) -> list[Row]:
        """What choosing tokens from ``logits [rows, vocab_size]`` fp32 takes: the next one, and
        those that would follow if the drafts were right."""
        return [self.row_after(row, drafts[:end]) for end, row in enumerate(logits)]

    def row_after(self, logits: np.ndarray, drafts: tuple[int, ...]) -> Row:
        """What choosing the token after these drafts from ``logits [vocab_size]`` takes."""
        output = self._output_ids
        return self._function.row(logits, output + array("i", drafts) if drafts else output)

    def accept(self, choice: TokenChoice, num_drafts: int, drafted: bool) -> TokenOutput:
        """Takes the next token in; the last two are as its output tells them."""
        self._output_ids.append(choice.token_id)
        delta = self._tracker.push(choice.token_id)
        return TokenOutput(
            name=self._name,
            token_id=choice.token_id,
            text=delta.text,
            logprob=choice.logprob,
            top_logprobs=choice.top_logprobs,
            finish=delta.finish,
            matched_stop=delta.matched_stop,
            num_drafts=num_drafts,
            drafted=drafted,
        )

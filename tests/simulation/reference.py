"""What every request must bring: the tokens of an engine that is alone, undisturbed and large."""

from __future__ import annotations

import functools

from engine.core import CoreSettings, EngineCore
from engine.generation import GenerateTask
from engine.outputs import Output, TokenOutput
from engine.sampling_params import SamplingParams
from tests.simulation.page_model import LOADED
from tests.simulation.scenario import MAX_OUTPUT, PAGE_SIZE, PROMPTS, SEED, Ask


def prompt_of(ask: Ask) -> tuple[int, ...]:
    return PROMPTS[ask.text][: ask.num_prompt]


def params_of(ask: Ask) -> SamplingParams:
    return SamplingParams(
        temperature=ask.temperature, seed=SEED, n=ask.choices, max_tokens=ask.max_tokens
    )


def expected_tokens(ask: Ask, choice: int) -> tuple[tuple[int, ...], str]:
    """Token ids and finish reason."""
    choice = choice if ask.temperature else 0
    tokens, ended = _undisturbed(ask.text, ask.num_prompt, ask.temperature, choice)
    if len(tokens) > ask.max_tokens or not ended:
        return tokens[: ask.max_tokens], "length"
    return tokens, "stop"


@functools.cache
def _undisturbed(
    text: int, num_prompt: int, temperature: float, choice: int
) -> tuple[tuple[int, ...], bool]:
    """As many tokens as any request may want, and whether the text ended by itself."""
    settings = CoreSettings(num_pages=16, page_size=PAGE_SIZE)
    core = EngineCore(LOADED.model, LOADED.tokenizer.token_bytes, settings, bytes(16))
    task = GenerateTask(
        name="reference",
        prompt_ids=PROMPTS[text][:num_prompt],
        params=SamplingParams(temperature=temperature, seed=SEED, max_tokens=MAX_OUTPUT),
        seed=SEED,
        max_tokens=MAX_OUTPUT,
        choice_index=choice,
    )
    core.submit([task])
    outputs: list[Output] = []
    while core.step(outputs.extend):
        pass
    tokens = [output for output in outputs if isinstance(output, TokenOutput)]
    return tuple(token.token_id for token in tokens), str(tokens[-1].finish) == "stop"

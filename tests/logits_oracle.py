"""A model's logits against those of transformers' implementation in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.model import Model
from tests.paged_run import PagedRun, all_logits
from tests.tiny_models import TOKENS

# Sums in another order: relative to the largest logit.
TOLERANCE = 2e-5


def sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randint(len(TOKENS), (length,), generator=generator).tolist() for length in lengths
    ]


@torch.no_grad()
def oracle_logits(oracle: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = oracle(torch.tensor([token_ids])).logits[0]
    return logits


def assert_same_logits(
    model: Model,
    oracle: torch.nn.Module,
    lengths: Sequence[int] = (1, 50, 33, 100),
    tolerance: float = TOLERANCE,
) -> None:
    """Over pages of 16 and 32 tokens, the sequences at once, each in chunks of another size."""
    inputs = sequences(*lengths)
    expected = [oracle_logits(oracle, each) for each in inputs]
    scale = max(float(logits.abs().max()) for logits in expected)
    for page_size in (16, 32):
        found = all_logits(model, inputs, chunks=(1, 7, 16, 64), page_size=page_size)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def assert_same_greedy_tokens(
    model: Model, oracle: torch.nn.Module, prompt: list[int], num_tokens: int
) -> None:
    """Each token the model chooses is the oracle's choice after the same tokens."""
    run = PagedRun(model, 1, len(prompt) + num_tokens)
    tokens, fed = list(prompt), prompt
    for _ in range(num_tokens):
        logits = run.step({0: fed}, [len(fed) - 1])
        fed = [int(logits[0].argmax())]
        tokens += fed
    chosen = oracle_logits(oracle, tokens[:-1])[len(prompt) - 1 :].argmax(-1)
    assert chosen.tolist() == tokens[len(prompt) :]

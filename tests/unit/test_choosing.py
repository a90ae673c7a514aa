"""How the step loop lets the token function choose for all sequences at once."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from engine import core as step_loop
from engine.core import CoreSettings, EngineCore
from engine.errors import EngineFault
from engine.generation import GenerateTask, Generation
from engine.model.hash_model import HashModel, HashTokenizer
from engine.outputs import Failed, Output, TokenOutput
from engine.sampling_params import SamplingParams
from kernels.layout import PageLayout
from kernels.ragged import RaggedBatch

BAD_TOKEN = 77
PROMPTS = {"first": (1, 2, 3), "bad": (4, 5, BAD_TOKEN), "last": (6, 7, 8)}


class SpoiledModel(HashModel):
    """Produces NaN where it reads a certain token."""

    def forward(self, batch: RaggedBatch, kv: torch.Tensor, layout: PageLayout) -> torch.Tensor:
        logits = super().forward(batch, kv, layout)
        logits[batch.token_ids[batch.logit_rows] == BAD_TOKEN, 3] = math.nan
        return logits


def run(model: HashModel) -> dict[str, list[Output]]:
    """What comes of all prompts in one batch."""
    core = EngineCore(model, HashTokenizer().token_bytes, CoreSettings(num_pages=32), bytes(16))
    params = SamplingParams(temperature=1.0, ignore_eos=True)
    core.submit(GenerateTask(name, ids, params, 5, 4) for name, ids in PROMPTS.items())
    outputs = defaultdict(list)
    while core.step(lambda batch: [outputs[output.name].append(output) for output in batch]):
        pass
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [output.token_id for output in outputs if isinstance(output, TokenOutput)]


@pytest.fixture(scope="module")
def sound() -> dict[str, list[Output]]:
    outputs = run(HashModel("fp32"))
    assert all(len(tokens(outputs[name])) == 4 for name in PROMPTS)
    return outputs


def check_only_one_failed(outputs: dict[str, list[Output]], sound: dict[str, list[Output]]) -> None:
    (failure,) = (output for output in outputs["bad"] if isinstance(output, Failed))
    assert isinstance(failure.error, EngineFault)
    assert tokens(outputs["bad"]) == []
    for name in ("first", "last"):
        assert tokens(outputs[name]) == tokens(sound[name])


def test_a_row_that_holds_no_numbers_ends_its_sequence_only(sound):
    check_only_one_failed(run(SpoiledModel("fp32")), sound)


def test_a_row_that_cannot_be_prepared_ends_its_sequence_only(sound, monkeypatch):
    def prepare(self, *logits):
        assert self._name != "bad"
        return healthy(self, *logits)

    healthy = Generation.prepare
    monkeypatch.setattr(Generation, "prepare", prepare)
    check_only_one_failed(run(HashModel("fp32")), sound)


def test_the_tokens_of_a_step_are_chosen_in_one_call(sound, monkeypatch):
    num_rows = []
    choose = step_loop.choose

    def counted(rows):
        num_rows.append(len(rows))
        return choose(rows)

    monkeypatch.setattr(step_loop, "choose", counted)
    assert tokens(run(HashModel("fp32"))["first"]) == tokens(sound["first"])
    assert num_rows == [3] * 4


def test_a_plain_greedy_sequence_needs_no_logits():
    def needs_logits(**params):
        task = GenerateTask("name", (1, 2), SamplingParams(**params), 5, 4)
        return Generation(task, HashModel("fp32").spec, HashTokenizer().token_bytes).needs_logits

    assert not needs_logits(temperature=0)
    assert needs_logits(temperature=1)
    assert needs_logits(temperature=0, logprobs=0)
    assert needs_logits(temperature=0, min_tokens=1)

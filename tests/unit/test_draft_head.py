"""Draft heads: files, shapes, arithmetic, and what one is trained on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import ModelError
from engine.model.llama import LlamaModel
from engine.model.load import LoadedModel, load_model
from engine.progress import Silence
from engine.speculation.draft_head import DraftHead, HeadWeights, read_head
from engine.speculation.head_training import (
    DEPTH,
    HeadNet,
    Positions,
    Text,
    TrainingSettings,
    learn,
    measure,
    most_frequent,
    save_head,
    train,
    user_turn,
)
from engine.speculation.loading import load_drafter
from kernels.embedding import embedding
from tests.tiny_models import write_folder

HIDDEN = 48


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_folder(tmp_path_factory.mktemp("model") / "tiny")
    return load_model(str(folder), weights="bf16")


@pytest.fixture
def net(tiny: LoadedModel) -> HeadNet:
    assert isinstance(tiny.model, LlamaModel)
    torch.manual_seed(0)
    made = HeadNet(tiny.model, torch.tensor([3, 5, 8, 40, 41]), HIDDEN)
    torch.nn.init.normal_(made.inner, std=0.1)
    return made


@pytest.fixture
def head(net: HeadNet) -> HeadWeights:
    return net.weights()


def test_a_head_drafts_as_it_was_taught(net: HeadNet, head: HeadWeights, tiny: LoadedModel) -> None:
    drafter = DraftHead(head, tiny.model, {})
    states, tokens = torch.randn(3, drafter.hidden_width), [1, 7, 200]
    rows = embedding(torch.tensor(tokens), net.embedding)
    for _ in range(DEPTH):
        expected, expected_logits = net(states, rows)
        states, logits = drafter._forward(states, tokens)
        torch.testing.assert_close(states, expected, atol=0.1, rtol=0.05)  # 8 bits against 32
        torch.testing.assert_close(logits, expected_logits, atol=0.3, rtol=0.05)


def test_a_saved_head_is_read_again(head: HeadWeights, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(head, path, "tiny")
    found = read_head(path)
    for name in ("state_norm", "token_norm", "out_norm", "vocabulary"):
        assert torch.equal(getattr(found, name), getattr(head, name))
    for name in ("inner", "outer"):
        assert torch.equal(getattr(found, name), getattr(head, name).bfloat16().float())


def test_what_is_no_head_is_refused(head: HeadWeights, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(ModelError, match="cannot be read"):
        read_head(path)
    save_head(head, path, "tiny")
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-10], b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="cannot be read"):
            read_head(path)
    save_file({"inner": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="is no draft head"):
        read_head(path)
    save_file({"inner": torch.zeros(2)}, path, {"format": "quire-draft-head-1"})
    with pytest.raises(ModelError, match="cannot be read"):
        read_head(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_norm": torch.ones(63)}, r"out_norm is \[63\], the target needs \[64\]"),
        ({"inner": torch.ones(8, 128)}, "inner is"),
        ({"outer": torch.ones(32, HIDDEN)}, "outer is"),
        ({"outer": torch.ones(64)}, "is"),
        ({"outer": torch.tensor(1.0)}, "is"),
        ({"vocabulary": torch.tensor(5)}, "vocabulary is"),
        ({"vocabulary": torch.tensor([5, 100_000])}, "vocabulary must be ids from 0 to"),
        ({"vocabulary": torch.tensor([-1])}, "vocabulary must be ids"),
        ({"vocabulary": torch.tensor([], dtype=torch.int64)}, "vocabulary must be ids"),
        ({"out_norm": torch.full((64,), torch.nan)}, "out_norm has"),
    ],
)
def test_a_head_of_another_shape_is_refused_by_name(
    changes: dict[str, torch.Tensor], message: str, head: HeadWeights, tiny: LoadedModel
) -> None:
    with pytest.raises(ModelError, match=message):
        DraftHead(replace(head, **changes), tiny.model, {})


def test_models_without_hidden_rows_or_a_head_are_refused(
    head: HeadWeights, tiny: LoadedModel
) -> None:
    with pytest.raises(ModelError, match="no hidden rows"):
        DraftHead(head, load_model("hash").model, {})
    with pytest.raises(ModelError, match="quire draft train"):
        load_drafter("head", tiny)
    with pytest.raises(ModelError, match="cannot be read"):
        load_drafter("head", tiny, "nowhere.safetensors")


def test_a_head_proposes_nothing_before_it_was_told_a_hidden_row(
    head: HeadWeights, tiny: LoadedModel
) -> None:
    drafter = DraftHead(head, tiny.model, {})
    drafter.begin("a", [1, 2], "")
    assert drafter.propose({"a": 3}) == {}
    drafter.forget("a")
    drafter.forget("a")


# -- training


def test_the_most_frequent_ids_are_learned() -> None:
    ids = [torch.tensor([5, 5, 9, 1]), torch.tensor([9, 5, 7])]
    assert most_frequent(ids, 2).tolist() == [5, 9]
    assert most_frequent(ids, 9).tolist() == [1, 5, 7, 9]


def test_a_users_message_stands_between_what_the_template_puts_around_it(
    tiny: LoadedModel,
) -> None:
    before, after = user_turn(tiny.tokenizer)
    end, user = 0, 1
    assert before == (user, *tiny.tokenizer.encode("user: ", parse_special=False))
    assert after == (end, user)


def test_what_is_measured_is_how_often_head_and_model_agree(net: HeadNet) -> None:
    ids = net.vocabulary
    tokens = torch.full((DEPTH + 3,), 3)
    text = Text(tokens, torch.zeros(len(tokens), 64, dtype=torch.bfloat16), tokens)
    with torch.no_grad():
        net.inner.zero_(), net.outer.zero_()
    assert measure(net, Positions.of([text])).accepted == (1.0,) * DEPTH  # all logits equal: id 0
    other = torch.full_like(tokens, int(ids[1]))
    report = measure(net, Positions.of([Text(tokens, text.hidden, other)]))
    assert report.accepted == (0.0,) * DEPTH
    assert report.num_positions == 3


def test_a_head_learns_what_follows_from_its_inputs(net: HeadNet) -> None:
    tokens = net.vocabulary[torch.randint(5, (2000,))]
    hidden = torch.randn(len(tokens), 64, dtype=torch.bfloat16)
    data = Positions.of([Text(tokens, hidden, tokens)])  # each token says itself again
    before = measure(net, data).accepted[0]
    settings = TrainingSettings(seconds=60.0, learning_rate=1e-2)
    learn(net, data, settings, Silence(), clock=partial(next, count()))
    assert measure(net, data).accepted[0] > max(0.6, before)


async def test_a_head_is_trained_on_what_its_model_writes(tiny: LoadedModel) -> None:
    settings = TrainingSettings(num_tokens=2000, seconds=0.5, hidden=HIDDEN, vocabulary=64)
    head, report = await train(tiny, settings, Silence())
    head.check(64, tiny.model.spec.vocab_size)
    assert report.num_positions > 20
    assert len(report.accepted) == DEPTH

"""Draft heads: files, shapes, arithmetic, and what one is trained on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from engine.errors import ModelError
from engine.model.llama import LlamaModel
from engine.model.load import LoadedModel, load_model
from engine.progress import Silence
from engine.speculation.draft_head import DraftHead, HeadWeights, SequencePages, read_head
from engine.speculation.head_training import (
    CIRCLE,
    DEPTH,
    OPENINGS,
    PAGE_SIZE,
    Batch,
    HeadNet,
    Text,
    TrainingSettings,
    features,
    learn,
    loss_of,
    measure,
    most_frequent,
    save_head,
    scale_of,
    train,
    up_to_circle,
    user_turn,
)
from engine.speculation.loading import load_drafter, packaged_head
from kernels.linear import linear
from kernels.ragged import RaggedBatch
from kvstore.memory import PageMemory
from tests.tiny_models import write_folder

HIDDEN = 48
NUM_PAGES = 4
Answer = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_folder(tmp_path_factory.mktemp("model") / "tiny")
    return load_model(str(folder), weights="bf16")


@pytest.fixture
def net(tiny: LoadedModel) -> HeadNet:
    assert isinstance(tiny.model, LlamaModel)
    torch.manual_seed(0)
    return HeadNet(tiny.model.weights, torch.tensor([3, 5, 8, 40, 41]), HIDDEN, scale=1.0)


@pytest.fixture
def head(net: HeadNet) -> HeadWeights:
    return net.weights()


@pytest.fixture
def memory(tiny: LoadedModel) -> PageMemory:
    return PageMemory(tiny.model.spec.page_layout(PAGE_SIZE), NUM_PAGES)


def answers_of(lengths: list[tuple[int, int]], seed: int = 1) -> list[Answer]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 200, (number,), generator=generator).tolist())

    return [(tokens(prompt), tokens(answer)) for prompt, answer in lengths]


def drafter_of(
    head: HeadWeights, tiny: LoadedModel, memory: PageMemory, num_pages: int = NUM_PAGES
) -> DraftHead:
    pages = SequencePages(memory.kv, memory.layout, lambda name: range(num_pages))
    return DraftHead(head, tiny.model, pages, Greedy())


class Greedy(dict[str, object]):
    """Generations all of which take the likeliest token."""

    def __missing__(self, name: str) -> Greedy:
        return self

    needs_logits = False


def run_target(tiny: LoadedModel, memory: PageMemory, tokens: torch.Tensor) -> NDArray[np.float32]:
    """Fills the pages; the last token's hidden row ``[H]``."""
    assert isinstance(tiny.model, LlamaModel)
    hidden = np.empty((1, tiny.model.weights.width), dtype=np.float32)
    batch = RaggedBatch(
        token_ids=tokens.numpy(),
        positions=np.arange(len(tokens)),
        query_starts=np.array([0, len(tokens)]),
        page_tables=np.arange(NUM_PAGES, dtype=np.int32)[None],
        logit_rows=np.array([len(tokens) - 1]),
        best_only=True,
        hidden=hidden,
    )
    tiny.model.forward(batch, memory.kv, memory.layout)
    return hidden[0]


def test_a_head_drafts_as_it_was_taught(tiny: LoadedModel, memory: PageMemory) -> None:
    """The same states and logits, whatever stands in the pages behind the target's keys."""
    assert isinstance(tiny.model, LlamaModel)
    answers = answers_of([(7, 12), (40, 30)])
    texts = features(tiny.model, answers, Silence())
    torch.manual_seed(0)
    net = HeadNet(tiny.model.weights, torch.arange(0, 250, 2), 0, scale_of(texts))
    batch = Batch.of(texts)
    with torch.no_grad():
        expected = [logits for _, logits in net.steps(batch)]
    drafter = drafter_of(net.weights(), tiny, memory)
    for text, start in ((0, 0), (0, 8), (1, 0), (1, 26)):
        whole = torch.tensor([*answers[text][0], *answers[text][1]])
        end = texts[text].first + start + 1
        state = run_target(tiny, memory, whole[:end])
        torch.testing.assert_close(
            torch.from_numpy(state), batch.hidden[text, start].float(), atol=0.03, rtol=0.01
        )
        drafter.begin("a", whole[:end].tolist(), "")
        drafter.extend("a", [int(whole[end])], state)
        rows = drafter.rows(["a"])
        for depth, logits in enumerate(expected, 1):
            assert rows.tokens == [int(whole[end + depth - 1])]
            found, state = drafter.run(rows)
            error = (torch.from_numpy(found[0]) - logits[text, start]).abs()
            assert error.mean() < 0.1 * logits[text, start].std()  # 8 bits against 32
            rows = rows.after([int(whole[end + depth])], [*state])


def test_a_head_drafts_for_several_sequences_what_it_drafts_for_each(
    tiny: LoadedModel, memory: PageMemory, head: HeadWeights
) -> None:
    drafter = drafter_of(head, tiny, memory)
    whole = torch.tensor(answers_of([(30, 0)])[0][0])
    states = {}
    for name, length in (("a", 20), ("b", 25), ("c", 29)):
        states[name] = run_target(tiny, memory, whole[:length])
        drafter.begin(name, whole[:length].tolist(), "")
        drafter.extend(name, [int(whole[length])], states[name])
    # The same pages stand for all three: each alone first, none longer than the others' beginning.
    alone = {name: drafter.propose({name: most})[name] for name, most in (("a", 1), ("b", 1))}
    both = drafter.propose({"a": 1, "b": 1})
    assert both == alone
    longest = drafter.propose({"a": 1, "c": 3})
    assert longest["a"] == alone["a"]
    assert len(longest["c"].tokens) == 3


def test_a_head_drafts_as_far_as_its_sequence_has_pages(
    tiny: LoadedModel, memory: PageMemory, head: HeadWeights
) -> None:
    drafter = drafter_of(head, tiny, memory, num_pages=1)
    state = np.zeros(drafter.hidden_width, dtype=np.float32)
    for num_tokens, expected in ((PAGE_SIZE - 3, 3), (PAGE_SIZE - 1, 2), (PAGE_SIZE, 1)):
        drafter.begin("a", [7] * (num_tokens - 1), "")
        drafter.extend("a", [8], state)
        assert len(drafter.propose({"a": 3})["a"].tokens) == expected
    drafter.extend("a", [8], state)
    assert drafter.propose({"a": 3})["a"].tokens == ()


def test_a_saved_head_is_read_again(head: HeadWeights, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(head, path, "tiny")
    found = read_head(path)
    for name in ("state_norm", "token_norm", "out_norm", "vocabulary"):
        assert torch.equal(getattr(found, name), getattr(head, name))
    for name in ("from_state", "from_token", "qkv", "out", "gate_up", "down"):
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
    save_file({"qkv": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="is no draft head"):
        read_head(path)
    save_file({"qkv": torch.zeros(2)}, path, {"format": "quire-draft-head-2"})
    with pytest.raises(ModelError, match="cannot be read"):
        read_head(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_norm": torch.ones(63)}, r"out_norm is \[63\], the target needs \[64\]"),
        ({"from_state": torch.ones(64, 63)}, "from_state is"),
        ({"qkv": torch.ones(8, 64)}, "qkv is"),
        ({"down": torch.ones(32, HIDDEN)}, "down is"),
        ({"down": torch.ones(64)}, "is"),
        ({"down": torch.tensor(1.0)}, "is"),
        ({"down": torch.ones(64, 0), "gate_up": torch.ones(0, 64)}, "down must have inputs"),
        ({"vocabulary": torch.tensor(5)}, "vocabulary is"),
        ({"vocabulary": torch.tensor([5, 100_000])}, "vocabulary must be ids from 0 to"),
        ({"vocabulary": torch.tensor([-1])}, "vocabulary must be ids"),
        ({"vocabulary": torch.tensor([], dtype=torch.int64)}, "vocabulary must be ids"),
        ({"out_norm": torch.full((64,), torch.nan)}, "out_norm has"),
    ],
)
def test_a_head_of_another_shape_is_refused_by_name(
    changes: dict[str, torch.Tensor],
    message: str,
    head: HeadWeights,
    tiny: LoadedModel,
    memory: PageMemory,
) -> None:
    with pytest.raises(ModelError, match=message):
        drafter_of(replace(head, **changes), tiny, memory)


def test_models_without_hidden_rows_or_a_head_are_refused(
    head: HeadWeights, tiny: LoadedModel, memory: PageMemory
) -> None:
    with pytest.raises(ModelError, match="no hidden rows"):
        drafter_of(head, load_model("hash"), memory)
    with pytest.raises(ModelError, match="quire draft train"):
        load_drafter("head", tiny)
    with pytest.raises(ModelError, match="cannot be read"):
        load_drafter("head", tiny, "nowhere.safetensors")


def test_the_head_that_comes_with_the_package_is_found_by_the_models_digest(
    tiny: LoadedModel,
) -> None:
    found = packaged_head(load_model("smollm2", weights="int8").model.spec.digest)
    assert found is not None
    assert found.name == "smollm2.safetensors"
    assert found.stat().st_size < 10e6
    assert read_head(found).vocabulary.numel() > 1000
    assert packaged_head(tiny.model.spec.digest) is None


def test_a_head_proposes_nothing_before_it_was_told_a_hidden_row(
    head: HeadWeights, tiny: LoadedModel, memory: PageMemory
) -> None:
    drafter = drafter_of(head, tiny, memory)
    drafter.begin("a", [1, 2], "")
    assert drafter.propose({"a": 3})["a"].tokens == ()
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


def test_an_answer_ends_where_it_begins_to_go_in_circles() -> None:
    said = list(range(100, 100 + CIRCLE))
    assert up_to_circle([1, 2, *said, 3, *said, 4, 5]) == (1, 2, *said, 3, *said)
    assert up_to_circle([7] * 50) == (7,) * (CIRCLE + 1)
    assert up_to_circle([*said, 3, *said[:-1], 4]) == (*said, 3, *said[:-1], 4)
    assert up_to_circle([]) == ()


def test_users_begin_their_messages_in_many_ways() -> None:
    openings = OPENINGS.read_text().splitlines()
    assert len(openings) == len(set(openings)) > 100
    assert all(line == line.strip() and line for line in openings)


def text_of(net: HeadNet, tokens: torch.Tensor, best: torch.Tensor) -> Text:
    """After a prompt of two tokens, with random rows of everything else."""
    target = net.target
    heads = (len(tokens) + 2, target.num_kv_heads, target.head_dim)
    keys, values = torch.randn(2, *heads, dtype=torch.bfloat16)
    return Text(
        tokens, torch.randn(len(tokens), target.width, dtype=torch.bfloat16), best, keys, values
    )


def test_what_is_measured_is_how_often_head_and_model_agree(net: HeadNet) -> None:
    ids = net.vocabulary
    tokens = torch.full((DEPTH + 3,), 3)
    with torch.no_grad():
        net.out_norm.zero_()  # all logits are equal: the first id
    assert measure(net, [text_of(net, tokens, tokens)]).accepted == (1.0,) * DEPTH
    other = torch.full_like(tokens, int(ids[1]))
    longer = torch.full((DEPTH + 7,), 3)
    texts = [text_of(net, tokens, other), text_of(net, longer, longer)]
    report = measure(net, texts)
    assert report.accepted == (0.7, *(1.0,) * (DEPTH - 1))
    assert report.num_positions == 10


def test_texts_that_are_shorter_change_nothing_beside_longer_ones(net: HeadNet) -> None:
    tokens = net.vocabulary[torch.randint(5, (20,))]
    short, long = text_of(net, tokens[:9], tokens[:9]), text_of(net, tokens, tokens)
    alone = [loss_of(net, Batch.of([text])) * text.num_starts for text in (short, long)]
    both = loss_of(net, Batch.of([short, long])) * (short.num_starts + long.num_starts)
    torch.testing.assert_close(both, sum(alone))


def test_a_head_learns_what_follows_from_its_inputs(net: HeadNet) -> None:
    tokens = net.vocabulary[torch.randint(5, (40, 50))]
    texts = [text_of(net, each, each) for each in tokens]  # each token says itself again
    before = measure(net, texts).accepted[0]
    settings = TrainingSettings(seconds=60.0, learning_rate=1e-2)
    learn(net, texts, settings, Silence(), clock=partial(next, count()))
    assert measure(net, texts).accepted[0] > max(0.6, before)


def test_a_head_begins_as_the_last_layer(tiny: LoadedModel) -> None:
    assert isinstance(tiny.model, LlamaModel)
    target = tiny.model.weights
    last = target.layers[-1]
    net = HeadNet(target, torch.tensor([3]), 0, scale=1.0)
    rows = torch.randn(5, target.width)
    packed = net.weights().decoder(target).layers[0]
    for name in ("qkv", "gate_up"):
        found, wanted = (linear(rows, getattr(each, name)) for each in (packed, last))
        assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()  # 8 bits against 16


async def test_a_head_is_trained_on_what_its_model_writes(tiny: LoadedModel) -> None:
    settings = TrainingSettings(num_tokens=2000, seconds=0.5, hidden=HIDDEN, vocabulary=64)
    head, report = await train(tiny, settings, Silence())
    assert isinstance(tiny.model, LlamaModel)
    head.check(tiny.model.weights)
    assert report.num_positions > 20
    assert len(report.accepted) == DEPTH

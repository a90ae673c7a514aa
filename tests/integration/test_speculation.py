"""With drafts the same stream as without, whatever is drafted and whoever drafts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.completion import Completion, Finished, StreamItem
from engine.errors import ModelError
from engine.local import AsyncLocalEngine
from engine.model.llama import LlamaModel
from engine.model.load import LoadedModel, load_draft, load_model
from engine.modes import SPECULATION_MODES
from engine.recording import replay
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits
from engine.speculation import DraftModel, Speculator, SpeculatorPair, StepTimes
from engine.speculation.head_training import HeadNet, save_head
from engine.speculation.proposer import Draft, Floats
from tests.integration.cluster import running
from tests.integration.streams import KINDS, PROMPT, collected, deltas_of, essence
from tests.tiny_models import write_folder


class Free(StepTimes):
    """Rows that cost nothing, whatever steps take: every draft is verified."""

    def __init__(self) -> None:
        super().__init__({1: 1.0, 256: 1.0})

    def learn(self, num_rows: int, seconds: float, attention_s: float = 0.0) -> None:
        pass


FREE = Free()
REPETITIVE = SamplingParams(temperature=1.0, seed=3, allowed_token_ids=(97, 98), max_tokens=80)

Spoil = Callable[[int, int], int]
"""From a position in a draft and the right token to what is drafted."""

SPOILED: dict[str, Spoil] = {
    "always right": lambda position, token: token,
    "wrong at every third": lambda position, token: token + (position % 3 == 2),
    "always wrong": lambda position, token: (token + 1) % 250,
    "no tokens": lambda position, token: 2**31 if position % 2 else -7,
    "raises": lambda position, token: token // (position - 1),
}


class Knowing:
    """Knows how every sequence goes on, but spoils what it says."""

    name = "knowing"
    expects = None
    hidden_width = 0
    remembers = False

    def __init__(self, spoil: Spoil, sequences: Iterable[Sequence[int]]) -> None:
        self._spoil = spoil
        self._sequences = [list(each) for each in sequences]
        self._known: dict[str, list[int]] = {}

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        self._known[name] = list(tokens)

    def extend(self, name: str, tokens: Sequence[int], hidden: Floats | None = None) -> None:
        self._known[name] += tokens

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        return {name: self._draft(name, number) for name, number in most.items()}

    def _draft(self, name: str, most: int) -> Draft:
        have = self._known[name]
        for sequence in self._sequences:
            if sequence[: len(have)] == have:
                right = sequence[len(have) : len(have) + most]
                return Draft(tuple(self._spoil(at, token) for at, token in enumerate(right)), 0.9)
        return Draft()

    def start_s(self, name: str) -> float:
        return 0.0

    def draft_s(self, longest: int) -> float:
        return 0.0

    def forget(self, name: str) -> None:
        del self._known[name]


@asynccontextmanager
async def drafting(
    spoil: Spoil, sequences: Iterable[Sequence[int]], **options: object
) -> AsyncIterator[AsyncLocalEngine]:
    """An engine of the hash model that drafts from the given sequences."""
    async with AsyncLocalEngine(
        "hash",
        **({"page_size": 16, "check_pages": True} | options),  # type: ignore[arg-type]
    ) as engine:
        core = engine.engine.core
        vocab_size = core.model.spec.vocab_size
        core.speculator = Speculator(Knowing(spoil, sequences), vocab_size, FREE)
        yield engine
        assert core.scheduler.num_sequences == 0


async def items_of(
    client: AsyncLocalEngine, params: SamplingParams, resume: Sequence[object] = ()
) -> list[StreamItem]:
    return [item async for item in client.items(PROMPT, params, resume)]  # type: ignore[arg-type]


async def unbroken(params: SamplingParams) -> list[StreamItem]:
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        return await items_of(engine, params)


def sequences_of(items: Iterable[StreamItem], params: SamplingParams) -> list[list[int]]:
    """Prompt and output of every choice."""
    whole = collected(items, params).completions()
    return [[*PROMPT, *each.token_ids] for each in whole]


def check_same(found: list[StreamItem], expected: list[StreamItem], params: SamplingParams) -> None:
    for choice in range(params.n):
        assert deltas_of(found, choice) == deltas_of(expected, choice)
    whole, other = (collected(items, params).completions() for items in (found, expected))
    assert essence(whole) == essence(other)


def accepted(items: Sequence[StreamItem]) -> int:
    assert isinstance(items[-1], Finished)
    return items[-1].usage.accepted_tokens


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("kind", KINDS)
async def test_with_any_drafts_a_stream_is_the_one_without(kind: str, spoiled: str) -> None:
    params = KINDS[kind]
    expected = await unbroken(params)
    async with drafting(SPOILED[spoiled], sequences_of(expected, params)) as engine:
        found = await items_of(engine, params)
        failures = engine.engine.core.speculator.all_stats[0].failures  # type: ignore[union-attr]
    check_same(found, expected, params)
    assert (failures > 0) == (spoiled == "raises")
    if spoiled in ("always wrong", "no tokens"):
        assert accepted(found) == 0
    if spoiled == "always right":
        lengths = [len(each.token_ids) for each in collected(found, params).completions()]
        # The prompt's pass brings one token, every other one up to 16.
        assert accepted(found) == sum(length - 1 - -(-(length - 1) // 16) for length in lengths)


@pytest.mark.parametrize("spoiled", ["always right", "wrong at every third"])
async def test_resumed_anywhere_a_stream_with_drafts_goes_on_as_unbroken(spoiled: str) -> None:
    params = KINDS["penalties"]
    expected = await unbroken(params)
    async with drafting(SPOILED[spoiled], sequences_of(expected, params)) as engine:
        for cut in range(1, len(expected) - 1):
            before = collected(expected[:cut], params)
            after = await items_of(engine, params, before.so_far())
            assert deltas_of(after, 0) == deltas_of(expected[cut:], 0), cut


@pytest.mark.parametrize("spoiled", ["always right", "wrong at every third", "always wrong"])
async def test_a_batch_in_which_some_draft_and_pages_run_out_gives_every_stream_its_tokens(
    spoiled: str,
) -> None:
    """Twelve growing streams in a pool for about five; only those of even numbers have drafts."""
    wanted = [
        replace(KINDS["penalties"], seed=seed, max_tokens=60, ignore_eos=True) for seed in range(12)
    ]
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        alone = [(await engine.generate([PROMPT], params))[0] for params in wanted]
    known = [[*PROMPT, *each.token_ids] for each in alone[::2]]
    limits = SchedulerLimits(max_sequences=12, max_step_tokens=64, chunk_tokens=32)
    async with drafting(SPOILED[spoiled], known, pool_tokens=24 * 16, limits=limits) as engine:
        found = await asyncio.gather(*(engine.generate([PROMPT], params) for params in wanted))
    together = [completions[0] for completions in found]
    assert essence(together) == essence(alone)
    assert sum(each.usage.preemptions for each in together) > 0
    num_right = sum(each.usage.accepted_tokens for each in together[::2])
    assert (num_right > 0) == (spoiled != "always wrong")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.3]),
        top_p=st.sampled_from([0.5, 0.95, 1.0]),
        top_k=st.sampled_from([0, 5]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.4]),
        presence_penalty=st.sampled_from([0.0, 0.8]),
        frequency_penalty=st.sampled_from([0.0, 0.8]),
        logit_bias=st.sampled_from([{}, {97: 4.0, 98: 3.0}]),
        seed=st.integers(0, 2**64 - 1),
        n=st.sampled_from([1, 3]),
        max_tokens=st.integers(1, 40),
        min_tokens=st.sampled_from([0, 1]),
        stop=st.sampled_from([(), ("a",), ("ab", "\n")]),
        logprobs=st.sampled_from([None, 0, 3]),
        ignore_eos=st.booleans(),
    ),
    wrong=st.sets(st.integers(0, 14)),
)
async def test_no_option_and_no_draft_changes_a_token(
    params: SamplingParams, wrong: set[int]
) -> None:
    expected = await unbroken(params)
    known = sequences_of(expected, params)
    async with drafting(lambda at, token: token ^ (at in wrong), known) as engine:
        check_same(await items_of(engine, params), expected, params)


async def test_tokens_follow_the_filtered_softmax_with_drafts_as_without() -> None:
    """Chi-square over 2,000 seeds of the first two tokens; the second one is drafted.

    It depends on the first one, so it is compared among those that begin with the most frequent.
    """
    num_seeds = 2000
    wanted = SamplingParams(temperature=1.0, top_k=4, max_tokens=3, logprobs=4)
    each_seed = [replace(wanted, seed=seed) for seed in range(num_seeds)]
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        some = await engine.generate([PROMPT] * 20, each_seed[:20])
    known = [[*PROMPT, *each.token_ids] for each in some]
    limits = SchedulerLimits(max_sequences=64)
    async with drafting(SPOILED["always right"], known, limits=limits) as engine:
        found = await engine.generate([PROMPT] * num_seeds, each_seed)
    assert 0 < sum(each.usage.accepted_tokens for each in found) < num_seeds
    first = Counter(each.token_ids[0] for each in found).most_common(1)[0][0]
    check_softmax(found, position=0)
    check_softmax([each for each in found if each.token_ids[0] == first], position=1)


def check_softmax(found: Sequence[Completion], position: int) -> None:
    """Of completions whose tokens before ``position`` are the same."""
    assert found[0].logprobs is not None
    top = found[0].logprobs[position].top
    chances = np.exp([logprob for _, logprob in top])
    expected = chances / chances.sum() * len(found)
    counts = np.array(
        [sum(each.token_ids[position] == token for each in found) for token, _ in top]
    )
    assert counts.sum() == len(found)
    assert expected.min() > 5
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.3, (counts, expected)  # 3 degrees of freedom, p = 0.001


async def test_a_recording_with_drafts_replays(tmp_path: object, redis_url: str) -> None:
    path = tmp_path / "events"  # type: ignore[operator]
    decode = {"speculate": "lookup", "record": path}
    async with running(redis_url, decode=decode) as cluster, cluster.client() as client:
        await client.generate([PROMPT], REPETITIVE)
    answers = list(replay(path))
    assert len(answers) > 5
    assert answers == [None] * len(answers)


async def test_a_decode_service_that_copies_gives_the_same_stream_in_fewer_passes(
    redis_url: str,
) -> None:
    async with AsyncLocalEngine("hash", page_size=16) as engine:
        expected = await engine.generate([PROMPT], REPETITIVE)
    decode = {"speculate": "history"}
    async with running(redis_url, decode=decode) as cluster, cluster.client() as client:
        speculator = cluster.decode[0].core.speculator
        assert speculator is not None
        speculator.times = FREE
        found = await client.generate([PROMPT], REPETITIVE)
    assert essence(found) == essence(expected)
    usage = found[0].usage
    assert usage.drafted_tokens >= usage.accepted_tokens > 0
    assert expected[0].usage.drafted_tokens == 0


# -- a model that drafts


def model_options(**more: object) -> dict[str, object]:
    """The hash model drafts for itself: with the noise of the position it is always right."""
    return {"page_size": 16, "check_pages": True, "speculate": "model", **more}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_model_that_drafts_chooses_with_the_targets_noise(kind: str) -> None:
    params = KINDS[kind]
    expected = await unbroken(params)
    async with AsyncLocalEngine("hash", **model_options()) as engine:  # type: ignore[arg-type]
        core = engine.engine.core
        assert isinstance(core.speculator, Speculator)
        core.speculator.times = FREE
        found = await items_of(engine, params)
        drafter = core.speculator.proposer
        assert isinstance(drafter, DraftModel)
        assert drafter.pool.num_available == core.settings.num_pages
    check_same(found, expected, params)
    usage = found[-1].usage  # type: ignore[union-attr]
    assert usage.accepted_tokens > 0
    # Only what came after an end inside a draft was drafted in vain.
    assert usage.drafted_tokens - usage.accepted_tokens <= 15 * params.n


async def test_a_model_that_drafts_feeds_only_what_it_has_not_seen() -> None:
    """After right drafts one token, after wrong ones what was chosen instead."""
    params = replace(KINDS["sampled"], max_tokens=40, ignore_eos=True)
    expected = await unbroken(params)
    async with AsyncLocalEngine("hash", **model_options()) as engine:  # type: ignore[arg-type]
        speculator = engine.engine.core.speculator
        assert isinstance(speculator, Speculator)
        speculator.times = FREE
        drafter = speculator.proposer
        assert isinstance(drafter, DraftModel)
        fed: list[int] = []
        forward = drafter._forward

        def counted(tokens: Mapping[str, list[int]], **how: bool) -> np.ndarray:
            fed.extend(map(len, tokens.values()))
            return forward(tokens, **how)

        drafter._forward = counted  # type: ignore[method-assign]
        found = await items_of(engine, params)
    check_same(found, expected, params)
    # Each token once, but the last of a draft, which was never fed, and its successor.
    assert sum(fed) <= len(PROMPT) + 40 + 4
    assert max(fed[1:]) <= 2


async def test_a_model_that_drafts_without_room_leaves_streams_as_they_are() -> None:
    params = replace(KINDS["sampled"], max_tokens=60, ignore_eos=True)
    expected = await unbroken(params)
    async with AsyncLocalEngine("hash", **model_options()) as engine:  # type: ignore[arg-type]
        core = engine.engine.core
        small = DraftModel(core.model, 5, 16, core._generations)
        core.speculator = Speculator(small, core.model.spec.vocab_size, FREE)
        found = await items_of(engine, params)
        assert small.pool.num_available == 5
    check_same(found, expected, params)
    assert 0 < accepted(found) < 55


async def test_a_decode_service_takes_a_model_that_drafts(redis_url: str) -> None:
    params = replace(KINDS["sampled"], max_tokens=40)
    expected = await unbroken(params)
    async with running(redis_url, decode={"speculate": "model", "draft": "hash"}) as cluster:
        async with cluster.client() as client:
            found = [item async for item in client.items(PROMPT, params)]
    check_same(found, expected, params)


# -- a head that drafts


def heads_own_words(target: LoadedModel, path: Path) -> Path:
    """A head for a model as it is before it has learned anything: the model's last layer."""
    assert isinstance(target.model, LlamaModel)
    torch.manual_seed(0)
    net = HeadNet(target.model.weights, torch.arange(3, 200), 0, scale=1.0)
    save_head(net.weights(), path, target.model.spec.digest)
    return path


@pytest.mark.parametrize("speculate", ["head", "auto"])
@pytest.mark.parametrize("kind", KINDS)
async def test_with_a_head_a_stream_is_the_one_without(
    kind: str, speculate: str, tiny: LoadedModel, tmp_path: Path
) -> None:
    """Whether it drafts greedily or with noise, within a page, over its end, or preempted; alone or
    where nothing is to be copied."""
    params = KINDS[kind]
    path = heads_own_words(tiny, tmp_path / "head.safetensors")
    async with AsyncLocalEngine(tiny, page_size=16) as engine:
        expected = await items_of(engine, params)
    for pool_tokens in (4096, 160):
        async with AsyncLocalEngine(
            tiny,
            page_size=16,
            check_pages=True,
            pool_tokens=pool_tokens,
            speculate=speculate,
            draft=str(path),
        ) as engine:
            speculator = engine.engine.core.speculator
            assert speculator is not None
            speculator.times = FREE
            head = speculator.then if isinstance(speculator, SpeculatorPair) else speculator
            head.proposer.draft_s = lambda longest: 0.0  # type: ignore[method-assign]
            found = await items_of(engine, params)
            assert not any(stats.failures for stats in speculator.all_stats)
            assert head.stats.proposed > 0
        check_same(found, expected, params)
    usage = found[-1].usage  # type: ignore[union-attr]
    assert usage.drafted_tokens > 0


def test_a_model_of_other_tokens_cannot_draft(tmp_path: Path) -> None:
    target = load_model(str(write_folder(tmp_path / "tiny")))
    with pytest.raises(ModelError, match=r"hash cannot draft for .*tiny: its tokens are others"):
        load_draft(target, "hash", "fp32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_folder(tmp_path_factory.mktemp("model") / "tiny")), weights="bf16")


# -- the real model

COPIED = (
    "Copy: the cat sat on the mat, the cat sat on the hat, the cat sat on the mat. Copy: the cat",
    "def add(a, b):\n    return a + b\n\ndef add_three(a, b, c):\n    return",
)


SLOW = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("int4", "bf16")]


@pytest.fixture(scope="module", params=["int8", *SLOW])
def smollm2(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model("smollm2", weights=request.param)


async def test_the_real_model_writes_the_same_with_every_proposer(smollm2: LoadedModel) -> None:
    """Greedy and sampled streams together in one batch, of two choices each."""
    wanted = [
        SamplingParams(temperature=0, seed=0, max_tokens=40),
        SamplingParams(temperature=0.7, top_p=0.9, seed=1, n=2, max_tokens=40, logprobs=2),
        SamplingParams(temperature=1.3, min_p=0.05, seed=2, presence_penalty=0.5, max_tokens=40),
    ]
    prompts = [prompt for prompt in COPIED for _ in wanted]
    found = {}
    for speculate in ("off", *SPECULATION_MODES[1:]):
        options = {"speculate": speculate, "check_pages": True}
        async with AsyncLocalEngine(smollm2, **options) as engine:  # type: ignore[arg-type]
            if engine.engine.core.speculator is not None:
                engine.engine.core.speculator.times = FREE
            found[speculate] = await engine.generate(prompts, wanted * len(COPIED))
    for speculate in SPECULATION_MODES[1:]:
        assert essence(found[speculate]) == essence(found["off"])
        assert sum(each.usage.accepted_tokens for each in found[speculate]) > 0

"""The real model: against transformers, and against itself in every way a request can run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from engine.completion import Completion
from engine.local import AsyncLocalEngine
from engine.model.gguf_config import config_from_gguf
from engine.model.gguf_file import open_gguf, stored_tensors
from engine.model.load import LoadedModel, load_model, packaged_file
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerLimits
from tests.integration.cluster import running
from tests.integration.prompts import PROMPTS

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=1)
# fp32 sums in another order: the two differ by this much at most in a log-probability.
LOGPROB_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def oracle() -> torch.nn.Module:
    """transformers' implementation in fp32, with the same dequantized weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    file = open_gguf(packaged_file("smollm2"))
    ours = config_from_gguf(file.fields, file.tensors)
    config = LlamaConfig(
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        vocab_size=ours.vocab_size,
        max_position_embeddings=ours.max_context,
        rms_norm_eps=ours.norm_eps,
        tie_word_embeddings=ours.tied_head,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    state = {name: tensor.read() for name, tensor in stored_tensors(file, ours).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"]
    model.tie_weights()
    return model


async def test_greedy_tokens_equal_transformers(
    smollm2: LoadedModel, oracle: torch.nn.Module
) -> None:
    """By induction over positions: at each one transformers, given the same tokens so far, has its
    highest logit where ours is."""
    async with AsyncLocalEngine(smollm2) as engine:
        completions = await engine.generate(PROMPTS, GREEDY)
    assert len(completions) >= 20
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert len(completion.token_ids) == 64
        expected, logprobs = follow(oracle, completion)
        assert completion.token_ids == expected, prompt
        assert completion.logprobs is not None
        for ours, theirs in zip(completion.logprobs, logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs, abs=LOGPROB_TOLERANCE), prompt


@torch.no_grad()
def follow(
    oracle: torch.nn.Module, completion: Completion
) -> tuple[tuple[int, ...], Sequence[float]]:
    """The oracle's choice at each output position, and its log-probability of ours."""
    ids = torch.tensor([completion.prompt_ids + completion.token_ids])
    logits = oracle(ids).logits[0, len(completion.prompt_ids) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, ids[0, len(completion.prompt_ids) :, None])
    return tuple(logits.argmax(-1).tolist()), logprobs[:, 0].tolist()


def essence(completions: list[Completion]) -> list[tuple[object, ...]]:
    return [(each.token_ids, each.text, each.logprobs, each.finish_reason) for each in completions]


TEXT = " ".join(PROMPTS[:12])

REQUESTS = {
    "greedy": SamplingParams(temperature=0, max_tokens=16, logprobs=3),
    "sampled": SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=16, logprobs=0),
    "choices": SamplingParams(temperature=1.2, min_p=0.02, seed=5, n=3, max_tokens=12),
    "penalties": SamplingParams(
        temperature=0.7,
        seed=3,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        max_tokens=16,
    ),
    "stops": SamplingParams(temperature=0, stop=(" the", "\n\n"), min_tokens=2, max_tokens=24),
}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
async def test_two_services_equal_one_engine(redis_url: str, weights: str) -> None:
    model = load_model("smollm2", weights=weights)
    async with AsyncLocalEngine(model, pool_tokens=4096) as engine:
        expected = {
            name: essence(await engine.generate([TEXT], params))
            for name, params in REQUESTS.items()
        }
    settings = {"weights": weights, "pool_tokens": 4096, "page_size": 32}
    async with running(redis_url, loaded=model, **settings) as cluster:
        async with cluster.client() as client:
            for name, params in REQUESTS.items():
                found = await client.generate([TEXT], params)
                assert essence(found) == expected[name], name
            assert cluster.prefill[0].model.num_steps > 0


def mixed(count: int) -> tuple[list[str], list[SamplingParams]]:
    prompts = [(PROMPTS[i % len(PROMPTS)] + " ") * (1 + i % 5) for i in range(count)]
    params = [
        SamplingParams(temperature=(0.0, 0.8)[i % 2], seed=i, max_tokens=4 + i % 9, logprobs=i % 3)
        for i in range(count)
    ]
    return prompts, params


async def test_32_concurrent_requests_equal_the_same_ones_one_by_one(
    smollm2: LoadedModel, redis_url: str
) -> None:
    prompts, params = mixed(32)
    async with AsyncLocalEngine(smollm2) as engine:
        single = [
            await engine.generate([prompt], each)
            for prompt, each in zip(prompts, params, strict=True)
        ]
    expected = essence([each for completions in single for each in completions])
    settings = {"page_size": 32, "pool_tokens": 16384, "min_remote_tokens": 24}
    async with running(redis_url, loaded=smollm2, **settings) as cluster:
        async with cluster.client() as client:
            found = await client.generate(prompts, params)
    assert essence(found) == expected
    assert {each.prefilled for each in found} >= {"remote", "local"}


SLOW_CHUNKS = [pytest.param(chunk, marks=pytest.mark.slow) for chunk in (16, 512)]


@pytest.mark.parametrize("chunk", [100, *SLOW_CHUNKS])
async def test_the_size_of_chunks_changes_nothing(smollm2: LoadedModel, chunk: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=5)
    prompt = TEXT * 4
    limits = SchedulerLimits(chunk_tokens=chunk, max_step_tokens=512)
    async with AsyncLocalEngine(smollm2, limits=limits) as engine:
        found = await engine.generate([prompt], params)
    whole = SchedulerLimits(chunk_tokens=4096, max_step_tokens=4096)
    async with AsyncLocalEngine(smollm2, limits=whole) as engine:
        expected = await engine.generate([prompt], params)
    assert essence(found) == essence(expected)


async def test_a_prefix_hit_equals_a_cold_start(smollm2: LoadedModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=5)
    async with AsyncLocalEngine(smollm2) as engine:
        cold = await engine.generate([TEXT + "And so"], params)
        warm = await engine.generate([TEXT + "And so"], params)
    assert essence(warm) == essence(cold)
    assert cold[0].usage.cached_tokens == 0
    assert warm[0].usage.cached_tokens == 96


async def test_preempted_equals_not_preempted(smollm2: LoadedModel) -> None:
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=40, ignore_eos=True, logprobs=1)
    prompts = PROMPTS[:6]
    async with AsyncLocalEngine(smollm2, page_size=16) as engine:
        expected = await engine.generate(prompts, params)
    small = AsyncLocalEngine(smollm2, page_size=16, pool_tokens=192, check_pages=True)
    async with small as engine:
        found = await engine.generate(prompts, params)
    assert sum(each.usage.preemptions for each in found) > 0
    assert essence(found) == essence(expected)


async def test_a_chat_answer_ends_by_itself(smollm2: LoadedModel) -> None:
    from engine.chat_template import ChatMessage

    question = [ChatMessage("user", "What is the capital of France? One word.")]
    async with AsyncLocalEngine(smollm2) as engine:
        (answer,) = await engine.generate([question], SamplingParams(temperature=0, max_tokens=64))
    assert answer.finish_reason == "stop"
    assert "Paris" in answer.text
    assert "<|im_end|>" not in answer.text

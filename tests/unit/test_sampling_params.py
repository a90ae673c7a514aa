"""Every field at its limits and past them, and of every wrong type."""

import math

import pytest

from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

HUGE = 10**5000  # more digits than Python prints
INFINITIES = [math.nan, math.inf, -math.inf]
NO_NUMBER = ["1", None, True, [1], 1j]
NO_INTEGER = ["1", True, 1.0, [1], math.nan, math.inf]
NO_LIST = [7, "7", b"7", None, 1.5]
NO_IDS = [[-1], [2**31], [2**63], [HUGE], [1.0], [True], ["1"], [None], [math.nan]]

ALLOWED = {
    "temperature": [0, 0.0, 1e-9, 1, 100],
    "top_p": [5e-324, 0.5, 1],
    "top_k": [0, 1, 2**31 - 1],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [5e-324, 1, 100],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0, 2],
    "logit_bias": [{}, {0: -100}, {2**31 - 1: 100}, dict.fromkeys(range(1024), 1.0)],
    "allowed_token_ids": [(), [0], [2**31 - 1]],
    "banned_token_ids": [(), [0], [2**31 - 1]],
    "seed": [None, 0, 2**64 - 1],
    "n": [1, 64],
    "max_tokens": [None, 1, 2**31 - 1],
    "min_tokens": [0, 2**31 - 1],
    "stop": ["x", (), ["x" * 256], ["x"] * 16, ["\U0001f600" * 256]],
    "stop_token_ids": [(), [0], range(1024)],
    "include_stop": [True, False],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, 20],
}
REFUSED = {
    "temperature": [-1e-9, 100.001, 1e308, -1, 2**31, 2**63, HUGE, *INFINITIES, *NO_NUMBER],
    "top_p": [0, -0.0, -1, 1.0000001, 2**31, 2**63, HUGE, *INFINITIES, *NO_NUMBER],
    "top_k": [-1, 2**31, 2**63, HUGE, None, *NO_INTEGER],
    "min_p": [-1e-9, 1.0000001, 2, 2**31, 2**63, HUGE, *INFINITIES, *NO_NUMBER],
    "repetition_penalty": [0, -1, 100.001, 2**31, 2**63, HUGE, *INFINITIES, *NO_NUMBER],
    "presence_penalty": [-2.001, 2.001, 2**31, 2**63, -HUGE, *INFINITIES, *NO_NUMBER],
    "frequency_penalty": [-2.001, 2.001, 2**31, 2**63, -HUGE, *INFINITIES, *NO_NUMBER],
    "logit_bias": [
        *[{0: value} for value in [-100.001, 100.001, 2**63, *INFINITIES, *NO_NUMBER]],
        *[{token_id: 1.0} for token_id in [-1, 2**31, 2**63, HUGE, 1.0, "1", None]],
        dict.fromkeys(range(1025), 1.0),
        [(1, 1.0)],
        None,
    ],
    "allowed_token_ids": [*NO_LIST, *NO_IDS, range(2**20 + 1)],
    "banned_token_ids": [*NO_LIST, *NO_IDS, range(2**20 + 1)],
    "seed": [-1, 2**64, HUGE, *NO_INTEGER],
    "n": [0, -1, 65, 2**31, 2**63, HUGE, None, *NO_INTEGER],
    "max_tokens": [0, -1, 2**31, 2**63, HUGE, *NO_INTEGER],
    "min_tokens": [-1, 2**31, 2**63, HUGE, None, *NO_INTEGER],
    "stop": ["", "x" * 257, "x" * 10_000, [""], ["a", "x" * 257], ["x"] * 17, [1], [None], 7, b"x",
             None, "\ud800"],
    "stop_token_ids": [*NO_LIST, *NO_IDS, range(1025), iter(int, 1)],
    "include_stop": [0, 1, None, "true"],
    "ignore_eos": [0, 1, None, "true"],
    "logprobs": [-1, 21, 10**9, 2**63, HUGE, *NO_INTEGER],
}  # fmt: skip


def test_the_tables_cover_every_field():
    fields = SamplingParams.__dataclass_fields__.keys()
    assert ALLOWED.keys() == REFUSED.keys() == fields


@pytest.mark.parametrize("field", ALLOWED)
def test_values_up_to_the_limits_are_allowed(field):
    for value in ALLOWED[field]:
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", REFUSED)
def test_values_past_the_limits_are_refused_by_name(field):
    for value in REFUSED[field]:
        with pytest.raises(InvalidRequest) as refusal:
            SamplingParams(**{field: value})
        assert refusal.value.field == field
        assert refusal.value.allowed
        assert len(str(refusal.value)) < 200


def test_min_tokens_may_reach_max_tokens_and_not_pass_it():
    SamplingParams(min_tokens=5, max_tokens=5)
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(min_tokens=6, max_tokens=5)
    assert refusal.value.field == "min_tokens"


def test_lists_become_tuples_and_numbers_become_floats():
    bias = {3: 1}
    params = SamplingParams(
        temperature=1,
        stop="\n\n",
        stop_token_ids=[1, 2],
        banned_token_ids=range(2),
        allowed_token_ids=[4],
        logit_bias=bias,
    )
    bias[3] = 50
    assert params.stop == ("\n\n",)
    assert params.stop_token_ids == (1, 2)
    assert params.banned_token_ids == (0, 1)
    assert params.allowed_token_ids == (4,)
    assert params.logit_bias == {3: 1.0}
    assert isinstance(params.temperature, float)
    assert isinstance(params.logit_bias[3], float)


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0, True), (0.0000099, True), (1e-5, False), (1, False)]
)
def test_a_temperature_of_almost_nothing_is_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).is_greedy is greedy


def test_a_request_without_a_seed_is_given_one_of_64_bits():
    seeds = {SamplingParams().with_seed().seed for _ in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) >= 2**48


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_a_request_keeps_its_own_seed(seed):
    assert SamplingParams(seed=seed, top_k=3).with_seed() == SamplingParams(seed=seed, top_k=3)


@pytest.mark.parametrize(
    "field", ["logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"]
)
def test_ids_outside_the_vocabulary_are_refused_by_name(field):
    def params(highest):
        ids = [0, highest]
        return SamplingParams(**{field: dict.fromkeys(ids, 1.0) if field == "logit_bias" else ids})

    params(99).check_against(vocab_size=100)
    with pytest.raises(InvalidRequest, match="token id 100; allowed: 0 to 99") as refusal:
        params(100).check_against(vocab_size=100)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("allowed", "banned"), [([], range(10)), ([3, 4], [4, 3, 9]), ([3], [3]), ([], [*range(10), 3])]
)
def test_banning_every_token_is_refused(allowed, banned):
    params = SamplingParams(allowed_token_ids=allowed, banned_token_ids=banned)
    with pytest.raises(InvalidRequest) as refusal:
        params.check_against(vocab_size=10)
    assert refusal.value.field == "banned_token_ids"


@pytest.mark.parametrize(
    ("allowed", "banned"), [([], range(9)), ([3, 4], [4]), ([3], []), ([], [])]
)
def test_leaving_one_token_is_enough(allowed, banned):
    SamplingParams(allowed_token_ids=allowed, banned_token_ids=banned).check_against(vocab_size=10)

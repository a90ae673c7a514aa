"""The token function against its checked-in vectors, its formula, and its promises."""

import json
import runpy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engine.errors import EngineFault, InvalidRequest
from engine.sampling_params import SamplingParams
from engine.token_function import TokenFunction
from engine.token_function.rules import rule_of
from kernels.sample.filters import masses
from kernels.sample.gumbel import gumbel
from kernels.sample.penalties import penalize
from kernels.sample.philox import token_words

VECTORS = Path(__file__).parent / "vectors"
ONE_ULP = 2**-22  # of logprobs, whose exponentials come from the machine's libraries
EOS = 0


def load(name):
    return json.loads((VECTORS / name).read_text())


def params_of(case):
    given = dict(case["params"])
    given["logit_bias"] = {int(key): bias for key, bias in given.get("logit_bias", {}).items()}
    return SamplingParams(**given)


def function_of(case, vocab_size):
    return TokenFunction(
        params_of(case),
        case["seed"],
        case["choice_index"],
        case["prompt_ids"],
        case["eos_ids"],
        vocab_size,
    )


def check_case(case, logits):
    choice = function_of(case, len(logits))(logits, case["output_ids"])
    assert choice.token_id == case["token_id"], case
    if "logprob" in case:
        assert choice.logprob == pytest.approx(case["logprob"], rel=ONE_ULP)
        ids, logprobs = zip(*choice.top_logprobs, strict=True) if choice.top_logprobs else ((), ())
        assert list(ids) == [token_id for token_id, _ in case["top_logprobs"]]
        assert list(logprobs) == pytest.approx(
            [logprob for _, logprob in case["top_logprobs"]], rel=ONE_ULP
        )
    else:
        assert choice.logprob is None
        assert choice.top_logprobs == ()


def make(vocab_size=8, *, seed=1, choice_index=0, prompt_ids=(1,), eos_ids=(EOS,), **params):
    return TokenFunction(
        SamplingParams(**params), seed, choice_index, prompt_ids, eos_ids, vocab_size
    )


def fp32(*values):
    return np.array(values, dtype=np.float32)


@pytest.fixture(scope="module")
def independent():
    return runpy.run_path(str(VECTORS / "make_token_vectors.py"))


# -- vectors


def test_noise_equals_the_checked_in_vectors_bit_for_bit():
    vectors = load("gumbel.json")
    words, bits = np.array(vectors["words"], dtype=np.uint32).T
    assert gumbel(words).view(np.uint32).tolist() == bits.tolist()
    for seed, position, choice_index, token_id, word, g_bits in vectors["places"]:
        found = token_words(seed, position, choice_index, np.array([token_id]))
        assert (found[0], gumbel(found).view(np.uint32)[0]) == (word, g_bits)


def test_choices_equal_the_checked_in_vectors():
    vectors = load("token_choices.json")
    assert len(vectors["cases"]) >= 300
    assert len({case["token_id"] for case in vectors["cases"]}) > 10
    for case in vectors["cases"]:
        check_case(case, np.array(vectors["logits"][case["logits"]], dtype=np.float32))


def test_choices_from_a_whole_vocabulary_equal_the_checked_in_vectors():
    vectors = load("token_choices_49152.json")
    ids = np.arange(vectors["vocab_size"], dtype=np.int64)
    for case in vectors["cases"]:
        hashed = ((ids * 2654435761 + case["salt"]) % 2**32 >> 16) - 32768
        check_case(case, (hashed / 2 ** case["shift"]).astype(np.float32))


@pytest.mark.parametrize(
    "name",
    [
        "gumbel.json",
        "token_choices.json",
        pytest.param("token_choices_49152.json", marks=pytest.mark.slow),
    ],
)
def test_checked_in_vectors_are_what_the_independent_script_makes(name, independent):
    made = independent["as_text"](independent["FILES"][name]())
    assert made == (VECTORS / name).read_text()


def test_penalized_logits_equal_the_independent_ones_bit_for_bit(independent):
    asked = {
        "logit_bias": {3: 0.1, 40: -7.7},
        "repetition_penalty": 1.3,
        "presence_penalty": 0.37,
        "frequency_penalty": -0.21,
    }
    generator = np.random.default_rng(5)
    logits = generator.normal(0, 5, 200).astype(np.float32)
    prompt_ids, output_ids = generator.integers(0, 200, (2, 150)).tolist()
    expected = independent["adjust"](logits.tolist(), asked, prompt_ids, output_ids)
    rule = rule_of(SamplingParams(**asked), 0, 0, prompt_ids, (), 200)
    assert penalize(logits, rule, output_ids).tolist() == expected


def test_masses_equal_the_independent_ones_bit_for_bit(independent):
    x = -np.random.default_rng(6).exponential(5, 3000).astype(np.float32)
    assert masses(x).tolist() == [independent["mass"](value) for value in x.tolist()]


# -- the distribution


CHI_SQUARE_999 = {1: 10.83, 3: 16.27, 5: 20.52, 7: 24.32}
LOGITS = fp32(1.0, 0.5, 2.0, -1.0, 0.0, 1.5, -0.5, 0.25)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, range(8)),
        ({"temperature": 0.5}, range(8)),
        ({"temperature": 3.0}, range(8)),
        ({"top_k": 4}, [0, 1, 2, 5]),
        ({"top_p": 0.6}, [2, 5]),
        ({"min_p": 0.2}, [0, 1, 2, 5]),
        ({"banned_token_ids": [2, 5]}, [0, 1, 3, 4, 6, 7]),
    ],
)
def test_tokens_follow_the_softmax_of_what_the_filters_left(params, kept):
    num_draws = 2500
    draws = [make(seed=seed, **params)(LOGITS, []).token_id for seed in range(num_draws)]
    counts = np.bincount(draws, minlength=8)
    weights = np.zeros(8)
    weights[list(kept)] = np.exp(LOGITS[list(kept)].astype(float) / params.get("temperature", 1))
    expected = num_draws * weights / weights.sum()
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    statistic = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    assert statistic < CHI_SQUARE_999[len(kept) - 1]


@pytest.mark.parametrize("varied", ["position", "choice_index"])
def test_positions_and_choices_draw_independently_from_the_same_softmax(varied):
    def draw(number):
        if varied == "position":
            return make()(LOGITS, [5] * number).token_id
        return make(choice_index=number)(LOGITS, []).token_id

    num_draws = 2000
    counts = np.bincount([draw(number) for number in range(num_draws)], minlength=8)
    weights = np.exp(LOGITS.astype(float))
    expected = num_draws * weights / weights.sum()
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_999[7]


# -- purity

EVERYTHING = {
    "temperature": 0.9,
    "top_p": 0.9,
    "top_k": 30,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "logit_bias": {5: 1.0},
    "banned_token_ids": [3],
    "min_tokens": 4,
    "logprobs": 3,
}


def test_a_choice_depends_on_logits_and_tokens_but_not_on_the_calls_before():
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 3, (12, 64)).astype(np.float32)
    outputs = [generator.integers(0, 64, length).tolist() for length in range(12)]
    function = make(64, **EVERYTHING)
    forward = [function(logits[i], outputs[i]) for i in range(12)]
    backward = [function(logits[i], outputs[i]) for i in reversed(range(12))][::-1]
    fresh = [make(64, **EVERYTHING)(logits[i], outputs[i]) for i in range(12)]
    assert forward == backward == fresh
    assert len({choice.token_id for choice in forward}) > 3


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, EVERYTHING])
def test_the_callers_logits_are_never_written(params):
    logits = np.linspace(-5, 5, 64, dtype=np.float32)
    logits.flags.writeable = False
    before = logits.copy()
    make(64, **params)(logits, [1, 2])
    assert (logits == before).all()


def test_only_the_number_of_tokens_before_matters_where_nothing_is_penalized():
    logits = np.zeros(64, dtype=np.float32)
    function = make(64, prompt_ids=[1, 2, 3])
    assert function(logits, [4, 5]) == function(logits, [9, 9])
    assert function(logits, [4, 5]) == make(64, prompt_ids=[7] * 5)(logits, [])
    assert len({function(logits, [4] * length).token_id for length in range(30)}) > 15


def test_choices_of_one_request_differ():
    logits = np.zeros(64, dtype=np.float32)
    chosen = {make(64, choice_index=index)(logits, []).token_id for index in range(64)}
    assert len(chosen) > 30


# -- one rule each


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_greedy_takes_the_highest_logit_and_the_lowest_of_equal_ids(temperature):
    assert make(5, temperature=temperature)(fp32(1, 3, 2, 3, 3), []).token_id == 1


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"banned_token_ids": [2]}])
def test_logits_that_are_not_numbers_are_a_fault_and_never_a_token(wrong, params):
    with pytest.raises(EngineFault):
        make(4, **params)(fp32(0, 1, wrong, -np.inf), [])


def test_logits_that_are_all_impossible_are_a_fault():
    with pytest.raises(EngineFault):
        make(3)(fp32(-np.inf, -np.inf, -np.inf), [])


@pytest.mark.parametrize("params", [{}, {"temperature": 0, "logit_bias": {1: 100}}])
def test_an_impossible_token_is_never_chosen_and_never_a_top_logprob(params):
    function = make(3, logprobs=3, **params)
    for length in range(50):
        choice = function(fp32(-3, -np.inf, -3), [0] * length)
        assert choice.token_id != 1
        assert [token_id for token_id, _ in choice.top_logprobs] == [0, 2]


def test_bias_does_not_bring_back_a_banned_token():
    function = make(4, temperature=0, banned_token_ids=[2], logit_bias={2: 100, 1: 1})
    assert function(fp32(0, 0, 0, 0.5), []).token_id == 1


def test_only_allowed_tokens_are_chosen():
    function = make(8, allowed_token_ids=[3, 6])
    assert {function(LOGITS, [1] * length).token_id for length in range(40)} == {3, 6}


@pytest.mark.parametrize(
    ("ignore_eos", "num_output", "token_id"),
    [(False, 0, 2), (False, 1, 2), (False, 2, 0), (True, 0, 0), (True, 2, 0)],
)
def test_ends_are_masked_until_min_tokens_exist(ignore_eos, num_output, token_id):
    function = make(3, temperature=0, min_tokens=2, stop_token_ids=[1], ignore_eos=ignore_eos)
    assert function(fp32(3, 2, 1), [2] * num_output).token_id == token_id


def test_all_end_of_sequence_ids_wait_for_min_tokens():
    assert make(4, temperature=0, min_tokens=1, eos_ids=(0, 2))(fp32(9, 1, 8, 0), []).token_id == 1


def test_a_request_that_leaves_no_token_is_refused_when_it_comes_to_that():
    function = make(4, allowed_token_ids=[0], min_tokens=1)
    with pytest.raises(InvalidRequest) as refusal:
        function(fp32(1, 2, 3, 4), [])
    assert refusal.value.field == "allowed_token_ids"
    assert function(fp32(1, 2, 3, 4), [2]).token_id == 0


@pytest.mark.parametrize(
    ("params", "prompt_ids", "output_ids", "token_id"),
    [
        ({"repetition_penalty": 2.0}, [0], [], 1),  # 4 / 2 < 3
        ({"repetition_penalty": 2.0}, [2], [0], 1),
        ({"repetition_penalty": 2.0}, [2], [], 0),
        ({"presence_penalty": 1.5}, [0], [], 0),  # the prompt does not count
        ({"presence_penalty": 1.5}, [2], [0], 1),
        ({"frequency_penalty": 0.6}, [2], [0], 0),
        ({"frequency_penalty": 0.6}, [2], [0, 0], 1),
        ({"frequency_penalty": -2.0}, [2], [3, 3], 3),
    ],
)
def test_penalties_look_where_they_should(params, prompt_ids, output_ids, token_id):
    function = make(4, temperature=0, prompt_ids=prompt_ids, **params)
    assert function(fp32(4, 3, -5, 0.5), output_ids).token_id == token_id


def test_repetition_multiplies_what_is_negative():
    function = make(2, temperature=0, prompt_ids=[0], repetition_penalty=2.0)
    assert function(fp32(-1.0, -1.5), []).token_id == 1


def kept_by(logits, **params):
    """The ids that come up in many draws."""
    function = make(len(logits), **params)
    return {function(logits, [0] * length).token_id for length in range(400)}


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {2, 4}),
        ({"top_k": 2}, {2, 4}),
        ({"top_k": 3}, {1, 2, 4, 5}),  # ties at the border are kept
        ({"top_p": 0.01}, {2, 4}),
        ({"top_p": 0.67}, {2, 4}),  # both are kept where one is: 0.671
        ({"min_p": 1.0}, {2, 4}),
        ({"min_p": 0.37}, {2, 4}),  # exp(-1) = 0.368
        ({"min_p": 0.36}, {1, 2, 4, 5}),
        ({"min_p": 0.3, "top_k": 2}, {2, 4}),
        ({"top_k": 3, "top_p": 0.7}, {2, 4}),  # 0.73 of what top_k left
        ({"top_p": 0.7}, {1, 2, 4, 5}),
    ],
)
def test_filters_keep_ties_and_look_at_what_the_former_left(params, kept):
    assert kept_by(fp32(-0.5, 1, 2, -0.5, 2, 1, -0.5), **params) == kept


def test_top_p_keeps_no_more_once_it_is_reached_exactly():
    logits = fp32(0.0, -1.0)
    highest, lower = masses(logits).tolist()
    top_p = highest / (highest + lower)
    assert top_p * (highest + lower) == highest
    assert kept_by(logits, top_p=top_p) == {0}
    assert kept_by(logits, top_p=np.nextafter(top_p, 1.0)) == {0, 1}


def test_masses_are_the_exponential_in_32_bits():
    x = np.concatenate([-np.logspace(-7, 1.36, 5000), [0.0]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64)) * 2.0**32
    assert np.max(np.abs(masses(x) - exact) / np.maximum(exact * 2.0**-22, 1)) < 1
    assert masses(fp32(0.0, -23.5, -np.inf)).tolist() == [2**32, 0, 0]


def test_absurd_but_allowed_parameters_still_choose():
    huge = np.finfo(np.float32).max
    for params in (
        {"temperature": 1e-5},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 100, "top_p": 5e-324},
        {"min_p": 5e-324, "top_p": 1 - 2**-53, "temperature": 100},
    ):
        for logits in (fp32(huge, -huge, 0), fp32(-huge, -huge, -huge)):
            token_id = make(3, prompt_ids=[0, 1, 2], **params)(logits, [1]).token_id
            assert token_id in range(3)


# -- logprobs


def test_logprobs_come_from_the_raw_logits():
    logits = fp32(1, 3, 2, 0)
    plain = make(4, temperature=0, logprobs=2)(logits, [])
    bent = make(4, temperature=0, logprobs=2, logit_bias={0: 50}, banned_token_ids=[1], top_k=1)(
        logits, []
    )
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert (plain.token_id, bent.token_id) == (1, 0)
    assert bent.top_logprobs == plain.top_logprobs
    assert plain.logprob == pytest.approx(exact[1], rel=1e-6)
    assert bent.logprob == pytest.approx(exact[0], rel=1e-6)


def test_top_logprobs_are_best_first_and_equal_ones_by_id():
    choice = make(6, logprobs=4)(fp32(1, 2, 1, 2, 1, 0), [])
    assert [token_id for token_id, _ in choice.top_logprobs] == [1, 3, 0, 2]
    assert all(a >= b for (_, a), (_, b) in pairwise(choice.top_logprobs))


@pytest.mark.parametrize(("logprobs", "num_top"), [(0, 0), (1, 1), (20, 6)])
def test_as_many_top_logprobs_as_asked_for_or_as_there_are(logprobs, num_top):
    choice = make(6, logprobs=logprobs)(fp32(1, 2, 1, 2, 1, 0), [])
    assert len(choice.top_logprobs) == num_top
    assert choice.logprob is not None
    assert choice.logprob < 0

"""The native choice of tokens against its definition: equal tokens, equal bits of logprobs."""

from __future__ import annotations

from array import array
from dataclasses import replace
from math import inf, log, nan

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import _native, threads
from kernels.sample import NOT_NUMBERS, NOTHING_LEFT, Row, Tokens, cpu_kernel, reference
from kernels.sample.gumbel import gumbel
from kernels.sample.philox import token_words
from kernels.sample.rule import Rule, unique_ids

LARGEST = float(np.finfo(np.float32).max)
NO_OUTPUT = array("i")


def fp32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def check(rows: list[Row]) -> Tokens:
    """Chooses by the definition and on every instruction set; compares, returns the former's."""
    expected = reference.sample(rows)
    for isa in _native.supported_isas():
        _native.select_isa(isa)
        tokens = cpu_kernel.sample(rows)
        assert tokens.ids.tolist() == expected.ids.tolist(), isa
        for index, row in enumerate(rows):
            num_top = row.rule.num_top
            if num_top is not None and expected.ids[index] >= 0:
                assert_same_logprobs(tokens, expected, index, num_top)
    return expected


def assert_same_logprobs(tokens: Tokens, expected: Tokens, index: int, num_top: int) -> None:
    assert tokens.logprobs[index].tobytes() == expected.logprobs[index].tobytes()
    for found, wanted in (
        (tokens.top_ids, expected.top_ids),
        (tokens.top_logprobs, expected.top_logprobs),
    ):
        assert found[index, :num_top].tobytes() == wanted[index, :num_top].tobytes()


def rule_from(generator: np.random.Generator, vocab_size: int, **given: object) -> Rule:
    """Everything on, with numbers drawn from sensible ranges."""
    biased = unique_ids(generator.integers(0, vocab_size, 5).tolist())
    drawn = {
        "seed": int(generator.integers(0, 2**64, dtype=np.uint64)),
        "choice_index": int(generator.integers(0, 64)),
        "num_prompt": int(generator.integers(1, 2**31)),
        "temperature": float(np.float32(generator.uniform(0.2, 3))),
        "log_min_p": float(np.float32(log(generator.uniform(1e-4, 0.1)))),
        "top_k": int(generator.integers(1, vocab_size)),
        "top_p": float(generator.uniform(0.3, 1)),
        "bias_ids": biased,
        "biases": generator.normal(0, 3, biased.size).astype(np.float32),
        "repetition": float(np.float32(generator.uniform(0.7, 1.5))),
        "presence": float(np.float32(generator.uniform(-1, 1))),
        "frequency": float(np.float32(generator.uniform(-0.5, 0.5))),
        "seen_ids": unique_ids(generator.integers(0, vocab_size, 40).tolist()),
        "forbidden": generator.random(vocab_size) < 0.1,
        "num_top": int(generator.integers(0, 21)),
    }
    return Rule(**(drawn | given))


OFF: dict[str, dict[str, object]] = {
    "log_min_p": {"log_min_p": -inf},
    "top_k": {"top_k": 0},
    "top_p": {"top_p": 1.0},
    "biases": {"bias_ids": unique_ids([]), "biases": fp32()},
    "penalties": {"repetition": 1.0, "presence": 0.0, "frequency": 0.0},
    "forbidden": {"forbidden": None},
    "num_top": {"num_top": None},
    "temperature": {"temperature": 0.0},
}


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 1000, 49_152])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
def test_native_tokens_are_those_of_the_definition(vocab_size: int, spread: float) -> None:
    generator = np.random.default_rng(vocab_size)
    rows = []
    for number in range(3 if vocab_size > 1000 else 60):
        off = [name for name in OFF if generator.random() < 0.5]
        given = {key: value for name in off for key, value in OFF[name].items()}
        rule = rule_from(generator, max(vocab_size, 2), **given) if vocab_size > 1 else Rule()
        logits = (generator.standard_normal(vocab_size) * spread).astype(np.float32)
        if number % 2:
            logits = logits.round(1)  # ties
        if number % 5 == 4:
            logits[generator.random(vocab_size) < 0.3] = -inf
        output_ids = array("i", generator.integers(0, vocab_size, number).tolist())
        rows.append(Row(logits, rule, output_ids))
    tokens = check(rows)
    assert vocab_size < 64 or spread == 0 or len(set(tokens.ids.tolist())) > 1


LOGITS = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([0.0, -0.0, 1.0, LARGEST, -LARGEST, 1e-45, -1e-45, -inf]),
    st.floats(allow_nan=False, width=32).filter(lambda x: x != inf),
)
FLOATS = {"allow_nan": False, "width": 32}


@st.composite
def any_row(draw: st.DrawFn) -> Row:
    logits = draw(st.lists(LOGITS, min_size=1, max_size=80))
    ids = st.lists(st.integers(0, len(logits) - 1), max_size=12)
    biases = draw(st.dictionaries(st.integers(0, len(logits) - 1), st.floats(-100, 100, width=32)))
    masks = st.none() | st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).map(
        np.array
    )
    rule = Rule(
        seed=draw(st.integers(0, 2**64 - 1)),
        choice_index=draw(st.integers(0, 63)),
        num_prompt=draw(st.integers(1, 2**31)),
        temperature=draw(st.just(0.0) | st.just(1.0) | st.floats(2.0**-16, 100, width=32)),
        log_min_p=draw(st.just(-inf) | st.floats(-744, 0, width=32)),
        top_k=draw(st.just(0) | st.integers(1, 90) | st.just(2**31 - 1)),
        top_p=draw(st.just(1.0) | st.floats(0, 1, exclude_min=True)),
        bias_ids=np.array(list(biases), dtype=np.int32),
        biases=fp32(*biases.values()),
        repetition=draw(st.just(1.0) | st.floats(2.0**-126, 100, width=32)),
        presence=draw(st.just(0.0) | st.floats(-2, 2, width=32)),
        frequency=draw(st.just(0.0) | st.floats(-2, 2, width=32)),
        seen_ids=unique_ids(draw(ids)),
        forbidden=draw(masks),
        forbidden_early=draw(masks),
        min_tokens=draw(st.integers(0, 4)),
        num_top=draw(st.none() | st.integers(0, 20)),
    )
    return Row(fp32(*logits), rule, array("i", draw(ids)))


@settings(max_examples=600, deadline=None)
@given(st.lists(any_row(), min_size=1, max_size=1))
@example([Row(fp32(LARGEST, -LARGEST, 0.0), Rule(temperature=1.0, top_k=2, top_p=0.5), NO_OUTPUT)])
@example([Row(fp32(0.0, -0.0), Rule(temperature=1.0, top_k=1, num_top=2), NO_OUTPUT)])
def test_any_row_at_all_gives_the_token_of_the_definition(rows: list[Row]) -> None:
    check(rows)


def test_the_winner_is_found_where_noise_alone_decides() -> None:
    logits = np.zeros(49_152, dtype=np.float32)
    ids = np.arange(logits.size)
    rows = [Row(logits, Rule(seed=seed, temperature=1.0), NO_OUTPUT) for seed in range(40)]
    noise = [gumbel(token_words(seed, 0, 0, ids)) for seed in range(40)]
    for isa in _native.supported_isas():
        _native.select_isa(isa)
        assert cpu_kernel.sample(rows).ids.tolist() == [int(np.argmax(g)) for g in noise]
    for row, g in zip(rows, noise, strict=True):
        runner_up = int(np.argsort(g)[-2])  # what it lacks, and the next number above and below
        lacking = g.max() - g[runner_up]
        for step in (np.float32(-inf), lacking, np.float32(inf)):
            close = logits.copy()
            close[runner_up] = np.nextafter(lacking, step)
            token_id = cpu_kernel.sample([row._replace(logits=close)]).ids[0]
            assert token_id == np.argmax(close + g)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_row_alone_gives_the_token_it_gives_among_others_on_any_threads(count: int) -> None:
    generator = np.random.default_rng(1)
    rows = [
        Row(
            generator.normal(0, 3, 3000).astype(np.float32),
            rule_from(generator, 3000),
            array("i", generator.integers(0, 3000, 20).tolist()),
        )
        for _ in range(33)
    ]
    threads.set_num_threads(count)
    together = cpu_kernel.sample(rows)
    for index, row in enumerate(rows):
        alone = cpu_kernel.sample([row])
        assert alone.ids[0] == together.ids[index]
        assert alone.logprobs[0].tobytes() == together.logprobs[index].tobytes()


@pytest.mark.parametrize("wrong", [nan, -nan, inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_a_row_that_holds_no_numbers_gives_no_token_and_others_theirs(
    wrong: float, place: int
) -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[70] = 1
    broken = logits.copy()
    broken[place] = wrong
    for rule in (Rule(num_top=1), Rule(temperature=1.0, forbidden=np.arange(100) == place)):
        greedy = Row(logits, Rule(), NO_OUTPUT)
        assert check([greedy, Row(broken, rule, NO_OUTPUT), greedy]).ids.tolist() == [
            70,
            NOT_NUMBERS,
            70,
        ]
    impossible = np.full(100, -inf, dtype=np.float32)
    assert check([Row(impossible, Rule(), NO_OUTPUT)]).ids.tolist() == [NOT_NUMBERS]


def test_a_mask_that_leaves_nothing_gives_no_token() -> None:
    rule = Rule(forbidden=np.array([True, False]))
    rows = [Row(fp32(1, -inf), rule, NO_OUTPUT), Row(fp32(1, 0), rule, NO_OUTPUT)]
    assert check(rows).ids.tolist() == [NOTHING_LEFT, 1]


def test_no_rows_give_no_tokens() -> None:
    assert check([]).ids.size == 0


def test_rows_with_other_numbers_of_top_logprobs_stand_side_by_side() -> None:
    logits = fp32(1, 3, 2)
    rows = [Row(logits, Rule(num_top=num_top), NO_OUTPUT) for num_top in (None, 0, 1, 5)]
    top_ids = check(rows).top_ids
    assert top_ids[2, :1].tolist() == [1]
    assert top_ids[3].tolist() == [1, 2, 0, -1, -1]


def test_logprobs_are_within_a_rounding_of_fp64() -> None:
    generator = np.random.default_rng(2)
    for spread in (0.1, 3.0, 30.0):
        logits = (generator.standard_normal(49_152) * spread).astype(np.float32)
        tokens = check([Row(logits, Rule(num_top=20), NO_OUTPUT)])
        exact = np.sort(logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64)))
        assert tokens.top_logprobs[0] == pytest.approx(exact[:-21:-1], rel=2**-23)


GOOD = Row(fp32(0, 1, 2), Rule(), NO_OUTPUT)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (GOOD._replace(logits=np.zeros(3)), "logits"),
        (GOOD._replace(logits=np.zeros((1, 3), dtype=np.float32)), "logits"),
        (GOOD._replace(logits=np.zeros(6, dtype=np.float32)[::2]), "logits"),
        (GOOD._replace(logits=fp32(0, 1)), "logits"),
        (GOOD._replace(rule=Rule(forbidden=np.zeros(2, dtype=np.bool_))), "forbidden"),
        (GOOD._replace(rule=Rule(bias_ids=unique_ids([3]), biases=fp32(1))), "bias_ids"),
        (GOOD._replace(rule=Rule(bias_ids=unique_ids([1]))), "biases"),
        (GOOD._replace(rule=Rule(repetition=2.0, seen_ids=unique_ids([-1]))), "seen_ids"),
        (GOOD._replace(rule=Rule(presence=1.0), output_ids=array("i", [3])), "output_ids"),
        (GOOD._replace(rule=Rule(seed=2**64)), "seed"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(row: Row, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        cpu_kernel.sample([GOOD, row])


def test_only_a_plain_greedy_row_is_content_with_the_argmax() -> None:
    assert Rule().argmax_from == 0
    mask = np.ones(4, dtype=np.bool_)
    assert Rule(forbidden_early=mask, min_tokens=2).argmax_from == 2
    for demand in (
        {"temperature": 1.0},
        {"num_top": 0},
        {"bias_ids": unique_ids([1]), "biases": fp32(1)},
        {"repetition": 1.1},
        {"presence": 0.1},
        {"frequency": 0.1},
        {"forbidden": mask},
    ):
        assert replace(Rule(), **demand).argmax_from is None

"""How many drafts are worth it, and who makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, prod
from random import Random

import pytest

from engine.plan import Drafted
from engine.speculation import Speculator, SpeculatorPair, StepTimes, open_speculator
from engine.speculation.lengths import LEAST_GAIN, Acceptance, Lengths, best_lengths
from engine.speculation.proposer import Draft, Floats
from engine.speculation.speculator import MOST_DRAFTS

FLAT = StepTimes({1: 1.0, 64: 1.0})
DEAR = StepTimes({1: 1.0, 2: 2.0, 64: 64.0})


# -- how many


def test_free_rows_are_all_taken_and_dear_ones_not_at_all() -> None:
    assert best_lengths([0.9, 0.2], [5, 5], 2, 2, FLAT).each == [5, 2]  # then 0.2 ** 3 is too few
    assert best_lengths([0.9, 0.1], [5, 5], 2, 2, DEAR).each == [0, 0]


def test_rows_go_where_they_gain_most() -> None:
    until_four = StepTimes({1: 1.0, 4: 1.0, 5: 2.0, 64: 60.0})
    assert best_lengths([0.9, 0.2], [5, 5], 2, 2, until_four).each == [2, 0]
    assert best_lengths([0.9, 0.9], [5, 5], 2, 2, until_four).each == [1, 1]


def test_a_plateau_behind_a_dear_row_is_found() -> None:
    """The second row doubles the time, the next fourteen are free."""
    steps = StepTimes({1: 1.0, 2: 2.0, 16: 2.0, 17: 60.0})
    assert best_lengths([0.9], [15], 1, 1, steps).each == [15]


def test_drafts_end_where_later_ones_are_seldom_right() -> None:
    """A row costs a tenth: the second draft is worth it at 0.25, the third at 0.05 is not."""
    steps = StepTimes({1: 1.0, 16: 2.5})
    assert best_lengths([0.5], [9], 1, 1, steps).each == [2]
    assert best_lengths([0.5], [9], 1, 1, steps, shape=[1.0, 0.2]).each == [1]
    assert best_lengths([0.5], [9], 1, 1, steps, shape=[1.0, 1.8, 0.1]).each == [2]
    assert best_lengths([0.5], [9], 1, 1, steps, shape=[0.1]).each == [0]


def test_what_drafts_save_is_told_by_token() -> None:
    assert best_lengths([0.5], [1], 1, 1, FLAT).saved_s == pytest.approx(1 - 1 / 1.5)
    assert (
        best_lengths([0.5], [1], 1, 1, FLAT, draft_s=lambda longest: 9.0 * longest).saved_s == 0.0
    )


def test_rows_of_prompts_fill_the_step_and_bring_no_tokens() -> None:
    until_64 = StepTimes({1: 1.0, 64: 1.0, 65: 9.0, 128: 20.0})
    assert best_lengths([0.9], [3], 1, 1, until_64).each == [3]
    assert best_lengths([0.9], [3], 1, 64, until_64).each == [0]


def test_no_step_counts_as_longer_than_one_of_more_rows() -> None:
    times = StepTimes({1: 9.0, 2: 1.0, 4: 2.0})
    assert [times.seconds(rows) for rows in (1, 2, 3, 4, 8)] == [1.0, 1.0, 1.5, 2.0, 4.0]


def test_drafts_that_hardly_gain_anything_are_not_made() -> None:
    assert best_lengths([0.04], [5], 1, 1, FLAT) == Lengths([0], 0.0)
    assert best_lengths([0.07], [5], 1, 1, FLAT).each != [0]


@pytest.mark.parametrize("seed", range(40))
def test_no_other_number_of_drafts_brings_more_tokens_per_second(seed: int) -> None:
    random = Random(seed)
    rates = [random.random() for _ in range(random.randint(1, 6))]
    most = [random.randint(0, 8) for _ in rates]
    times = StepTimes({rows: random.uniform(1, 1 + rows / 4) for rows in (1, 2, 4, 8, 16, 64)})
    num_rows = len(rates) + random.randint(0, 5)
    draft_s = random.choice([0.0, 0.05])
    shape = [random.uniform(0.3, 1.4) for _ in range(random.choice([0, 1, 3]))]

    def chance(rate: float, at: int) -> float:
        factors = shape or [1.0]
        return prod(min(rate * factors[min(i, len(factors) - 1)], 1.0) for i in range(at + 1))

    gains = sorted(
        (-chance(rate, at), index, at)
        for index, (rate, number) in enumerate(zip(rates, most, strict=True))
        for at in range(number)
        if at == 0 or chance(rate, at) > 0.02  # others are not worth looking at
    )
    tokens, without = float(len(rates)), times.seconds(num_rows) / len(rates)
    rated = [without]
    for drafts, (gain, _, _) in enumerate(gains, start=1):
        tokens -= gain
        longest = 1 + max(at for _, _, at in gains[:drafts])
        rated.append((times.seconds(num_rows + drafts) + longest * draft_s) / tokens)
    found = best_lengths(
        rates,
        most,
        len(rates),
        num_rows,
        times,
        draft_s=lambda longest: longest * draft_s,
        shape=shape,
    )
    if min(rated) < (1 - LEAST_GAIN) * without:
        assert rated[sum(found.each)] == pytest.approx(min(rated))
    else:
        assert not any(found.each)


def test_times_follow_the_steps() -> None:
    times = StepTimes({1: 1.0, 4: 2.0})
    for _ in range(200):
        times.learn(1, 3.0)
    assert times.seconds(1) == pytest.approx(3.0, rel=0.01)
    # One row took three times as long. Nearly five sixths of that count for all numbers of rows.
    assert times.seconds(4) == pytest.approx(2.0 * 3 ** (5 / 6), rel=0.01)
    for _ in range(200):
        times.learn(1, 0.0)
    assert times.seconds(1) > 0


def test_steps_that_take_longer_between_drafts_are_known_as_such() -> None:
    times = StepTimes({1: 1.0, 2: 1.1, 4: 1.4})
    for _ in range(2000):
        times.learn(1, 1.0)
        times.learn(2, 1.8)
    assert times.seconds(1) == pytest.approx(1.0, rel=0.02)
    assert times.seconds(2) == pytest.approx(1.8, rel=0.02)
    assert times.seconds(4) >= 1.8 * 0.98


def test_attention_takes_time_by_the_rows_of_a_sequence_and_its_context() -> None:
    times = StepTimes({1: 1.0, 8: 1.0}, {1: 0.001, 2: 0.002, 4: 0.006, 8: 0.005})
    assert times.attention_s(1, 1000) == pytest.approx(1.0)
    assert times.attention_s(3, 1000) == pytest.approx(4.0)  # on the line
    assert times.attention_s(8, 1000) == pytest.approx(6.0)  # more rows never take less
    assert times.attention_s(9, 0) == 0
    assert StepTimes({1: 1.0}).attention_s(3, 1000) == 0
    assert times.seconds(2, times.attention_s(2, 1000)) == pytest.approx(3.0)
    for _ in range(200):  # what takes twice as long does so as a whole
        times.learn(1, 4.0, times.attention_s(1, 1000))
    assert times.seconds(8, times.attention_s(8, 1000)) == pytest.approx(14.0, rel=0.02)


def test_the_longer_a_context_the_fewer_drafts_are_worth_their_attention() -> None:
    times = StepTimes({1: 1.0, 64: 1.0}, {rows: 0.0001 * rows for rows in (1, 2, 16)})

    def lengths(*contexts: int) -> list[int]:
        attention_s = sum(times.attention_s(1, each) for each in contexts)
        rates, most = [0.8] * len(contexts), [15] * len(contexts)
        rows = len(contexts)
        return best_lengths(
            rates, most, rows, rows, times, contexts=contexts, attention_s=attention_s
        ).each

    (short,), (medium,), (long,) = lengths(100), lengths(3000), lengths(100_000)
    assert short > medium > long == 0
    near, far = lengths(100, 20_000)
    assert near > far


# Milliseconds of a step by its rows, roughly those of two machines with the shipped model in int8.
MACHINES = {
    "Zen 3": {
        1: 5.1,
        2: 5.1,
        3: 5.8,
        4: 6.4,
        5: 9.7,
        8: 10.5,
        9: 12.9,
        16: 22.3,
        32: 39.0,
        64: 77.0,
    },
    "Zen 5": {1: 2.5, 2: 2.7, 3: 3.0, 4: 3.2, 8: 4.2, 12: 5.4, 16: 7.2, 32: 13.0, 64: 25.5},
}


def simulated_speedup(
    steps: Mapping[int, float], batch: int, matches: float, right: float, slower: float
) -> float:
    """Of drafts that are right with one chance, for sequences that have some with another, on a
    machine that takes longer than measured by a share that changes slowly."""
    random, true, times = Random(batch), StepTimes(steps), StepTimes(steps)
    busy, tokens, seconds, without = 0.0, 0, 0.0, 0.0
    for _ in range(400):
        busy = 0.97 * busy + random.gauss(0, 0.05)
        share = slower * exp(busy + abs(random.gauss(0, 0.05)))
        rates = [right if random.random() < matches else 0.0 for _ in range(batch)]
        each = best_lengths(rates, [15 * (rate > 0) for rate in rates], batch, batch, times).each
        step_s = share * true.seconds(batch + sum(each))
        times.learn(batch + sum(each), step_s)
        seconds += step_s
        without += share * true.seconds(batch)
        tokens += batch
        for length in each:
            tokens += next((at for at in range(length) if random.random() >= right), length)
    return (tokens / seconds) / (400 * batch / without)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("batch", [1, 4, 16, 32])
@pytest.mark.parametrize("slower", [1.0, 1.6])
def test_drafts_lose_nothing_where_steps_take_longer_than_measured(
    machine: str, batch: int, slower: float
) -> None:
    steps = MACHINES[machine]
    assert simulated_speedup(steps, batch, 0.5, 0.6, slower) > 0.97
    assert simulated_speedup(steps, batch, 0.9, 0.85, slower) > (1.4 if batch == 1 else 0.97)


def test_a_rate_begins_at_the_proposers_word_and_learns() -> None:
    acceptance = Acceptance()
    assert acceptance.rate(0.7) == pytest.approx(0.7)
    for _ in range(50):
        acceptance.verified(4, 0)
    assert acceptance.rate(0.7) < 0.2
    low = acceptance.rate(0.7)
    for _ in range(500):
        acceptance.idle()
    assert acceptance.rate(0.7) == pytest.approx(0.7, rel=0.01)
    for _ in range(50):
        acceptance.verified(4, 4)
    assert acceptance.rate(0.7) > 0.9 > low


# -- the speculator


class Fixed:
    """Proposes the same, whatever the sequence."""

    name = "fixed"
    seconds_per_draft = 0.0
    expects: float | None = None
    hidden_width = 0
    remembers = False
    starts_after_s = 0.0

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens
        self.known: dict[str, list[int]] = {}

    def begin(self, name: str, tokens: Sequence[int], tenant: str) -> None:
        self.known[name] = list(tokens)

    def extend(self, name: str, tokens: Sequence[int], hidden: Floats | None = None) -> None:
        self.known[name] += tokens

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        assert self.known.keys() >= most.keys()
        return dict.fromkeys(most, Draft(self.tokens, 0.9))

    def start_s(self, name: str) -> float:
        return self.starts_after_s

    def draft_s(self, longest: int) -> float:
        return longest * self.seconds_per_draft

    def forget(self, name: str) -> None:
        del self.known[name]


def speculator(*tokens: int) -> Speculator:
    made = Speculator(Fixed(*tokens), vocab_size=10, times=FLAT)
    made.begin("a", [1, 2], "")
    return made


@pytest.mark.parametrize(
    ("proposed", "used"),
    [
        ((1, 2, 3), (1, 2, 3)),
        ((1, 10, 3), (1,)),
        ((-1, 2), ()),
        ((2**40,), ()),
        (tuple(range(10)) * 4, (tuple(range(10)) * 2)[:MOST_DRAFTS]),
    ],
)
def test_drafts_that_cannot_be_are_not_used(
    proposed: tuple[int, ...], used: tuple[int, ...]
) -> None:
    drafted = speculator(*proposed).drafts({"a": 1000}, 0)
    assert drafted == ([Drafted("a", used)] if used else [])


def test_no_more_are_drafted_than_the_output_may_still_have() -> None:
    assert speculator(1, 2, 3).drafts({"a": 3}, 0) == [Drafted("a", (1, 2))]
    assert speculator(1, 2, 3).drafts({"a": 1}, 0) == []


def test_what_was_accepted_is_counted_and_told_to_the_proposer() -> None:
    made = speculator(1, 2, 3)
    made.verified("a", (1, 2, 3), [1, 2, 7])
    made.verified("a", (1, 2, 3), [5])
    made.verified("a", (), [6])
    assert isinstance(made.proposer, Fixed)
    assert made.proposer.known["a"] == [1, 2, 1, 2, 7, 5, 6]
    assert (made.stats.proposed, made.stats.accepted) == (6, 2)
    assert made.stats.accepted_at[:3] == [1, 1, 0]
    made.forget("a")
    made.forget("a")
    assert made.drafts({"a": 9}, 0) == []


def test_a_proposer_is_not_made_ready_for_less_than_that_takes() -> None:
    proposer = Fixed(1)
    proposer.expects, proposer.starts_after_s = 0.9, 3.0
    made = Speculator(proposer, vocab_size=10, times=FLAT)
    made.begin("a", [1, 2], "")
    assert made.drafts({"a": 4}, 0) == []  # three drafts save 0.71 s with each of four tokens
    assert made.drafts({"a": 5}, 0) == [Drafted("a", (1,))]  # four save 0.76 s with each of five


def test_a_proposer_is_not_made_ready_for_what_it_would_save_beside_prompts_only() -> None:
    proposer = Fixed(1)
    proposer.expects, proposer.starts_after_s = 0.9, 3.0
    made = Speculator(proposer, vocab_size=10, times=StepTimes({1: 1.0, 2: 2.0, 256: 256.0}))
    made.begin("a", [1, 2], "")
    assert made.drafts({"a": 30}, 0) == []
    assert made.drafts({"a": 30}, 100) == []  # a step of 100 rows brings two tokens instead of one


@pytest.mark.parametrize("method", ["begin", "extend", "propose", "start_s", "forget"])
def test_a_proposer_that_raises_costs_one_sequence_its_drafts(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = speculator(1, 2)

    def broken(names: str | Mapping[str, int], *_: object) -> object:
        if "bad" in names:
            raise RuntimeError(names)
        return healthy(names)

    healthy = getattr(made.proposer, method)
    with monkeypatch.context() as patch:
        patch.setattr(made.proposer, method, broken)
        made.begin("bad", [1], "")
        made.verified("bad", (), [1])
        assert made.drafts({"bad": 9, "a": 9}, 0)[-1] == Drafted("a", (1, 2))
        made.forget("bad")
    assert made.stats.failures == 1
    assert made.drafts({"bad": 9, "a": 9}, 0) == [Drafted("a", (1, 2))]


# -- two of them


class Copying(Fixed):
    """Has drafts for some sequences only, and promises little."""

    def __init__(self, names: str, confidence: float, *tokens: int) -> None:
        super().__init__(*tokens)
        self.names, self.confidence = names, confidence

    def propose(self, most: Mapping[str, int]) -> Mapping[str, Draft]:
        return {
            name: Draft(self.tokens, self.confidence) if name in self.names else Draft()
            for name in most
        }


def pair(copying: Copying, expected: float, draft_s: float = 0.0) -> SpeculatorPair:
    """Of which the second one drafts 7 and 8."""
    knowing = Fixed(7, 8)
    knowing.expects, knowing.seconds_per_draft = expected, draft_s
    made = SpeculatorPair(*(Speculator(each, 10, FLAT) for each in (copying, knowing)))
    for name in ("a", "b"):
        made.begin(name, [1, 2], "")
    return made


def test_what_one_has_no_drafts_for_the_other_drafts() -> None:
    made = pair(Copying("a", 0.9, 1, 2, 3), expected=0.9)
    drafted = made.drafts({"a": 9, "b": 9}, 0)
    assert drafted == [Drafted("a", (1, 2, 3)), Drafted("b", (7, 8))]


@pytest.mark.parametrize(("promised", "drafted"), [(0.65, (1, 2)), (0.6, (7, 8))])
def test_drafts_for_nothing_are_taken_unless_others_promise_clearly_more(
    promised: float, drafted: tuple[int, ...]
) -> None:
    made = pair(Copying("a", promised, 1, 2), expected=0.9)
    assert made.drafts({"a": 9}, 0) == [Drafted("a", drafted)]


def test_drafts_for_nothing_are_taken_where_others_are_not_worth_making() -> None:
    made = pair(Copying("a", 0.3, 1, 2), expected=0.9, draft_s=100.0)
    assert made.drafts({"a": 9, "b": 9}, 0) == [Drafted("a", (1, 2))]


def test_each_learns_from_its_own_drafts_and_sees_every_token() -> None:
    made = pair(Copying("a", 0.9, 1, 2), expected=0.9)
    made.drafts({"a": 9, "b": 9}, 0)
    made.verified("a", (1, 2), [1, 5])
    made.verified("b", (7, 8), [7, 8, 9])
    made.verified("b", (), [4])
    first, then = made.all_stats
    assert (first.proposed, first.accepted) == (2, 1)
    assert (then.proposed, then.accepted) == (2, 2)
    for each in (made.first, made.then):
        assert isinstance(each.proposer, Fixed)
        assert each.proposer.known == {"a": [1, 2, 1, 5], "b": [1, 2, 7, 8, 9, 4]}
    made.forget("a")
    assert [each.name for each in made.drafts({"a": 9, "b": 9}, 0)] == ["b"]


def test_an_unknown_proposer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"one of auto, lookup, history, model, head, .*: 'magic'"):
        open_speculator("magic", 10, FLAT)


def test_a_promise_that_is_not_kept_is_not_believed_of_the_next_sequence() -> None:
    proposer = Fixed(1)
    proposer.expects = 0.5
    made = Speculator(proposer, vocab_size=10, times=StepTimes({1: 1.0, 2: 1.3, 64: 64.0}))
    made.begin("first", [1, 2], "")
    assert made.drafts({"first": 100}, 0) == [Drafted("first", (1,))]
    for _ in range(100):
        made.verified("first", [1], [2])
    made.begin("second", [1, 2], "")
    assert made.drafts({"second": 100}, 0) == []
    for _ in range(5000):  # of steps without drafts
        made.verified("first", [], [2])
    looks = [made.drafts({"second": 100}, 0) for _ in range(40)]
    assert [Drafted("second", (1,))] in looks


def test_positions_at_which_drafts_are_never_right_are_not_drafted() -> None:
    proposer = Fixed(*range(1, 6))
    proposer.expects = 0.6
    made = Speculator(proposer, vocab_size=10, times=StepTimes({1: 1.0, 2: 1.05, 64: 5.0}))
    made.begin("a", [1, 2], "")
    (first,) = made.drafts({"a": 100}, 0)
    assert len(first.tokens) > 2
    for _ in range(200):
        made.verified("a", first.tokens, [1, 7])  # the second one is wrong
    (later,) = made.drafts({"a": 100}, 0)
    assert later.tokens == (1,)


def test_what_costs_more_than_it_gains_rests_and_looks_again_now_and_then() -> None:
    proposer = Fixed(1)
    made = Speculator(proposer, vocab_size=10, times=StepTimes({1: 1.0, 2: 1.5, 64: 64.0}))
    made.begin("a", [1, 2], "")
    looks = []
    for step in range(100):
        drafted = bool(made.drafts({"a": 1000}, 0))
        looks += [step] * drafted
        made.verified("a", [1] * drafted, [5])
    assert 3 <= len(looks) <= 12
    assert proposer.known["a"][:2] == [1, 2]
    assert set(proposer.known["a"][2:]) == {5}
    made.drafts({"a": 1000}, 0)


def test_what_was_missed_at_rest_is_caught_up_with_at_the_next_look() -> None:
    proposer = Fixed(1)
    made = Speculator(proposer, vocab_size=10, times=StepTimes({1: 1.0, 2: 1.5, 64: 64.0}))
    made.begin("a", [1, 2], "")
    made._balance.add(-1.0)
    written = []
    for step in range(31):
        assert made.drafts({"a": 1000}, 0) == []
        made.verified("a", [], [step])
        written.append(step)
    assert proposer.known["a"] == [1, 2]
    made.drafts({"a": 1000}, 0)
    assert proposer.known["a"] == [1, 2, *written]


def test_hidden_rows_are_asked_for_only_where_drafts_may_follow() -> None:
    proposer = Fixed(1)
    proposer.hidden_width = 8
    made = Speculator(proposer, vocab_size=10, times=StepTimes({1: 1.0, 2: 1.5, 64: 64.0}))
    made.begin("a", [1, 2], "")
    assert made.hidden_width == 8
    made._balance.add(-1.0)
    widths = []
    for step in range(31):
        assert made.drafts({"a": 1000}, 0) == []
        widths.append(made.hidden_width)
        made.verified("a", [], [step])
    assert widths == [0] * 30 + [8]  # the last step's are what the next look drafts from


def test_what_gains_stays_awake() -> None:
    made = speculator(1)
    for _ in range(50):
        assert made.drafts({"a": 1000}, 0) == [Drafted("a", (1,))]
        made.verified("a", [1], [1, 3])

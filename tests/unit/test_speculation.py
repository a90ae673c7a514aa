"""Drafts: where they come from, how many are worth it, and what a scheduler makes of them."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import Drafted, Outcome, StepPlan, Submit
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Goal
from engine.speculation import Speculator, SpeculatorPair, StepTimes, open_speculator
from engine.speculation.lengths import Acceptance, Lengths, best_lengths
from engine.speculation.past_outputs import MOST_TENANTS, MOST_TOKENS, PastOutputs
from engine.speculation.prompt_lookup import PromptLookup
from engine.speculation.proposer import Draft, Floats
from engine.speculation.speculator import MOST_DRAFTS
from engine.speculation.suffix_automaton import Reader, SuffixAutomaton
from kvstore.pool import PagePool
from kvstore.prefix_hash import PrefixHasher

FLAT = StepTimes({1: 1.0, 64: 1.0})
DEAR = StepTimes({1: 1.0, 2: 2.0, 64: 64.0})
PAGE = 16


def lookup_of(tokens: Sequence[int], past: PastOutputs | None = None) -> PromptLookup:
    lookup = PromptLookup(past)
    lookup.begin("a", tokens[:-1], "")
    lookup.extend("a", tokens[-1:])
    return lookup


def draft_after(tokens: Sequence[int], most: int = 4) -> Draft:
    return lookup_of(tokens).propose({"a": most})["a"]


# -- the longest match

TEXTS = st.integers(1, 5).flatmap(lambda most: st.lists(st.integers(0, most), max_size=40))


def longest_suffix_in(text: list[int], of: list[int]) -> int:
    """How many of the last tokens of ``of`` stand in ``text`` somewhere."""
    return max(
        length
        for length in range(len(of) + 1)
        if not length
        or any(text[at : at + length] == of[-length:] for at in range(len(text) - length + 1))
    )


@given(TEXTS)
def test_the_longest_suffix_that_stood_before_is_found(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for number, token in enumerate(text, start=1):
        automaton.append(token)
        length, after = automaton.repeat.length, automaton.repeat.after
        assert length == longest_suffix_in(text[: number - 1], text[:number])
        if length:
            assert after < number
            assert text[after - length : after] == text[number - length : number]


@given(TEXTS, TEXTS, TEXTS)
def test_another_text_is_followed_while_the_first_one_grows(
    text: list[int], more: list[int], other: list[int]
) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    reader = Reader(automaton)
    for number, token in enumerate(other, start=1):
        reader.read(token)
        assert reader.match.length == longest_suffix_in(text, other[:number])
    for added, token in zip_longest(more, other, fillvalue=0):
        automaton.append(added)
        reader.read(token)
        match, whole = reader.match, automaton.tokens.tolist()
        read = [*other, *other, *[0] * len(more)][: len(other) + len(whole) - len(text)]
        if match.length:
            assert whole[match.after - match.length : match.after] == read[-match.length :]


def test_a_text_takes_less_than_250_bytes_a_token() -> None:
    rng = random.Random(1)
    tokens = [min(int(rng.paretovariate(0.7)), 40_000) for _ in range(8000)]
    tracemalloc.start()
    automaton = SuffixAutomaton()
    for token in tokens:
        automaton.append(token)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 250 * len(tokens)


# -- prompt lookup


def test_what_followed_the_last_tokens_before_is_proposed() -> None:
    assert draft_after([1, 2, 3, 4, 5, 6, 9, 1, 2, 3]).tokens == (4, 5, 6, 9)


def test_the_latest_of_several_places_counts() -> None:
    assert draft_after([1, 2, 7, 1, 2, 8, 1, 2], most=2).tokens == (8, 1)


def test_a_longer_match_is_preferred_and_promises_more() -> None:
    found = draft_after([5, 1, 2, 3, 7, 0, 1, 2, 3, 8, 5, 1, 2, 3], most=1)
    assert found.tokens == (7,)
    assert found.confidence > draft_after([2, 3, 7, 9, 2, 3], most=1).confidence


def test_a_repetition_goes_on_past_the_end() -> None:
    assert draft_after([0, 1, 2, 1, 2, 1, 2], most=5).tokens == (1, 2, 1, 2, 1)


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 2, 3, 4, 5]])
def test_without_a_match_nothing_is_proposed(tokens: list[int]) -> None:
    assert draft_after(tokens) == Draft()


def test_what_matches_promise_is_what_came_true_lately() -> None:
    lookup = lookup_of([1, 2])
    before = draft_after([1, 2, 3, 1, 2]).confidence
    for other in range(50):  # 1, 2 stood before and never goes on as it did
        lookup.extend("a", [100 + other, 1, 2])
    disappointed = lookup.propose({"a": 1})["a"].confidence
    assert disappointed < before / 2
    for _ in range(50):
        lookup.extend("a", [9, 1, 2])
    assert lookup.propose({"a": 1})["a"].confidence > 0.8


def test_sequences_do_not_see_each_other() -> None:
    lookup = PromptLookup()
    lookup.begin("a", [1, 2, 3, 4], "")
    lookup.begin("b", [1, 2], "")
    assert lookup.propose({"b": 4}) == {"b": Draft()}
    lookup.forget("a")
    lookup.forget("a")


# -- past outputs


def past_outputs(**outputs: Sequence[int]) -> PastOutputs:
    past = PastOutputs()
    for tenant, tokens in outputs.items():
        past.add(tenant, tokens)
    return past


def test_what_a_tenant_was_answered_is_proposed_again_up_to_its_end() -> None:
    lookup = PromptLookup(PastOutputs())
    lookup.begin("a", [50, 51], "tenant")
    lookup.extend("a", [1, 2, 3, 4])
    lookup.forget("a")
    lookup.begin("b", [60, 1, 2], "tenant")
    assert lookup.propose({"b": 9})["b"].tokens == (3, 4)
    lookup.begin("c", [60, 50, 51], "tenant")  # a prompt is no output
    assert lookup.propose({"c": 9})["c"] == Draft()


def test_no_tenant_is_served_another_ones_outputs() -> None:
    past = past_outputs(one=[1, 2, 3, 4])
    lookup = PromptLookup(past)
    for tenant, found in (("one", (3, 4)), ("other", ()), ("", ())):
        lookup.begin("a", [1, 2], tenant)
        assert lookup.propose({"a": 9})["a"].tokens == found


def test_old_outputs_and_tenants_not_heard_of_are_forgotten() -> None:
    past = past_outputs(one=[1, 2, 3])
    for _ in range(3):
        past.add("one", range(MOST_TOKENS))
    assert [len(reader.automaton.tokens) for reader in past.readers("one")] == [MOST_TOKENS + 1] * 2
    for number in range(MOST_TENANTS):
        past.add(f"other {number}", [1, 2])
    assert not past.readers("one")
    assert past.readers("other 0")


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
    assert best_lengths([0.02], [5], 1, 1, FLAT) == Lengths([0], 0.0)
    assert best_lengths([0.05], [5], 1, 1, FLAT).each != [0]


def test_a_table_of_times_has_what_is_asked_for_one_by_one() -> None:
    times = StepTimes({2: 1.0, 4: 2.0})
    times.learn(3, 5.0)
    assert times.up_to(9) == pytest.approx([times.seconds(rows) for rows in range(10)])


def test_times_follow_the_steps() -> None:
    times = StepTimes({1: 1.0, 4: 2.0})
    for _ in range(200):
        times.learn(1, 3.0)
    assert times.seconds(1) == pytest.approx(3.0, rel=0.01)
    # Of what one row took longer than measured, five sixths count for all numbers of rows.
    assert times.seconds(4) == pytest.approx(2.0 + 2.0 * 5 / 6, rel=0.01)
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


# -- the scheduler


class Driver:
    """A scheduler whose model counts upwards: after token ``t`` comes ``t + 1``."""

    def __init__(self, num_pages: int, **limits: int) -> None:
        self.pool = PagePool(num_pages, PAGE, clock=lambda: 0.0)
        self.scheduler = Scheduler(
            self.pool,
            SchedulerLimits(**({"max_sequences": 4, "max_step_tokens": 64} | limits)),
            lambda tenant: PrefixHasher(tenant, bytes(16), PAGE),
        )

    def step(self, *events: Submit | Drafted) -> StepPlan:
        plan = self.scheduler.plan(events)
        outcomes: dict[str, Outcome | None] = {}
        for rows in plan.rows:
            assert len(rows.pages) * PAGE >= rows.start + len(rows.tokens)
            if not rows.wants_logits:
                outcomes[rows.name] = Outcome()
                continue
            last = rows.tokens[-1 - rows.num_drafts]
            right = [last + 1]
            for draft in rows.drafts:
                if draft != right[-1]:
                    break
                right.append(draft + 1)
            outcomes[rows.name] = Outcome(tuple(right))
        self.scheduler.complete(plan, outcomes)
        self.scheduler.check()
        return plan

    def tokens(self, name: str = "a") -> list[int]:
        sequence = self.scheduler.sequence(name)
        assert sequence is not None
        assert sequence.num_computed == len(sequence.tokens) - 1
        used, needed = map(self.pool.pages_for, (sequence.num_computed, len(sequence.tokens)))
        assert used <= len(sequence.pages) <= needed
        return sequence.tokens

    def start(self, num_prompt: int, name: str = "a") -> None:
        self.step(Submit(name, Goal.GENERATE, tuple(range(num_prompt))))


def test_right_drafts_are_tokens_and_wrong_ones_leave_no_trace() -> None:
    driver = Driver(num_pages=8)
    driver.start(10)
    plan = driver.step(Drafted("a", (11, 12, 99, 14)))
    assert plan.rows[0].tokens == (10, 11, 12, 99, 14)
    assert (plan.rows[0].num_drafts, plan.rows[0].num_logits) == (4, 5)
    assert driver.tokens() == list(range(14))
    driver.step()
    assert driver.tokens() == list(range(15))


def test_pages_are_sealed_under_the_tokens_that_were_accepted() -> None:
    one, other = Driver(num_pages=8), Driver(num_pages=8)
    one.start(10)
    one.step(Drafted("a", (11, 12, 13, 77, 15, 16, 17, 18)))
    one.step(Drafted("a", tuple(range(15, 25))))
    other.start(10)
    while len(other.tokens()) < len(one.tokens()):
        other.step()
    first, second = (each.scheduler.sequence("a") for each in (one, other))
    assert first is not None
    assert second is not None
    assert first.tokens == second.tokens
    assert first.page_names == second.page_names
    assert len(first.page_names) == 1


def test_pages_that_only_rejected_drafts_needed_are_given_back() -> None:
    driver = Driver(num_pages=8)
    driver.start(14)
    plan = driver.step(Drafted("a", (0,) * 15))
    assert len(plan.rows[0].pages) == 2
    assert len(driver.tokens()) == 16
    assert driver.pool.num_available == 7


def test_drafts_take_no_page_that_others_will_need() -> None:
    driver = Driver(num_pages=3)
    driver.start(15, "a")
    driver.start(15, "b")  # "a" begins its second page, the last one
    plan = driver.step(Drafted("a", (17, 18, 19)), Drafted("b", (16, 17)))
    assert {rows.name: rows.num_drafts for rows in plan.rows} == {"a": 3, "b": 0}
    assert not plan.preempted
    assert driver.pool.num_available == 0


def test_a_page_is_left_for_everyone_who_runs() -> None:
    driver = Driver(num_pages=4)
    driver.start(14, "a")
    driver.start(4, "b")
    plan = driver.step(Drafted("a", (16, 17, 18)))  # of two pages left, one would be taken
    assert {rows.name: rows.num_drafts for rows in plan.rows} == {"a": 0, "b": 0}


def test_drafts_are_cut_to_the_rows_that_are_left_in_a_step() -> None:
    driver = Driver(num_pages=8, max_sequences=2, max_step_tokens=6)
    for name in "ab":
        driver.start(4, name)
    driver.step()
    last = len(driver.tokens("a")) - 1
    drafts = tuple(range(last + 1, last + 9))
    plan = driver.step(Drafted("a", drafts), Drafted("b", drafts))
    assert sum(len(rows.tokens) for rows in plan.rows) == 6
    assert [rows.num_drafts for rows in plan.rows] == [4, 0]


def test_drafts_count_for_one_step_and_for_sequences_that_decode() -> None:
    driver = Driver(num_pages=8, chunk_tokens=8)
    plan = driver.step(
        Submit("a", Goal.GENERATE, tuple(range(20))), Drafted("a", (20,)), Drafted("nobody", (1,))
    )
    assert [rows.num_drafts for rows in plan.rows] == [0]
    assert [rows.num_drafts for rows in driver.step().rows] == [0]
    assert driver.step().rows[0].tokens == (16, 17, 18, 19)


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


def test_what_gains_stays_awake() -> None:
    made = speculator(1)
    for _ in range(50):
        assert made.drafts({"a": 1000}, 0) == [Drafted("a", (1,))]
        made.verified("a", [1], [1, 3])

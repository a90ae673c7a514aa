"""What is copied: the longest match, in a text itself and in what a tenant was answered."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.speculation.past_outputs import MOST_TENANTS, MOST_TOKENS, PastOutputs
from engine.speculation.prompt_lookup import PromptLookup
from engine.speculation.proposer import Draft


def lookup_of(tokens: Sequence[int], past: PastOutputs | None = None) -> PromptLookup:
    lookup = PromptLookup(past)
    lookup.begin("a", tokens[:-1], "")
    lookup.extend("a", tokens[-1:])
    return lookup


def draft_after(tokens: Sequence[int], most: int = 4) -> Draft:
    return lookup_of(tokens).propose({"a": most})["a"]


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
    assert [*map(len, past.texts("one"))] == [MOST_TOKENS + 1] * 2
    for number in range(MOST_TENANTS):
        past.add(f"other {number}", [1, 2])
    assert not past.texts("one")
    assert past.texts("other 0")

"""The longest match, in a text itself and of another text in it: as plain Python and natively."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.suffix_automaton import Match, SuffixAutomaton, cpu_kernel, reference

Make = Callable[[], SuffixAutomaton]
TEXTS = st.integers(1, 5).flatmap(lambda most: st.lists(st.integers(0, most), max_size=40))
both = pytest.mark.parametrize(
    "make", [reference.suffix_automaton, cpu_kernel.suffix_automaton], ids=["reference", "cpu"]
)


def longest_suffix_in(text: list[int], of: list[int]) -> int:
    """How many of the last tokens of ``of`` stand in ``text`` somewhere."""
    return max(
        length
        for length in range(len(of) + 1)
        if not length
        or any(text[at : at + length] == of[-length:] for at in range(len(text) - length + 1))
    )


@both
@given(text=TEXTS)
def test_the_longest_suffix_that_stood_before_is_found(make: Make, text: list[int]) -> None:
    automaton = make()
    for number, token in enumerate(text, start=1):
        automaton.append([token])
        length, after = automaton.repeat
        assert length == longest_suffix_in(text[: number - 1], text[:number])
        if length:
            assert after < number
            assert text[after - length : after] == text[number - length : number]


@both
@given(text=TEXTS, more=TEXTS, other=TEXTS)
def test_another_text_is_followed_while_the_first_one_grows(
    make: Make, text: list[int], more: list[int], other: list[int]
) -> None:
    automaton = make()
    automaton.append(text)
    reader = automaton.reader()
    for number, token in enumerate(other, start=1):
        reader.read([token])
        assert Match(*reader.match).length == longest_suffix_in(text, other[:number])
    for added, token in zip_longest(more, other, fillvalue=0):
        automaton.append([added])
        reader.read([token])
        match, whole = Match(*reader.match), automaton.tokens(0, len(automaton))
        read = [*other, *other, *[0] * len(more)][: len(other) + len(whole) - len(text)]
        if match.length:
            assert whole[match.after - match.length : match.after] == read[-match.length :]


@pytest.mark.parametrize("most", [1, 3, 40_000])
def test_the_native_one_says_what_the_reference_says(most: int) -> None:
    rng = random.Random(most)
    plain, fast = reference.suffix_automaton(), cpu_kernel.suffix_automaton()
    readers = plain.reader(), fast.reader()
    for _ in range(400):
        tokens = [min(int(rng.paretovariate(0.7)), most) for _ in range(rng.randint(0, 9))]
        plain.append(tokens)
        fast.append(tuple(tokens))
        other = [min(int(rng.paretovariate(0.7)), most)]
        for reader in readers:
            reader.read(other)
        assert tuple(plain.repeat) == tuple(fast.repeat)
        assert tuple(readers[0].match) == tuple(readers[1].match)
        assert len(plain) == len(fast)
        assert plain.tokens(len(plain) // 2, 2**40) == fast.tokens(len(fast) // 2, 2**40)


def test_a_reader_keeps_its_automaton() -> None:
    automaton = cpu_kernel.suffix_automaton()
    automaton.append([1, 2, 3])
    reader = automaton.reader()
    del automaton
    reader.read([2, 3])
    assert tuple(reader.match) == (2, 3)


def test_what_is_no_token_or_place_is_refused() -> None:
    automaton = cpu_kernel.suffix_automaton()
    with pytest.raises(TypeError):
        automaton.append([2**40])
    with pytest.raises(ValueError, match="start must be at least 0"):
        automaton.tokens(-1, 2)
    assert len(automaton) == 0
    assert automaton.tokens(5, 2) == []


def test_a_text_takes_less_than_250_bytes_a_token() -> None:
    rng = random.Random(1)
    tokens = [min(int(rng.paretovariate(0.7)), 40_000) for _ in range(8000)]
    tracemalloc.start()
    automaton = reference.suffix_automaton()
    automaton.append(tokens)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 250 * len(tokens)

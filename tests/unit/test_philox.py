"""Philox4x32-10 against the known answers its authors publish with Random123."""

import numpy as np
import pytest

from kernels.sample.philox import philox4x32, token_words

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    low, high = words_of(key)
    counters = np.array(words_of(counter), dtype=np.uint64)[:, None]
    assert philox4x32(counters, low | high << 32)[:, 0].tolist() == words_of(answer)


def test_blocks_computed_together_equal_blocks_computed_alone():
    counters = np.arange(4 * 37, dtype=np.uint64).reshape(4, 37) * np.uint64(0x01234567)
    together = philox4x32(counters & np.uint64(0xFFFFFFFF), key=2**64 - 3)
    for index in range(37):
        alone = philox4x32(counters[:, index : index + 1] & np.uint64(0xFFFFFFFF), key=2**64 - 3)
        assert together[:, index].tolist() == alone[:, 0].tolist()


def test_a_token_has_one_word_of_the_block_its_id_position_and_choice_name():
    seed, position, choice_index, token_id = 0x299F31D0A4093822, 71, 5, 4 * 1009 + 2
    counter = np.array([[1009], [71], [5], [0]], dtype=np.uint64)
    word = token_words(seed, position, choice_index, np.array([token_id]))
    assert word.tolist() == [philox4x32(counter, seed)[2, 0]]


@pytest.mark.parametrize("ids", [[0], [3, 4], [1, 5, 6, 7, 900], [49_151], [0, 1, 2, 3, 4, 5, 6]])
def test_a_token_has_the_same_word_whichever_others_are_asked_for(ids):
    whole_vocabulary = token_words(9, 13, 1, np.arange(49_152))
    assert token_words(9, 13, 1, np.array(ids)).tolist() == whole_vocabulary[ids].tolist()


@pytest.mark.parametrize(
    "place", [(1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32 - 1, 0), (0, 0, 1), (0, 0, 63)]
)
def test_every_input_of_the_noise_changes_it(place):
    ids = np.arange(64)
    assert not np.any(token_words(*place, ids) == token_words(0, 0, 0, ids))

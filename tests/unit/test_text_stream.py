"""Text and ends of outputs against an offline definition that sees the whole output at once."""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.finish import FinishReason, OutputTracker
from engine.sampling_params import SamplingParams
from engine.text_stream import TextStream

EOS, STOP_ID = 100, 101


def tracker(pieces, max_tokens=10**6, **params):
    """A tracker of tokens 0, 1, ... that stand for ``pieces``; EOS has no bytes, STOP_ID has."""
    token_bytes = {**dict(enumerate(pieces)), EOS: b"", STOP_ID: b"<id>"}
    return OutputTracker(SamplingParams(**params), {EOS}, token_bytes.__getitem__, max_tokens)


def run(pieces, token_ids=None, **settings):
    """Pushes tokens until one finishes the output; the deltas."""
    following, deltas = tracker(pieces, **settings), []
    for token_id in range(len(pieces)) if token_ids is None else token_ids:
        deltas.append(following.push(token_id))
        if deltas[-1].finish is not None:
            break
    return deltas


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


# -- the offline definition


def certain_text(data):
    """The text of bytes that more may follow: all but an unfinished last character."""
    for num_unfinished in range(min(len(data), 3) + 1):
        head = data[: len(data) - num_unfinished]
        tail = data[len(head) :]
        if not tail or is_unfinished_character(tail):
            longest = head
    return longest.decode("utf-8", errors="replace")


def is_unfinished_character(tail):
    """Whether some continuation makes ``tail`` one character."""
    return any(
        decodes_to_one_character(tail + bytes(rest))
        for rest in ([0x80], [0xBF], [0x80, 0x80], [0xBF, 0x80], [0x80] * 3, [0xBF, 0x80, 0x80])
    )


def decodes_to_one_character(data):
    try:
        return len(data.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


def offline(pieces, stops, include_stop=False, min_tokens=0):
    """(number of tokens, text, matched stop) of tokens that end with the last piece at most."""
    before = 0
    for count in range(1, len(pieces) + 1):
        text = certain_text(b"".join(pieces[:count]))
        ends = [
            (start, -len(stop), stop)
            for stop in stops
            for start in range(len(text) - len(stop) + 1)
            if text.startswith(stop, start) and start + len(stop) > before
        ]
        if ends and count >= min_tokens:
            start, _, stop = min(ends)
            return count, text[: start + len(stop) * include_stop], stop
        before = len(text)
    return len(pieces), b"".join(pieces).decode("utf-8", errors="replace"), None


def split_at(data, cuts):
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[a:b] for a, b in pairwise(borders)]


texts = st.text(alphabet="ab\né語😀", max_size=30)
datas = (
    texts.map(str.encode)
    | st.binary(max_size=20)
    | st.lists(
        st.sampled_from(
            [b"a", b"b", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98\x80", b"\xe8\xaa", b"\xff"]
        )
    ).map(b"".join)
)
splits = st.builds(split_at, datas, st.lists(st.integers(1, 60), max_size=40))
stop_lists = st.lists(st.text(alphabet="ab\né語😀�", min_size=1, max_size=4), max_size=4)


@given(splits, stop_lists, st.booleans(), st.integers(0, 6))
@example([b"a", b"b"], ["ab", "b"], False, 0)
@example([b"aab"], ["ab", "aab", "aa"], True, 0)
@example([b"\xf0\x9f", b"\x98", b"\x80"], ["😀"], False, 0)
@example([b"a", b"a", b"a", b"b"], ["aab", "aa"], False, 3)
def test_any_split_of_any_bytes_gives_the_text_of_the_offline_definition(
    pieces, stops, include_stop, min_tokens
):
    count, text, matched = offline(pieces, stops, include_stop, min_tokens)
    deltas = run(
        pieces,
        max_tokens=len(pieces),
        stop=stops,
        include_stop=include_stop,
        min_tokens=min_tokens,
    )
    assert len(deltas) == count
    assert text_of(deltas) == text
    assert [delta.finish for delta in deltas[:-1]] == [None] * len(deltas[:-1])
    if deltas:
        assert deltas[-1].matched_stop == matched
        assert deltas[-1].finish is (FinishReason.STOP if matched else FinishReason.LENGTH)


@given(splits, stop_lists)
def test_text_waits_no_longer_than_it_must(pieces, stops):
    following = tracker(pieces, stop=stops)
    sent = ""
    for count in range(1, offline(pieces, stops)[0] + 1):
        delta = following.push(count - 1)
        sent += delta.text
        if delta.finish is None:
            text = certain_text(b"".join(pieces[:count]))
            ends = [text[start:] for start in range(len(text))]
            waiting = [end for end in ends if any(stop.startswith(end) for stop in stops)]
            assert sent == text.removesuffix(max(waiting, key=len, default=""))


@given(texts, st.lists(st.integers(1, 60), max_size=40))
def test_streaming_never_emits_half_a_character(text, cuts):
    pieces = split_at(text.encode(), cuts)
    stream = TextStream((), include_stop=False)
    pushed = [stream.push(piece) for piece in pieces]
    assert "".join(pushed) == text
    assert stream.flush() == ""


@given(splits, stop_lists, st.integers(0, 20))
def test_replaying_the_tokens_rebuilds_a_tracker(pieces, stops, num_replayed):
    whole = run(pieces, stop=stops)
    num_replayed = min(num_replayed, len(whole))
    rebuilt = tracker(pieces, stop=stops)
    for token_id in range(num_replayed):
        rebuilt.push(token_id)
    rest = [rebuilt.push(token_id) for token_id in range(num_replayed, len(whole))]
    assert rest == whole[num_replayed:]


# -- one rule each


def test_text_waits_while_it_may_begin_a_stop_string():
    deltas = run([b"one ", b"</", b"s", b"p", b"</s", b">"], stop=["</s>"])
    assert [delta.text for delta in deltas] == ["one ", "", "", "</sp", "", ""]
    assert (deltas[-1].finish, deltas[-1].matched_stop) == (FinishReason.STOP, "</s>")


@pytest.mark.parametrize(("include_stop", "text"), [(False, "x"), (True, "xEND")])
def test_text_ends_before_the_stop_string_unless_it_is_included(include_stop, text):
    deltas = run([b"xE", b"NDtail"], stop=["END"], include_stop=include_stop)
    assert text_of(deltas) == text


@pytest.mark.parametrize(
    ("stops", "matched"),
    [
        (["b", "ab"], "ab"),  # begins first
        (["ab", "abc"], "abc"),  # longest
        (["bc", "c"], "bc"),
        (["c", "b"], "b"),
    ],
)
def test_of_stop_strings_completed_by_one_token_the_first_and_longest_counts(stops, matched):
    assert run([b"x", b"abcd"], stop=stops)[-1].matched_stop == matched


def test_the_stop_string_completed_by_the_earlier_token_wins():
    deltas = run([b"a", b"b", b"c"], stop=["abc", "b"])
    assert (text_of(deltas), deltas[-1].matched_stop, len(deltas)) == ("a", "b", 2)


def test_a_stop_string_before_min_tokens_is_ordinary_text():
    deltas = run([b"a.", b"b", b".", b"c"], stop=["."], min_tokens=3)
    assert (text_of(deltas), len(deltas)) == ("a.b", 3)


def test_a_stop_string_may_begin_before_min_tokens():
    deltas = run([b"x", b"a", b"b", b"c"], stop=["ab"], min_tokens=3)
    assert (text_of(deltas), len(deltas)) == ("x", 3)


def test_end_of_sequence_releases_the_text_held_back():
    deltas = run([b"x<", b"/"], [0, 1, EOS], stop=["</s>"])
    assert [delta.text for delta in deltas] == ["x", "", "</"]
    assert (deltas[-1].finish, deltas[-1].matched_stop) == (FinishReason.STOP, EOS)


@pytest.mark.parametrize(("include_stop", "text"), [(False, "x"), (True, "x<id>")])
def test_the_text_of_a_stop_id_is_left_out_unless_included(include_stop, text):
    deltas = run([b"x"], [0, STOP_ID], stop_token_ids=[STOP_ID], include_stop=include_stop)
    assert text_of(deltas) == text
    assert (deltas[-1].finish, deltas[-1].matched_stop) == (FinishReason.STOP, STOP_ID)


def test_ignore_eos_runs_past_end_of_sequence_but_not_past_stops():
    deltas = run([b"x", b"y"], [EOS, 0, EOS, STOP_ID], ignore_eos=True, stop_token_ids=[STOP_ID])
    assert (len(deltas), text_of(deltas)) == (4, "x")
    deltas = run([b"x", b"y"], [EOS, 0, EOS, 1], ignore_eos=True, stop=["xy"])
    assert (len(deltas), deltas[-1].matched_stop) == (4, "xy")


def test_ignore_eos_does_not_hide_an_id_that_is_also_a_stop_id():
    deltas = run([b"x"], [0, EOS], ignore_eos=True, stop_token_ids=[EOS])
    assert (deltas[-1].finish, deltas[-1].matched_stop) == (FinishReason.STOP, EOS)


def test_max_tokens_ends_with_everything_held_back():
    deltas = run([b"x<", b"/s", b"\xf0\x9f"], max_tokens=3, stop=["</s>"])
    assert [delta.text for delta in deltas] == ["x", "", "</s\ufffd"]
    assert (deltas[-1].finish, deltas[-1].matched_stop) == (FinishReason.LENGTH, None)


def test_a_stop_at_the_last_allowed_token_is_a_stop():
    assert run([b"a", b"b"], max_tokens=2, stop=["b"])[-1].finish is FinishReason.STOP
    assert run([b"a"], [0, EOS], max_tokens=2)[-1].finish is FinishReason.STOP


def test_flush_gives_the_text_held_back_by_an_output_cut_short():
    following = tracker([b"x<", b"/\xc3"], stop=["</s>"])
    assert following.push(0).text + following.push(1).text == "x"
    assert following.flush() == "</\ufffd"


def test_finish_reasons_have_their_wire_names():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "cancelled", "error"]


def test_text_and_token_function_import_neither_torch_nor_grpc_nor_redis():
    code = (
        "import sys, engine.finish, engine.text_stream, engine.token_function;"
        "sys.exit(bool({'torch', 'grpc', 'redis'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

"""Progress of a long wait: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest

from engine.progress import Progress, Silence


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO) -> str:
    progress = Progress(stream)
    with progress.begin("loading weights", 3):
        for _ in range(3):
            progress.advance()
    return stream.getvalue()


def test_a_terminal_gets_a_bar_that_ends_full_and_with_a_new_line() -> None:
    text = run(Terminal())
    last = text.rpartition("\r")[2]
    assert "3/3" in last
    assert "." not in last.partition("]")[0]
    assert last.endswith("\n")
    assert text.count("\n") == 1


def test_a_file_gets_whole_lines_and_no_control_characters() -> None:
    text = run(io.StringIO())
    assert "\r" not in text
    (line,) = text.splitlines()
    assert line.startswith("loading weights: 3/3, ")


def test_an_error_finds_a_line_of_its_own() -> None:
    stream = Terminal()
    with pytest.raises(ValueError, match="damaged"), Progress(stream).begin("loading weights", 3):
        raise ValueError("damaged")
    assert "0/3" in stream.getvalue()
    assert stream.getvalue().endswith("\n")


def test_silence_shows_nothing_and_counts_nothing() -> None:
    silence = Silence()
    with silence.begin("loading weights", 3):
        silence.advance()

"""Log lines: one format, and no way for a value to make a line of its own."""

from __future__ import annotations

import logging
import re
import sys

import pytest

from engine.telemetry.logs import LineFormatter, fields


def line(message: str, *args: object, **facts: object) -> str:
    record = logging.LogRecord("quire", logging.INFO, "f.py", 1, message, args, None)
    vars(record).update(fields(**facts))
    return LineFormatter("decode").format(record)


def test_line_has_time_level_service_message_and_facts() -> None:
    shown = line("serving", endpoint="127.0.0.1:1", running=3)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO decode serving"
        r" endpoint=127\.0\.0\.1:1 running=3",
        shown,
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "x"', r'"say \"x\""'),
        ("line\nINFO decode forged", r'"line\nINFO decode forged"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("", '""'),
        (None, "None"),
        ("größer", "größer"),
    ],
)
def test_value_that_is_not_one_plain_word_is_quoted(value: object, shown: str) -> None:
    assert line("m", key=value).endswith(f" m key={shown}")


def test_message_stays_on_one_line() -> None:
    assert "\n" not in line("first %s", "a\nb")


def test_traceback_follows_indented() -> None:
    try:
        raise KeyError("gone")
    except KeyError:
        record = logging.LogRecord("q", logging.ERROR, "f", 1, "internal error", (), sys.exc_info())
    first, *rest = LineFormatter("decode").format(record).splitlines()
    assert first.endswith(" ERROR decode internal error")
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-1] == "    KeyError: 'gone'"
    assert all(each.startswith("    ") for each in rest)

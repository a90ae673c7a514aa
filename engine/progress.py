"""A long wait shows how far it is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

_WIDTH = 30
_BAR_EVERY_S = 0.05
_LINE_EVERY_S = 2.0


class ProgressSink(Protocol):
    def begin(self, what: str, total: int) -> AbstractContextManager[None]:
        """The wait lasts as long as the block; ``total`` is what ``advance`` adds up to."""
        ...

    def advance(self, count: int = 1) -> None: ...


class Silence:
    """Shows nothing."""

    @contextmanager
    def begin(self, what: str, total: int) -> Iterator[None]:
        yield

    def advance(self, count: int = 1) -> None:
        pass


class Progress:
    """Writes to ``stream``: a bar that redraws itself on a terminal, else a line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._what = ""
        self._total = 1
        self._done = 0
        self._began = 0.0
        self._shown = 0.0

    @contextmanager
    def begin(self, what: str, total: int) -> Iterator[None]:
        self._what, self._total, self._done = what, max(total, 1), 0
        self._began = self._shown = time.monotonic()
        try:
            yield
        finally:  # an error's message must not land on the bar's line
            self._show()
            if self._terminal:
                self._stream.write("\n")

    def advance(self, count: int = 1) -> None:
        self._done += count
        every = _BAR_EVERY_S if self._terminal else _LINE_EVERY_S
        if time.monotonic() - self._shown >= every:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        share = self._done / self._total
        took = f"{self._shown - self._began:.1f} s"
        if self._terminal:
            bar = ("#" * round(share * _WIDTH)).ljust(_WIDTH, ".")
            self._stream.write(f"\r{self._what} [{bar}] {self._done}/{self._total} {took}")
        else:
            self._stream.write(f"{self._what}: {self._done}/{self._total}, {took}\n")
        self._stream.flush()


def default_progress() -> ProgressSink:
    """Progress on standard error."""
    return Progress(sys.stderr)

"""Whatever a service logs as an error must not happen in a simulation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Errors(logging.Handler):
    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report(f"logged: {record.getMessage()} {record.exc_info or ''}")


@contextmanager
def errors_logged(report: Callable[[str], None]) -> Iterator[None]:
    """Reports errors that are logged in the block, and keeps all else silent."""
    handler, root = _Errors(report), logging.getLogger()
    before = root.manager.disable
    logging.disable(logging.WARNING)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        logging.disable(before)

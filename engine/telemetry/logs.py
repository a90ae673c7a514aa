"""Log lines of a service: ``time level service message key=value ...`` on standard error.

Facts go beside a constant message, never into it::

    log.info("serving", extra=fields(endpoint="127.0.0.1:50052"))

Prompts and generated text are never logged, at no level.
"""

from __future__ import annotations

import json
import logging
import time

LEVELS = ("debug", "info", "warning", "error")


def setup_logging(service: str, level: str) -> None:
    """Sends every logger's lines to standard error; ``level`` is one of ``LEVELS``."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def fields(**values: object) -> dict[str, object]:
    """The ``extra`` of a logging call: shown as ``key=value`` after the message."""
    return {"fields": values}


class LineFormatter(logging.Formatter):
    """One line per record, in UTC; a traceback follows on indented lines."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage().replace("\n", "\\n")
        head = f"{when}.{int(record.msecs):03}Z {record.levelname} {self._service} {message}"
        facts = getattr(record, "fields", {})
        line = " ".join([head, *(f"{key}={_quoted(value)}" for key, value in facts.items())])
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join(f"\n    {each}" for each in trace.splitlines())
        return line


def _quoted(value: object) -> str:
    """As it is if it is one plain word, else in quotes: a value cannot begin a line of its own."""
    text = str(value)
    plain = text.isprintable() and text and not set(text) & set(' "=')
    return text if plain else json.dumps(text)

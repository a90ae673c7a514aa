"""Values of a model's metadata, believed only after a look: every refusal names the field."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from engine.errors import ModelError

MAX_COUNT = 1 << 24
MAX_NUMBER = 1e12


def count(
    raw: Mapping[str, Any], name: str, default: int | None = None, maximum: int = MAX_COUNT
) -> int:
    """A whole number from 1 to ``maximum``; ``default`` where it is absent or null."""
    found = raw.get(name)
    return check_count(name, default if found is None else found, maximum)


def number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A number above 0; ``default`` where it is absent or null."""
    found = raw.get(name)
    return check_number(name, default if found is None else found)


def flag(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise ModelError(f"model config: {name} is {reprlib.repr(value)}, not true or false")
    return value


def refuse_unless(raw: Mapping[str, Any], name: str, only: object) -> None:
    """Raises ModelError if the field asks for anything but ``only``; absent and null do not."""
    if raw.get(name, only) not in (only, None):
        raise ModelError(f"model config: {name} {raw[name]!r:.200} is not supported; {only!r} is")


def check_count(name: str, value: object, maximum: int = MAX_COUNT) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        raise ModelError(f"model config: {name} is {reprlib.repr(value)}, not 1 to {maximum}")
    return value


def check_number(name: str, value: object) -> float:
    """Refuses NaN too."""
    if isinstance(value, int | float) and 0 < value <= MAX_NUMBER:
        return float(value)
    raise ModelError(f"model config: {name} is {reprlib.repr(value)}, not above 0")

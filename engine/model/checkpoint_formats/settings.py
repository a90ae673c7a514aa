"""What a ``quantization_config`` says, each value one of those that are supported."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from engine.errors import ModelError

_GROUPS = (32, 64, 128, -1)
_SHOWN = 60  # characters of a name in a message


class Settings:
    """An object of config.json; every refusal names the path to the value and what is allowed."""

    def __init__(self, raw: object, path: str) -> None:
        if not isinstance(raw, Mapping):
            raise ModelError(f"model config: {path} is {reprlib.repr(raw)}, not an object")
        self._raw: Mapping[str, Any] = raw
        self._path = path

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def one_of(
        self, names: str | tuple[str, ...], allowed: tuple[Any, ...], default: Any = None
    ) -> Any:
        """The value of the first name that has one, in lower case; ``default`` if none has."""
        spellings = (names,) if isinstance(names, str) else names
        name = next((each for each in spellings if self._raw.get(each) is not None), spellings[0])
        value = self._raw.get(name, default)
        value = default if value is None else value
        value = value.lower() if isinstance(value, str) else value
        if not any(type(value) is type(each) and value == each for each in allowed):
            shown = ", ".join(str(each) for each in allowed)
            raise ModelError(
                f"model config: {self._path}.{name} {reprlib.repr(value)} is not supported; "
                f"supported: {shown}"
            )
        return value

    def group_size(self, names: str | tuple[str, ...] = "group_size") -> int | None:
        """None for one scale per row."""
        size: int = self.one_of(names, _GROUPS)
        return None if size == -1 else size

    def section(self, name: str) -> Settings:
        return Settings(self._raw.get(name), f"{self._path}.{name[:_SHOWN]}")

    def section_if_there(self, name: str) -> Settings | None:
        return None if self._raw.get(name) is None else self.section(name)

    def absent(self, *names: str) -> None:
        """Refuses anything but null and what is empty."""
        for name in names:
            if self._raw.get(name) not in (None, False, {}, []):
                shown = reprlib.repr(self._raw[name])
                raise ModelError(f"model config: {self._path}.{name} {shown} is not supported")

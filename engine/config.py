"""Settings of a program: one frozen dataclass, filled from flags, environment, a file and defaults.

A field is declared once, beside its default and range::

    @dataclass(frozen=True)
    class DecodeSettings:
        port: int = setting(50052, help="TCP port; 0 takes a free one", minimum=0, maximum=65535)

and can be set as ``--port 7``, ``QUIRE_PORT=7`` or ``port = 7`` in the TOML file that ``--config``
or ``QUIRE_CONFIG`` names; the first of these that is present wins. Unknown flags and unknown keys
of the file are refused. Unknown ``QUIRE_*`` variables are not: several programs share one
environment, and each reads its own fields from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


class SettingsError(Exception):
    """A setting is wrong; the message is one line: field, value, where it came from, range."""


def setting(
    default: T,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
) -> T:
    """Declares one field of a settings class.

    The range is inclusive and for numbers; ``choices`` are for strings, and for each entry of a
    tuple of strings. An empty text means None where the field's type allows None.
    """
    facts = {"help": help, "minimum": minimum, "maximum": maximum, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=facts)


def load_settings(cls: type[T], argv: Sequence[str], environ: Mapping[str, str], program: str) -> T:
    """An instance of the settings class ``cls``; ``argv`` is without the program's name.

    Supports fields of type int, float, str, bool, ``pathlib.Path`` and ``tuple[str, ...]``, each
    also with ``| None``. ``--help`` prints every field and raises SystemExit(0).

    Raises SettingsError.
    """
    settings = {field.name: field for field in _settings_of(cls)}
    flags = vars(_parser(settings.values(), program).parse_args(argv))
    path = flags.pop("config", None) or environ.get("QUIRE_CONFIG")
    found = _from_file(Path(path), settings) if path else {}
    found |= _from_environment(environ, settings)
    found |= {name: _Found(text, f"flag {settings[name].flag}") for name, text in flags.items()}
    return cls(**{name: settings[name].value_of(given) for name, given in found.items()})


def settings_from_command_line(cls: type[T], program: str) -> T:
    """``load_settings`` for this process; a wrong setting prints its line and exits with code 2."""
    try:
        return load_settings(cls, sys.argv[1:], os.environ, program)
    except SettingsError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@dataclass(frozen=True, slots=True)
class _Found:
    """A value as somebody wrote it: text, or what TOML made of it."""

    raw: object
    source: str


@dataclass(frozen=True, slots=True)
class _Setting:
    """One field of a settings class."""

    name: str
    kind: Any
    optional: bool
    default: object
    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "QUIRE_" + self.name.upper()

    @property
    def allowed(self) -> str:
        """What would be right, in words."""
        if self.choices:
            noun = "any of " if self.kind is tuple else ""
            return noun + ", ".join(self.choices)
        return _NOUNS[self.kind] + self._bounds()

    def value_of(self, given: _Found) -> object:
        if self.optional and given.raw == "":
            return None
        try:
            value = _READERS[self.kind](given.raw)
            self._check(value)
        except ValueError:
            raise SettingsError(
                f"{self.name}: {given.raw!r} from {given.source}; allowed: {self.allowed}"
            ) from None
        return value

    def _bounds(self) -> str:
        low, high = self.minimum, self.maximum
        if low is not None and high is not None:
            return f" from {low} to {high}"
        if low is not None:
            return f" of at least {low}"
        return "" if high is None else f" of at most {high}"

    def _check(self, value: Any) -> None:
        if self.minimum is not None and value < self.minimum:
            raise ValueError
        if self.maximum is not None and value > self.maximum:
            raise ValueError
        entries = value if isinstance(value, tuple) else (value,)
        if self.choices and not set(entries) <= set(self.choices):
            raise ValueError


def _settings_of(cls: type[Any]) -> Iterator[_Setting]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, optional = _kind_of(hints[field.name])
        yield _Setting(field.name, kind, optional, field.default, **field.metadata)


def _kind_of(hint: Any) -> tuple[Any, bool]:
    """The key into ``_READERS`` of a type hint, and whether None is allowed."""
    alternatives = [part for part in get_args(hint) if part is not NoneType]
    optional = NoneType in get_args(hint)
    kind = alternatives[0] if optional else hint
    kind = get_origin(kind) or kind
    assert kind in _READERS, f"a setting cannot be of type {hint}"
    return kind, optional


def _from_environment(
    environ: Mapping[str, str], settings: Mapping[str, _Setting]
) -> dict[str, _Found]:
    return {
        name: _Found(environ[setting.variable], f"environment {setting.variable}")
        for name, setting in settings.items()
        if setting.variable in environ
    }


def _from_file(path: Path, settings: Mapping[str, _Setting]) -> dict[str, _Found]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config: cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"config: {path} is not TOML: {error}") from None
    for name in values:
        if name not in settings:
            raise SettingsError(f"{name}: unknown key in file {path}{_hint(name, settings)}")
    return {name: _Found(value, f"file {path}") for name, value in values.items()}


def _hint(name: str, settings: Mapping[str, _Setting]) -> str:
    near = difflib.get_close_matches(name, settings, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SettingsError(message)


def _parser(settings: Iterable[_Setting], program: str) -> _Parser:
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawTextHelpFormatter,
        epilog="Flags win over environment variables, these over the file.",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings\n[QUIRE_CONFIG]")
    for setting in settings:
        _add_flag(parser, setting)
    return parser


def _add_flag(parser: _Parser, setting: _Setting) -> None:
    text = (
        f"{setting.help}\n{setting.allowed}; default {_shown(setting.default)} [{setting.variable}]"
    ).replace("%", "%%")
    if setting.kind is bool:
        parser.add_argument(setting.flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        parser.add_argument(setting.flag, metavar=setting.kind.__name__.upper(), help=text)


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(default) or "empty"
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default in (None, "") else str(default)


def _read_int(raw: object) -> int:
    if isinstance(raw, str):
        return int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    raise ValueError


def _read_float(raw: object) -> float:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError
    return value


def _read_bool(raw: object) -> bool:
    text = str(raw).lower()
    if isinstance(raw, str | bool) and text in _TRUE | _FALSE:
        return text in _TRUE
    raise ValueError


def _read_str(raw: object) -> str:
    if not isinstance(raw, str):
        raise ValueError
    return raw


def _read_path(raw: object) -> Path:
    text = _read_str(raw)
    if not text:
        raise ValueError
    return Path(text)


def _read_tuple(raw: object) -> tuple[str, ...]:
    entries = raw if isinstance(raw, list) else _read_str(raw).split(",")
    return tuple(_read_str(entry).strip() for entry in entries if entry != "")


_READERS = {
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
    str: _read_str,
    Path: _read_path,
    tuple: _read_tuple,
}
_NOUNS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    tuple: "texts separated by commas",
}

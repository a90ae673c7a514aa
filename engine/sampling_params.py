"""What a caller may ask of the token function, with the allowed range of every field."""

from __future__ import annotations

import reprlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Self

from engine.errors import InvalidRequest

GREEDY_BELOW = 1e-5
MAX_INT32 = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_STOP_IDS = 1024
MAX_MASK_IDS = 2**20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256

SEED_BITS = 64


@dataclass(frozen=True, slots=True)
class _Range:
    """Both ends are allowed unless ``above`` is set, which leaves out the low one."""

    low: int
    high: int
    above: bool = False

    def __contains__(self, value: float) -> bool:
        """False for NaN too."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"above {self.low} up to {self.high}" if self.above else f"{self.low} to {self.high}"


_NUMBERS = {
    "temperature": _Range(0, 100),
    "top_p": _Range(0, 1, above=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0, 100, above=True),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
}
_COUNTS = {
    "top_k": _Range(0, MAX_INT32),
    "n": _Range(1, MAX_CHOICES),
    "min_tokens": _Range(0, MAX_INT32),
}
_OPTIONAL_COUNTS = {
    "seed": _Range(0, MAX_SEED),
    "max_tokens": _Range(1, MAX_INT32),
    "logprobs": _Range(0, MAX_LOGPROBS),
}
_FLAGS = ("include_stop", "ignore_eos")
_ID_LISTS = {
    "allowed_token_ids": MAX_MASK_IDS,
    "banned_token_ids": MAX_MASK_IDS,
    "stop_token_ids": MAX_STOP_IDS,
}
_TOKEN_ID = _Range(0, MAX_INT32)
_BIAS = _Range(-100, 100)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Checked when made: raises InvalidRequest with the name of the field that is wrong.

    ``temperature``         0 to 100; 0 and anything below 1e-5 mean argmax
    ``top_p``               above 0 up to 1; 1 is off
    ``top_k``               0 (off) to 2^31 - 1
    ``min_p``               0 (off) to 1
    ``repetition_penalty``  above 0 up to 100, over prompt and output; 1 is off
    ``presence_penalty``    -2 to 2, over the output; 0 is off
    ``frequency_penalty``   -2 to 2, over the output; 0 is off
    ``logit_bias``          at most 1024 token ids, each with -100 to 100 added to its logit
    ``allowed_token_ids``   if not empty, only these ids may be chosen
    ``banned_token_ids``    never chosen
    ``seed``                0 to 2^64 - 1; None asks for a random one (``with_seed``)
    ``n``                   1 to 64 choices
    ``max_tokens``          1 to 2^31 - 1; None is as many as fit
    ``min_tokens``          0 to ``max_tokens``; ends of any kind wait for so many tokens
    ``stop``                at most 16 strings of 1 to 256 characters, or one such string
    ``stop_token_ids``      at most 1024 ids that end the output
    ``include_stop``        the text keeps what stopped it
    ``ignore_eos``          end-of-sequence ids do not end the output; stop ids and strings do
    ``logprobs``            0 to 20 top tokens beside the chosen one; None is no logprobs

    Numbers become floats, lists become tuples. Two equal values ask for the same tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in _NUMBERS.items():
            self._normalize(name, _number(name, getattr(self, name), allowed))
        for name, allowed in _COUNTS.items():
            _check_count(name, getattr(self, name), allowed)
        for name, allowed in _OPTIONAL_COUNTS.items():
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), allowed)
        for name in _FLAGS:
            _check_flag(name, getattr(self, name))
        for name, most in _ID_LISTS.items():
            self._normalize(name, _ids(name, getattr(self, name), most))
        self._normalize("logit_bias", _biases(self.logit_bias))
        self._normalize("stop", _stops(self.stop))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                "min_tokens", str(self.min_tokens), f"0 to max_tokens ({self.max_tokens})"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def with_seed(self) -> Self:
        """These parameters with a seed: their own, or 64 random bits."""
        if self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(SEED_BITS))

    def check_against(self, vocab_size: int) -> None:
        """Raises InvalidRequest for ids outside the vocabulary, and if no id may be chosen."""
        for name in ("logit_bias", *_ID_LISTS):
            highest = max(getattr(self, name), default=0)
            if highest >= vocab_size:
                raise InvalidRequest(name, f"token id {highest}", f"0 to {vocab_size - 1}")
        banned = set(self.banned_token_ids)
        if len(banned) == vocab_size or (
            self.allowed_token_ids and banned >= {*self.allowed_token_ids}
        ):
            raise InvalidRequest(
                "banned_token_ids", "every token is banned", "at least 1 token left to choose"
            )

    def _normalize(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _number(name: str, value: object, allowed: _Range) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(name, f"{_shown(value)} is no number", str(allowed))
    if value not in allowed:
        raise InvalidRequest(name, _shown(value), str(allowed))
    return float(value)


def _check_count(name: str, value: object, allowed: _Range) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, f"{_shown(value)} is no integer", str(allowed))
    if value not in allowed:
        raise InvalidRequest(name, _shown(value), str(allowed))


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(name, f"{_shown(value)} is no boolean", "true or false")


def _items(name: str, value: object, most: int) -> tuple[object, ...]:
    """The items of a list or the like, counted before they are looked at."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidRequest(name, f"{_shown(value)} is no list", f"a list of at most {most}")
    items = tuple(islice(value, most + 1))
    if len(items) > most:
        raise InvalidRequest(name, f"it has more than {most} entries", f"at most {most} entries")
    return items


def _ids(name: str, value: object, most: int) -> tuple[object, ...]:
    ids = _items(name, value, most)
    for token_id in ids:
        _check_count(name, token_id, _TOKEN_ID)
    return ids


def _biases(value: object) -> dict[object, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            "logit_bias", f"{_shown(value)} is no mapping", "token ids with a number each"
        )
    ids = _ids("logit_bias", value, MAX_BIASES)
    return {token_id: _number("logit_bias", value[token_id], _BIAS) for token_id in ids}


def _stops(value: object) -> tuple[object, ...]:
    stops = (value,) if isinstance(value, str) else _items("stop", value, MAX_STOPS)
    for stop in stops:
        _check_stop(stop)
    return stops


def _check_stop(stop: object) -> None:
    allowed = f"strings of 1 to {MAX_STOP_CHARACTERS} characters"
    if not isinstance(stop, str):
        raise InvalidRequest("stop", f"{_shown(stop)} is no string", allowed)
    if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
        raise InvalidRequest("stop", f"it has {len(stop)} characters", allowed)
    if any("\ud800" <= character <= "\udfff" for character in stop):
        raise InvalidRequest("stop", "it holds half a surrogate pair", allowed)


def _shown(value: object) -> str:
    """``value`` in a few words, however long it is."""
    if isinstance(value, int) and value.bit_length() > SEED_BITS:
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)

"""Which pages two workers may exchange: those whose bytes, or at least whose numbers, are equal.

::

    EQUAL         all fields agree: pages travel as they are
    CONVERTIBLE   other page size or order of bytes: the same numbers, put in another order
    FOREIGN       other KV dtype or numerics version: other numbers, refused unless allowed
    INCOMPATIBLE  another model or shape: never
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property

DIGEST_BYTES = 16
_ORDER = frozenset({"page_size", "layout_id"})
_NUMBERS = frozenset({"numerics", "kv_dtype"})


class Compatibility(StrEnum):
    """What a receiver can do with pages of another fingerprint than its own."""

    EQUAL = "equal"
    CONVERTIBLE = "convertible"
    FOREIGN = "foreign"
    INCOMPATIBLE = "incompatible"

    def readable(self, *, allow_foreign: bool) -> bool:
        """Whether the pages may be taken in."""
        if self is Compatibility.FOREIGN:
            return allow_foreign
        return self is not Compatibility.INCOMPATIBLE


@dataclass(frozen=True)
class LayoutFingerprint:
    """Everything a page's bytes depend on besides the tokens. Equal digests mean equal fields."""

    model_digest: str
    numerics: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str
    layout_id: str

    @cached_property
    def digest(self) -> bytes:
        """16 bytes of keyed BLAKE2b over all fields, each with its length in front."""
        values = [str(getattr(self, field.name)) for field in fields(self)]
        return _digest(values, b"quire layout fingerprint")

    @cached_property
    def numerics_digest(self) -> bytes:
        """16 bytes over what tokens depend on, where they lie left out: workers of equal ones
        continue each other's streams."""
        return _digest([self.model_digest, self.numerics, self.kv_dtype], b"quire numerics")

    def compatibility(self, other: LayoutFingerprint) -> Compatibility:
        """What pages of one are to a worker of the other; the same in both directions."""
        differing = self._differing(other)
        if not differing:
            return Compatibility.EQUAL
        if differing <= _ORDER:
            return Compatibility.CONVERTIBLE
        if differing <= _ORDER | _NUMBERS:
            return Compatibility.FOREIGN
        return Compatibility.INCOMPATIBLE

    def differences(self, other: LayoutFingerprint) -> str:
        """The two digests and the fields that differ, in words; empty if none does."""
        differing = self._differing(other)
        each = [
            f"{field.name}: {getattr(self, field.name)} here, {getattr(other, field.name)} there"
            for field in fields(self)
            if field.name in differing
        ]
        digests = f"{self.digest.hex()} here, {other.digest.hex()} there"
        return "; ".join([digests, *each]) if each else ""

    def holding(self, foreign: LayoutFingerprint) -> LayoutFingerprint:
        """What pages of this layout stand under while they hold numbers of ``foreign``: neither
        this fingerprint nor the other, so they meet the pages of neither."""
        return replace(self, numerics=f"{self.numerics} holding {foreign.numerics}")

    def _differing(self, other: LayoutFingerprint) -> set[str]:
        return {
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        }


def _digest(values: Iterable[str], key: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key)
    for value in values:
        data = value.encode()
        state.update(len(data).to_bytes(4, "little"))
        state.update(data)
    return state.digest()

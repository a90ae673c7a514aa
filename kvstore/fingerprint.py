"""Which pages two workers may exchange: those of equal layout fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property

DIGEST_BYTES = 16


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
        state = hashlib.blake2b(digest_size=DIGEST_BYTES, key=b"quire layout fingerprint")
        for field in fields(self):
            value = str(getattr(self, field.name)).encode()
            state.update(len(value).to_bytes(4, "little"))
            state.update(value)
        return state.digest()

    def differences(self, other: LayoutFingerprint) -> str:
        """The fields that differ, in words; empty if none does."""
        return "; ".join(
            f"{field.name}: {getattr(self, field.name)} here, {getattr(other, field.name)} there"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )

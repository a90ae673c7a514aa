"""Chain hashes: a page's name is a hash of all tokens up to its end.

``hash_i = BLAKE2b-128(key, parent = hash_{i-1}, count, token ids as 4-byte little-endian words)``;
the key is derived from the tenant's salt and the layout fingerprint, so pages of two tenants or two
layouts never meet under one name. The count tells a partial page from a full one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

HASH_BYTES = 16
ROOT = bytes(HASH_BYTES)


class PrefixHasher:
    """Chain hashes for one (tenant, layout fingerprint). Safe to share between threads."""

    def __init__(self, tenant: str, fingerprint: bytes, page_size: int) -> None:
        salt = hashlib.blake2b(tenant.encode(), digest_size=16, key=b"quire tenant salt").digest()
        self._tenant = tenant
        self._key = salt + fingerprint
        self.page_size = page_size

    def under(self, fingerprint: bytes) -> PrefixHasher:
        """The hasher of the same tenant and page size under another layout fingerprint."""
        return PrefixHasher(self._tenant, fingerprint, self.page_size)

    def extend(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """The name of the page that follows ``parent`` and holds ``tokens`` (1 to page_size)."""
        assert 1 <= len(tokens) <= self.page_size
        state = hashlib.blake2b(parent, digest_size=HASH_BYTES, key=self._key)
        state.update(len(tokens).to_bytes(4, "little"))
        state.update(array("I", tokens).tobytes())
        return state.digest()

    def full_pages(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """Names of all full pages of ``tokens``; ``known`` are the first of them already."""
        names = list(known)
        for index in range(len(names), len(tokens) // self.page_size):
            start = index * self.page_size
            parent = names[-1] if names else ROOT
            names.append(self.extend(parent, tokens[start : start + self.page_size]))
        return names

    def all_pages(self, tokens: Sequence[int]) -> list[bytes]:
        """Names of all pages of ``tokens``, the last of which may be partial."""
        names = self.full_pages(tokens)
        rest = tokens[len(names) * self.page_size :]
        if rest:
            names.append(self.extend(names[-1] if names else ROOT, rest))
        return names

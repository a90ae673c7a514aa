"""References to pages, frames of their bytes, and the digests that tie both together (law 4).

A digest covers the payload *and* the identity it was sent under, so a perfectly valid page of
another prompt does not pass. Digests are xxh3-128: they guard against bugs and broken hardware;
peers are authenticated by other means.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

BOOT_ID_BYTES = 16
DIGEST_BYTES = 16

Payload = bytes | memoryview


@dataclass(frozen=True, slots=True)
class PageReference:
    """Names the content of one page of one worker's pool."""

    boot_id: bytes
    slot: int
    generation: int
    prefix_hash: bytes
    fingerprint: bytes
    kv_group: int = 0


@dataclass(frozen=True, slots=True)
class PageIdentity:
    """What a page stands for: everything that must agree before its bytes are used."""

    reference: PageReference
    page_index: int
    num_tokens: int

    def packed(self, layer_group: int, num_layer_groups: int) -> bytes:
        ref = self.reference
        return struct.pack(
            "<16sIQ16s16sIIIII",
            ref.boot_id,
            ref.slot,
            ref.generation,
            ref.prefix_hash,
            ref.fingerprint,
            ref.kv_group,
            self.page_index,
            self.num_tokens,
            layer_group,
            num_layer_groups,
        )


@dataclass(frozen=True, slots=True)
class PageFrame:
    """One layer group of one page, announced with its digest.

    ``payload`` is in the layout's byte order; None where the receiver reads it out of the pool.
    """

    identity: PageIdentity
    layer_group: int
    num_layer_groups: int
    payload: Payload | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """Ends a handover: how much it was, and a digest over everything sent.

    ``since_computed_s`` is how long before this the prompt's computation ended, at the owner.
    """

    num_pages: int
    num_tokens: int
    pages_digest: bytes
    prompt_hash: bytes
    since_computed_s: float = 0.0


def group_digest(
    identity: PageIdentity, layer_group: int, num_layer_groups: int, payload: Payload
) -> bytes:
    """xxh3-128 over identity and payload, 16 bytes."""
    state = xxhash.xxh3_128(identity.packed(layer_group, num_layer_groups))
    state.update(payload)
    return state.digest()


def digest_of(digests: Iterable[bytes]) -> bytes:
    """xxh3-128 over digests in order, 16 bytes."""
    state = xxhash.xxh3_128()
    for digest in digests:
        state.update(digest)
    return state.digest()

"""The values a page index speaks in. Each checks itself, so what was read can be believed in form.

ValueError names the field. This module imports neither redis nor torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal, get_args

from kvstore.fingerprint import LayoutFingerprint
from kvstore.prefix_hash import HASH_BYTES

WorkerRole = Literal["prefill", "decode"]
WorkerState = Literal["serving", "draining"]

MAX_MODEL_CHARS = 256
MAX_COUNT = 2**53 - 1  # what JSON and Lua keep exactly
MAX_ATTEMPT = 2**32 - 1  # uint32 in the protocol

_LAYOUT_COUNTS = frozenset({"num_layers", "num_kv_heads", "head_dim", "page_size"})
_HEX128 = re.compile(r"[0-9a-f]{32}")
# A host name, IPv4 or bracketed IPv6 address and a port: no scheme a gRPC resolver would follow.
_ENDPOINT = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9a-fA-F:.]{2,45}\]):[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker has to do and room for, as it last said; counts of sequences, tokens, pages."""

    running: int
    waiting: int
    queued_tokens: int
    free_pages: int
    total_pages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            check_count(field.name, getattr(self, field.name), 0, MAX_COUNT)


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker as it presents itself. ``boot_id`` is new at every start of its process.

    ``layout`` has the fields of ``fingerprint``; without it only equal pages can be recognized.
    """

    boot_id: str
    role: WorkerRole
    endpoint: str
    fingerprint: str
    model: str
    load: WorkerLoad
    state: WorkerState
    layout: LayoutFingerprint | None = None

    def __post_init__(self) -> None:
        check_hex128("boot_id", self.boot_id)
        check_hex128("fingerprint", self.fingerprint)
        _check_choice("role", self.role, get_args(WorkerRole))
        _check_choice("state", self.state, get_args(WorkerState))
        if not isinstance(self.endpoint, str) or not _ENDPOINT.fullmatch(self.endpoint):
            raise ValueError("endpoint must be host:port")
        if not isinstance(self.model, str) or len(self.model) > MAX_MODEL_CHARS:
            raise ValueError(f"model must be text of at most {MAX_MODEL_CHARS} characters")
        if not isinstance(self.load, WorkerLoad):
            raise ValueError("load must be a WorkerLoad")
        if self.layout is not None:
            _check_layout(self.layout, self.fingerprint)


class HandoverState(StrEnum):
    """OFFERED until it ends; the others are final for their attempt."""

    OFFERED = "offered"
    LANDED = "landed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class HandoverRecord:
    """One attempt to move a request's pages; ``remaining_s`` is what is left of its deadline."""

    request_id: str
    attempt: int
    state: HandoverState
    prefill_boot_id: str
    decode_boot_id: str
    num_pages: int
    remaining_s: float

    def __post_init__(self) -> None:
        check_hex128("request_id", self.request_id)
        check_hex128("prefill_boot_id", self.prefill_boot_id)
        check_hex128("decode_boot_id", self.decode_boot_id)
        check_count("attempt", self.attempt, 1, MAX_ATTEMPT)
        check_count("num_pages", self.num_pages, 0, MAX_COUNT)
        if not math.isfinite(self.remaining_s) or self.remaining_s < 0:
            raise ValueError("remaining_s must be 0 or more seconds")


@dataclass(frozen=True, slots=True)
class PageEntry:
    """What the index says of one page: the boot identities of those who hold it."""

    fingerprint: str
    prefix_hash: bytes
    holders: frozenset[str]


def check_hex128(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` is 16 bytes in lower-case hex."""
    if not isinstance(value, str) or not _HEX128.fullmatch(value):
        raise ValueError(f"{name} must be 32 lower-case hex digits")


def check_count(name: str, value: object, lowest: int, highest: int) -> None:
    """Raises ValueError unless ``value`` is an integer from ``lowest`` to ``highest``."""
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{name} must be an integer from {lowest} to {highest}")


def check_ttl(ttl_s: float) -> None:
    """Raises ValueError unless the time to live is a positive number of seconds."""
    if not math.isfinite(ttl_s) or ttl_s <= 0:
        raise ValueError("ttl_s must be more than 0 seconds")


def check_pages(fingerprint: str, prefix_hashes: Sequence[bytes]) -> None:
    """Raises ValueError unless these can name pages."""
    check_hex128("fingerprint", fingerprint)
    if not all(isinstance(each, bytes) and len(each) == HASH_BYTES for each in prefix_hashes):
        raise ValueError(f"prefix_hashes must have {HASH_BYTES} bytes each")


def check_offer(record: HandoverRecord) -> None:
    """Raises ValueError unless the record can open an attempt."""
    if record.state is not HandoverState.OFFERED:
        raise ValueError(f"state of an offer must be {HandoverState.OFFERED}")


def check_end(to_state: HandoverState) -> None:
    """Raises ValueError unless an attempt can end in this state."""
    if to_state is HandoverState.OFFERED:
        raise ValueError("to_state must be final; offer a new attempt instead")


def _check_layout(layout: LayoutFingerprint, fingerprint: str) -> None:
    """Types too: the digest cannot tell the number 1 from the text "1"."""
    for field in fields(layout):
        value = getattr(layout, field.name)
        if field.name in _LAYOUT_COUNTS:
            check_count(f"layout.{field.name}", value, 1, MAX_COUNT)
        elif not isinstance(value, str):
            raise ValueError(f"layout.{field.name} must be text")
    if layout.digest.hex() != fingerprint:
        raise ValueError("layout must be that of the fingerprint")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}")

"""How records are written to Redis, and how replies are read, whose form nobody vouches for.

Each ``..._from_reply`` raises one of ``MALFORMED`` if the reply as a whole has another form. Fields
this version does not know are ignored, so that a newer one may add some.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from kvstore.fingerprint import LayoutFingerprint
from kvstore.index.records import (
    HandoverRecord,
    HandoverState,
    WorkerLoad,
    WorkerRecord,
    check_hex128,
)

MAX_WORKER_BYTES = 4096
MAX_FIELD_BYTES = 64
# What reading a value of another form than expected raises.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def worker_to_json(record: WorkerRecord) -> bytes:
    """Everything but ``boot_id`` and ``endpoint``, which the scripts compare and so stand apart."""
    body = asdict(record)
    del body["boot_id"], body["endpoint"]
    return json.dumps(body, separators=(",", ":")).encode()


def change_from_reply(reply: Any) -> bool:
    """Whether a script made the change it was asked for, now or before."""
    if reply not in (0, 1):
        raise ValueError("neither 0 nor 1")
    return bool(reply)


def workers_from_reply(reply: Any) -> tuple[list[WorkerRecord], int]:
    """The well-formed workers, and the number of others."""
    num_malformed = int(reply[0])
    values = iter(reply[1:])
    read = [_worker(*three) for three in zip(values, values, values, strict=True)]
    workers = [record for record in read if record]
    return workers, num_malformed + len(read) - len(workers)


def holders_from_reply(reply: Any) -> tuple[list[frozenset[str]], int]:
    """Holders of each page up to the first without a well-formed one, and the number of others."""
    found = []
    num_malformed = 0
    for values in reply:
        holders = frozenset(boot_id for boot_id in map(_boot_id, values) if boot_id)
        num_malformed += len(values) - len(holders)
        if not holders:
            break
        found.append(holders)
    return found, num_malformed


def handover_from_reply(request_id: str, reply: Any) -> HandoverRecord | None:
    """None if the reply is empty."""
    if reply == []:
        return None
    attempt, state, prefill, decode, num_pages, remaining_ms = (value.decode() for value in reply)
    return HandoverRecord(
        request_id=request_id,
        attempt=int(attempt),
        state=HandoverState(state),
        prefill_boot_id=prefill,
        decode_boot_id=decode,
        num_pages=int(num_pages),
        remaining_s=int(remaining_ms) / 1000,
    )


def _worker(boot_id: bytes, endpoint: bytes, body: bytes) -> WorkerRecord | None:
    try:
        raw = json.loads(body)
        load = {field.name: raw["load"][field.name] for field in fields(WorkerLoad)}
        layout = raw.get("layout")
        return WorkerRecord(
            boot_id=boot_id.decode(),
            role=raw["role"],
            endpoint=endpoint.decode(),
            fingerprint=raw["fingerprint"],
            model=raw["model"],
            load=WorkerLoad(**load),
            state=raw["state"],
            layout=_layout(layout) if layout else None,
        )
    except MALFORMED:
        return None


def _layout(raw: Any) -> LayoutFingerprint:
    return LayoutFingerprint(**{field.name: raw[field.name] for field in fields(LayoutFingerprint)})


def _boot_id(value: bytes) -> str | None:
    try:
        check_hex128("boot_id", boot_id := value.decode())
    except MALFORMED:
        return None
    return boot_id

"""What no single worker can see of its pages: that the other end has forgotten them, or that the
index names pages which nobody keeps.

Takes what ``quire pages`` was told by each worker. Where one did not answer, nothing is lost yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.index import PageEntry

Worker = dict[str, Any]
Finding = tuple[str, str, str]
"""Boot identity of a worker, which of its pages, and what is wrong with it."""

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")


def orphans(workers: Sequence[Worker]) -> set[Finding]:
    """Pages that are held for somebody nobody knows any more."""
    own = {
        (worker["boot_id"], _place(page), page["orphan"])
        for worker in _answered(workers)
        for page in worker["pages"]
        if page["orphan"]
    }
    return own | _forgotten_leases(workers)


def stale_entries(entries: Iterable[PageEntry], workers: Sequence[Worker]) -> set[Finding]:
    """Entries of the index for pages that their holder does not keep, or whose holder is gone."""
    kept = {
        worker["boot_id"]: {page["prefix_hash"] for page in worker["pages"] if page["cached"]}
        for worker in _answered(workers)
    }
    all_answered = len(kept) == len(workers)
    found: set[Finding] = set()
    for entry in entries:
        name = entry.prefix_hash.hex()
        for holder in entry.holders:
            if holder in kept and name not in kept[holder]:
                found.add((holder, f"page {name}", "in the index, but its holder does not keep it"))
            elif holder not in kept and all_answered:
                found.add((holder, f"page {name}", "in the index, but its holder is gone"))
    return found


def _answered(workers: Sequence[Worker]) -> list[Worker]:
    return [worker for worker in workers if "error" not in worker]


def _place(page: dict[str, Any]) -> str:
    return f"slot {page['slot']} generation {page['generation']}"


def _forgotten_leases(workers: Sequence[Worker]) -> set[Finding]:
    """Leases of requests that no decode service knows: they end by themselves, when time is up."""
    decode = [worker for worker in _answered(workers) if worker["role"] == "decode"]
    if not decode or len(_answered(workers)) < len(workers):
        return set()
    asking = {
        request
        for worker in decode
        for name in worker["callers"]
        for request in _REQUEST_ID.findall(name)
    }
    return {
        (worker["boot_id"], _place(page), f"leased to {name}, a request no decode service knows")
        for worker in _answered(workers)
        for page in worker["pages"]
        for name in page["lease_holders"]
        if not asking & set(_REQUEST_ID.findall(name))
    }

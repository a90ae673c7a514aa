"""Which prefill worker gets a prompt, and whose cached pages are read.

Pure choices among the workers last known. Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from decode_svc.reader import Reader
from kvstore.fingerprint import Compatibility
from kvstore.index import WorkerRecord

SEQUENCE_TOKENS = 32
"""What a sequence at a worker counts, in prompt tokens: it takes rows of the same steps."""


def choose_prefill(
    workers: Iterable[WorkerRecord],
    reader: Reader,
    avoid: Collection[str],
    hit_tokens: Mapping[str, int] | None = None,
) -> WorkerRecord | None:
    """The serving worker whose pages ``reader`` reads that will be done first, or None.

    One of foreign numbers is chosen only where there is no other.
    What a worker has to do is counted in prompt tokens: those queued there and its sequences, less
    the tokens of this prompt that it need not compute (``hit_tokens`` by boot identity). Ties go to
    the lower boot identity. ``avoid`` are boot identities that failed lately.
    """
    hits = hit_tokens or {}

    def cost(worker: WorkerRecord) -> tuple[bool, int, str]:
        foreign = reader.compatibility(worker) is Compatibility.FOREIGN
        return foreign, busy_tokens(worker) - hits.get(worker.boot_id, 0), worker.boot_id

    fit = [
        each
        for each in workers
        if each.role == "prefill" and _serves(each, avoid) and reader.reads(each)
    ]
    return min(fit, key=cost, default=None)


def choose_holder(
    workers: Iterable[WorkerRecord],
    reader: Reader,
    avoid: Collection[str],
    held_pages: Mapping[str, int],
) -> WorkerRecord | None:
    """The serving worker of any role that holds most of the pages, the less busy one of equals.

    Cached pages are read as they are, so of equal fingerprint only.

    ``held_pages`` counts, by boot identity, the pages from the first wanted one on.
    """

    def rank(worker: WorkerRecord) -> tuple[int, int, str]:
        return -held_pages[worker.boot_id], busy_tokens(worker), worker.boot_id

    fit = [
        worker
        for worker in workers
        if held_pages.get(worker.boot_id)
        and _serves(worker, avoid)
        and reader.compatibility(worker) is Compatibility.EQUAL
    ]
    return min(fit, key=rank, default=None)


def held_runs(holders: Sequence[Collection[str]]) -> dict[str, int]:
    """How many pages each worker holds without a gap, given the holders of consecutive pages."""
    runs: dict[str, int] = {}
    for position, present in enumerate(holders):
        for boot_id in present:
            if runs.get(boot_id, 0) == position:
                runs[boot_id] = position + 1
    return runs


def busy_tokens(worker: WorkerRecord) -> int:
    """What the worker has to do, in prompt tokens."""
    load = worker.load
    return load.queued_tokens + SEQUENCE_TOKENS * (load.running + load.waiting)


def _serves(worker: WorkerRecord, avoid: Collection[str]) -> bool:
    return worker.state == "serving" and worker.boot_id not in avoid

"""Which prefill worker gets a prompt: a pure choice among the workers last known."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from decode_svc.reader import Reader
from kvstore.fingerprint import Compatibility
from kvstore.index import WorkerRecord


def choose_prefill(
    workers: Iterable[WorkerRecord], reader: Reader, avoid: Collection[str]
) -> WorkerRecord | None:
    """The least loaded serving worker whose pages ``reader`` reads, or None.

    One of foreign numbers only where there is no other. Load is the prompt tokens it has queued,
    then its sequences; ties go to the lower boot identity. ``avoid`` are boot identities that
    failed lately.
    """
    fit = [
        worker
        for worker in workers
        if worker.role == "prefill"
        and worker.state == "serving"
        and worker.boot_id not in avoid
        and reader.reads(worker)
    ]
    return min(fit, key=lambda worker: (_is_foreign(worker, reader), *_load(worker)), default=None)


def _is_foreign(worker: WorkerRecord, reader: Reader) -> bool:
    return reader.compatibility(worker) is Compatibility.FOREIGN


def _load(worker: WorkerRecord) -> tuple[int, int, str]:
    load = worker.load
    return load.queued_tokens, load.running + load.waiting, worker.boot_id

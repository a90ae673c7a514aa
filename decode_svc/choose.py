"""Which prefill worker gets a prompt: a pure choice among the workers last known."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvstore.index import WorkerRecord


def choose_prefill(
    workers: Iterable[WorkerRecord], fingerprint: str, avoid: Collection[str]
) -> WorkerRecord | None:
    """The least loaded serving worker of equal fingerprint, or None.

    Load is the prompt tokens it has queued, then its sequences; ties go to the lower boot identity.
    ``avoid`` are boot identities that failed lately.
    """
    fit = [
        worker
        for worker in workers
        if worker.role == "prefill"
        and worker.state == "serving"
        and worker.fingerprint == fingerprint
        and worker.boot_id not in avoid
    ]
    return min(fit, key=_load, default=None)


def _load(worker: WorkerRecord) -> tuple[int, int, str]:
    load = worker.load
    return load.queued_tokens, load.running + load.waiting, worker.boot_id

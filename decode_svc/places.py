"""Where a worker's pages go in this service's pool: as they are, or converted on the way in."""

from __future__ import annotations

from collections.abc import Sequence

from decode_svc.reader import Reader
from kvstore.converting_landing import ConvertingLanding
from kvstore.index import WorkerRecord
from kvstore.landing import Landing
from kvstore.memory import PageMemory
from kvstore.prefix_hash import PrefixHasher


def landing_of(
    reader: Reader,
    worker: WorkerRecord,
    memory: PageMemory,
    tenant: str,
    prompt_ids: Sequence[int],
    first_page: int,
    slots: Sequence[int],
) -> Landing | ConvertingLanding:
    """A landing for pages of ``worker``, which ``reader`` reads, into ``slots``.

    Raises LandingError if its pages are of a layout unknown here.
    """
    source, owner = reader.source(worker), bytes.fromhex(worker.boot_id)
    if source != reader.fingerprint:
        return ConvertingLanding(memory, source, tenant, prompt_ids, first_page, slots, owner)
    return Landing(
        memory=memory,
        hasher=PrefixHasher(tenant, source.digest, source.page_size),
        prompt_ids=prompt_ids,
        first_page=first_page,
        slots=slots,
        fingerprint=source.digest,
        owner=owner,
    )


def conversion_facts(landing: Landing | ConvertingLanding) -> dict[str, str | float]:
    """What the trace tells of pages that were converted: their size and order, and for numbers of
    another KV dtype how far rounding moved them."""
    if isinstance(landing, Landing):
        return {}
    told: dict[str, str | float] = {
        "quire.source_page_size": landing.layout.page_size,
        "quire.source_layout": landing.layout.layout_id,
        "quire.source_kv_dtype": landing.layout.kv_dtype,
    }
    rounding = landing.rounding
    if rounding.num_elements:
        told |= {"quire.kv_error_max": rounding.largest, "quire.kv_error_mean": rounding.mean}
    return told

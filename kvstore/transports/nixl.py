"""``nixl``: the receiver reads the owner's pool through NIXL (UCX: shared memory, TCP, RDMA)."""

from __future__ import annotations

from kvstore.memory import PageMemory
from kvstore.transports import Transport, TransportUnavailable


def load() -> None:
    raise TransportUnavailable("nixl: not there yet")


async def start(memory: PageMemory, boot_id: bytes) -> Transport:
    raise TransportUnavailable("nixl: not there yet")

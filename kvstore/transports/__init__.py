"""How pages travel from one worker's pool into another's.

The owner announces frames (``kvstore.page.PageFrame``) in messages; the receiver brings their bytes
into its own memory through a ``PageSource`` and checks them there (``kvstore.landing``). Which
transport it is, is settled once per handover by what both offer (``kvstore.transports.choice``):

- ``grpc``: the bytes come with the announcement;
- ``shm``: the receiver copies them out of the owner's pool, which is mapped here (one host);
- ``nixl``: the receiver reads the owner's pool through NIXL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kernels.layout import PageLayout
from kvstore.landing import LandingError, LandingPlace
from kvstore.page import PageFrame

DEFAULT = "grpc"


class TransportUnavailable(Exception):
    """A transport that was asked for by name cannot be used here; the message says why."""


@dataclass(frozen=True, slots=True)
class TransportAddress:
    """A transport and, opaque to all but it, a place.

    From a receiver the place says from where it can read; from an owner, where its pages are.
    """

    name: str
    address: bytes = b""


class PageSource(Protocol):
    """Reads one owner's pages."""

    @property
    def lost(self) -> bool:
        """Whether nothing can be read any more: the owner is gone."""
        ...

    async def read(self, frames: Sequence[PageFrame], targets: Sequence[memoryview]) -> None:
        """Brings each frame's bytes into its target.

        Nobody writes to a target after this has ended, also if it was cancelled. Raises
        LandingError: ``generation`` if a page moved on while it was read, ``size`` or ``slot`` if
        there are no such bytes, ``transport`` if the owner cannot be read any more.
        """
        ...

    def close(self) -> None:
        """Idempotent; reads fail from now on."""
        ...


class Transport(Protocol):
    """One way of a worker to give pages away, and to read those of others."""

    @property
    def name(self) -> str: ...

    @property
    def carries_payload(self) -> bool:
        """Whether announcements must contain the bytes."""
        ...

    @property
    def reach(self) -> bytes:
        """From where this worker can read, for owners to see."""
        ...

    @property
    def address(self) -> bytes:
        """Where this worker's own pages are, for receivers."""
        ...

    def reached_from(self, reach: bytes) -> bool:
        """Whether a receiver of this reach can read this worker's pages."""
        ...

    async def connect(self, address: bytes, owner: bytes, layout: PageLayout) -> PageSource:
        """A way to the pages of ``owner``, a boot identity. Raises TransportUnavailable."""
        ...

    async def close(self) -> None: ...


async def receive(frames: Sequence[PageFrame], landing: LandingPlace, source: PageSource) -> int:
    """Takes in frames that were announced together; returns their bytes. Raises LandingError."""
    targets = [landing.claim(frame) for frame in frames]
    await source.read(frames, targets)
    for frame in frames:
        landing.verify(frame)
    return sum(len(target) for target in targets)


class StreamTransport:
    """``grpc``: every announcement contains the bytes."""

    name = "grpc"
    carries_payload = True
    reach = b""
    address = b""

    def reached_from(self, reach: bytes) -> bool:
        return True

    async def connect(self, address: bytes, owner: bytes, layout: PageLayout) -> PageSource:
        return _PayloadSource()

    async def close(self) -> None:
        """Nothing is open."""


class _PayloadSource:
    lost = False

    async def read(self, frames: Sequence[PageFrame], targets: Sequence[memoryview]) -> None:
        for frame, target in zip(frames, targets, strict=True):
            size = 0 if frame.payload is None else len(frame.payload)
            if size != len(target):
                raise LandingError("size", f"payload has {size} bytes, not {len(target)}")
            assert frame.payload is not None
            target[:] = frame.payload

    def close(self) -> None:
        """Nothing is open."""

"""Whose pages this service can take in, as far as a worker's record tells."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.fingerprint import Compatibility, LayoutFingerprint
from kvstore.index import WorkerRecord


@dataclass(frozen=True, slots=True)
class Reader:
    """A receiver: the fingerprint of its own pages, and whether it takes foreign numbers in."""

    fingerprint: LayoutFingerprint
    allow_foreign: bool = False

    def compatibility(self, worker: WorkerRecord) -> Compatibility:
        """What the worker's pages are to this receiver."""
        if worker.fingerprint == self.fingerprint.digest.hex():
            return Compatibility.EQUAL
        if worker.layout is None:
            return Compatibility.INCOMPATIBLE
        return self.fingerprint.compatibility(worker.layout)

    def reads(self, worker: WorkerRecord) -> bool:
        return self.compatibility(worker).readable(allow_foreign=self.allow_foreign)

    def source(self, worker: WorkerRecord) -> LayoutFingerprint:
        """The fingerprint that the worker's pages must have. Only of a worker it reads."""
        return worker.layout or self.fingerprint

    def foreign(self, worker: WorkerRecord) -> bytes:
        """The digest under which the worker's pages stand here if they are of foreign numbers,
        empty if they are as our own."""
        if self.compatibility(worker) is not Compatibility.FOREIGN:
            return b""
        return self.fingerprint.holding(self.source(worker)).digest

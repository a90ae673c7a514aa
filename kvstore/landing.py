"""The receiving end of a handover: pages are copied in, then believed only if everything agrees.

The receiver is the only writer of its memory. Each frame names what it claims to be; it is compared
with what this receiver asked for (the chain hash of its own tokens, the fingerprint, the owner that
accepted the request, order and counts), copied into the reserved slot, and digested *there*, after
the copy. The commit must agree with the sum of it all.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.memory import PageMemory
from kvstore.page import Commit, PageFrame, PageIdentity, digest_of, group_digest
from kvstore.prefix_hash import PrefixHasher


class LandingError(Exception):
    """A frame or commit is not what was asked for; ``reason`` is a short fixed word for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Landing:
    """Takes in the pages of prompt tokens ``[0, num_tokens)`` from page ``first_page`` on.

    ``slots`` are the reserved slots for pages ``first_page, first_page + 1, ...`` in order.
    """

    def __init__(
        self,
        memory: PageMemory,
        hasher: PrefixHasher,
        prompt_ids: Sequence[int],
        first_page: int,
        slots: Sequence[int],
        fingerprint: bytes,
        owner: bytes,
    ) -> None:
        self._memory = memory
        self._first_page = first_page
        self._slots = slots
        self._fingerprint = fingerprint
        self._owner = owner
        self._tokens = prompt_ids[: len(prompt_ids) - 1]
        self._page_size = hasher.page_size
        self._names = hasher.full_pages(self._tokens)
        if len(self._tokens) % self._page_size:
            self._names.append(hasher.prompt(self._tokens))
        self._group_digests: list[bytes] = []
        self._seal_digests: list[bytes] = []
        self._identity: PageIdentity | None = None

    @property
    def num_landed_pages(self) -> int:
        """Pages from ``first_page`` on that are here in full and verified."""
        return len(self._seal_digests)

    def take(self, frame: PageFrame) -> int:
        """Copies a frame in and verifies it; returns its bytes. Raises LandingError."""
        self._check_claim(frame)
        slot = self._slots[self.num_landed_pages]
        target = self._memory.group(slot, frame.layer_group)
        if len(frame.payload) != len(target):
            raise LandingError("size", f"payload has {len(frame.payload)} bytes, not {len(target)}")
        target[:] = frame.payload
        found = group_digest(frame.identity, frame.layer_group, frame.num_layer_groups, target)
        if found != frame.digest:
            raise LandingError("digest", "payload does not match its digest")
        self._identity = frame.identity
        self._group_digests.append(found)
        if len(self._group_digests) == self._memory.num_layer_groups:
            self._seal_digests.append(digest_of(self._group_digests))
            self._group_digests.clear()
        return len(target)

    def finish(self, commit: Commit) -> None:
        """Compares the commit with what arrived. Raises LandingError."""
        if self.num_landed_pages != len(self._slots) or self._group_digests:
            raise LandingError("incomplete", "commit before the last page")
        if commit.num_tokens != len(self._tokens) or commit.num_pages != len(self._names):
            raise LandingError("commit", "commit counts other pages or tokens than asked for")
        if self._names and commit.prompt_hash != self._names[-1]:
            raise LandingError("commit", "commit is for another prompt")
        if commit.pages_digest != digest_of(self._seal_digests):
            raise LandingError("commit", "commit does not match the pages that arrived")

    def _check_claim(self, frame: PageFrame) -> None:
        reference = frame.identity.reference
        landed = self.num_landed_pages
        if landed >= len(self._slots):
            raise LandingError("order", "more pages than were asked for")
        index = self._first_page + landed
        group = len(self._group_digests)
        num_tokens = min(self._page_size, len(self._tokens) - index * self._page_size)
        if frame.identity.page_index != index or frame.layer_group != group:
            raise LandingError("order", "page or layer group out of order")
        if frame.num_layer_groups != self._memory.num_layer_groups:
            raise LandingError("layout", "page is split into another number of layer groups")
        if frame.identity.num_tokens != num_tokens:
            raise LandingError("hash", "page holds another number of tokens")
        if reference.boot_id != self._owner:
            raise LandingError("boot_id", "page belongs to another boot identity")
        if reference.fingerprint != self._fingerprint or reference.kv_group != 0:
            raise LandingError("fingerprint", "page has another layout fingerprint")
        if reference.prefix_hash != self._names[index]:
            raise LandingError("hash", "page stands for other tokens")
        if group and frame.identity != self._identity:
            raise LandingError("generation", "layer groups of one page differ in reference")

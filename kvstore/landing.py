"""The receiving end of a handover: pages are copied in, then believed only if everything agrees.

The receiver is the only writer of its memory. Each frame names what it claims to be; it is compared
with what this receiver asked for (the chain hash of its own tokens, the fingerprint, the owner that
accepted the request, counts), copied into the reserved slot by whatever transport, and digested
*there*, after the copy. Frames may come in any order, each once. The commit must agree with the sum
of it all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kernels.layout import PageLayout
from kvstore.memory import PageMemory
from kvstore.page import Commit, PageFrame, PageReference, Payload, digest_of, group_digest
from kvstore.prefix_hash import PrefixHasher


class LandingError(Exception):
    """A frame or commit is not what was asked for; ``reason`` is a short fixed word for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class LandingPlace(Protocol):
    """Where frames go, whatever brings them: ``claim``, copy, ``verify`` for each, then ``finish``.

    ``layout`` is the owner's; the first of its pages that is wanted is ``first_source_page``.
    ``kvstore.transports.receive`` does the first three. All raise LandingError.
    """

    @property
    def layout(self) -> PageLayout: ...

    @property
    def first_source_page(self) -> int: ...

    @property
    def num_landed_pages(self) -> int:
        """Pages that are here in full and verified."""
        ...

    def claim(self, frame: PageFrame) -> memoryview:
        """Where the frame's bytes must go, if it is one that was asked for; for once."""
        ...

    def verify(self, frame: PageFrame) -> None:
        """Digests what is now where the frame was to go."""
        ...

    def finish(self, commit: Commit) -> None:
        """Compares the commit with what arrived."""
        ...

    def check_committed(self) -> None:
        """Passes only after a valid commit: before it, nothing that arrived may be used."""
        ...


class Landing:
    """Takes in the pages of prompt tokens ``[0, num_tokens)`` from page ``first_page`` on.

    ``slots`` are the reserved slots for pages ``first_page, first_page + 1, ...`` in order; the
    pages that come are of the same layout as this pool's.
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
        self.layout = memory.layout
        self.first_source_page = first_page
        self._memory = memory
        self._slots = slots
        self._tokens = prompt_ids[: len(prompt_ids) - 1]
        self._book = PageBook(
            names=hasher.all_pages(self._tokens),
            first_page=first_page,
            num_tokens=len(self._tokens),
            page_size=hasher.page_size,
            num_groups=memory.groups.count,
            fingerprint=fingerprint,
            owner=owner,
        )

    @property
    def num_landed_pages(self) -> int:
        return self._book.num_landed_pages

    def claim(self, frame: PageFrame) -> memoryview:
        place = self._book.claim(frame)
        return self._memory.group(self._slots[place], frame.layer_group)

    def verify(self, frame: PageFrame) -> None:
        place = self._book.place_of(frame)
        target = self._memory.group(self._slots[place], frame.layer_group)
        check_digest(frame, target)
        self._book.landed(frame)

    def finish(self, commit: Commit) -> None:
        self._book.finish(commit)

    def check_committed(self) -> None:
        self._book.check_committed()


def check_digest(frame: PageFrame, landed: Payload) -> None:
    """Digests what has landed of a frame. Raises LandingError."""
    found = group_digest(frame.identity, frame.layer_group, frame.num_layer_groups, landed)
    if found != frame.digest:
        raise LandingError("digest", "payload does not match its digest")


class PageBook:
    """What was asked of one owner, and what of it has come: claims and digests, but no bytes.

    ``names`` are those of all pages of the prompt, in the owner's page size; those from
    ``first_page`` on are wanted. Methods raise LandingError.
    """

    def __init__(
        self,
        names: Sequence[bytes],
        first_page: int,
        num_tokens: int,
        page_size: int,
        num_groups: int,
        fingerprint: bytes,
        owner: bytes,
    ) -> None:
        self._names = names
        self._first_page = first_page
        self._num_tokens = num_tokens
        self._page_size = page_size
        self._num_groups = num_groups
        self._fingerprint = fingerprint
        self._owner = owner
        num_wanted = len(names) - first_page
        self._references: list[PageReference | None] = [None] * num_wanted
        self._claimed: set[tuple[int, int]] = set()
        self._digests: list[dict[int, bytes]] = [{} for _ in range(num_wanted)]
        self._committed = False

    @property
    def num_landed_pages(self) -> int:
        return sum(len(digests) == self._num_groups for digests in self._digests)

    def place_of(self, frame: PageFrame) -> int:
        """Of the frame's page among those wanted."""
        return frame.identity.page_index - self._first_page

    def claim(self, frame: PageFrame) -> int:
        """Checks that the frame is one that was asked for and has not come; its place."""
        place, group = self.place_of(frame), frame.layer_group
        self._check_place(frame, place)
        self._check_reference(frame)
        known = self._references[place]
        if known is not None and known != frame.identity.reference:
            raise LandingError("generation", "layer groups of one page differ in reference")
        self._references[place] = frame.identity.reference
        self._claimed.add((place, group))
        return place

    def landed(self, frame: PageFrame) -> None:
        """The frame's bytes are where they belong, and its digest is theirs."""
        assert (self.place_of(frame), frame.layer_group) in self._claimed
        self._digests[self.place_of(frame)][frame.layer_group] = frame.digest

    def finish(self, commit: Commit) -> None:
        if self.num_landed_pages != len(self._digests):
            raise LandingError("incomplete", "commit before the last page")
        if commit.num_tokens != self._num_tokens or commit.num_pages != len(self._names):
            raise LandingError("commit", "commit counts other pages or tokens than asked for")
        if self._names and commit.prompt_hash != self._names[-1]:
            raise LandingError("commit", "commit is for another prompt")
        seals = [digest_of(digests[group] for group in range(self._num_groups))
                 for digests in self._digests]  # fmt: skip
        if commit.pages_digest != digest_of(seals):
            raise LandingError("commit", "commit does not match the pages that arrived")
        self._committed = True

    def check_committed(self) -> None:
        if not self._committed:
            raise LandingError("incomplete", "the stream ended without a commit")

    def _check_place(self, frame: PageFrame, place: int) -> None:
        if not 0 <= place < len(self._digests):
            raise LandingError("order", "a page that was not asked for")
        if frame.num_layer_groups != self._num_groups:
            raise LandingError("layout", "page is split into another number of layer groups")
        if frame.layer_group >= self._num_groups:
            raise LandingError("order", "a layer group that pages do not have")
        if (place, frame.layer_group) in self._claimed:
            raise LandingError("order", "a layer group of a page came twice")

    def _check_reference(self, frame: PageFrame) -> None:
        identity, reference = frame.identity, frame.identity.reference
        rest = self._num_tokens - identity.page_index * self._page_size
        if identity.num_tokens != min(self._page_size, rest):
            raise LandingError("hash", "page holds another number of tokens")
        if reference.boot_id != self._owner:
            raise LandingError("boot_id", "page belongs to another boot identity")
        if reference.fingerprint != self._fingerprint or reference.kv_group != 0:
            raise LandingError("fingerprint", "page has another layout fingerprint")
        if reference.prefix_hash != self._names[identity.page_index]:
            raise LandingError("hash", "page stands for other tokens")

"""A sequence: the tokens of one choice of one request, and the pages that hold them.

Imports neither torch, grpc nor redis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from kvstore.prefix_hash import ROOT, PrefixHasher


class Goal(StrEnum):
    """What a sequence is in the batch for."""

    PREFILL = "prefill"  # pages of all but the last prompt token
    GENERATE = "generate"  # output tokens


@dataclass(slots=True)
class Sequence:
    """``tokens`` are prompt and output; K and V of the first ``num_computed`` are in ``pages``.

    ``page_names`` are the chain hashes of the first full pages, as far as they are sealed.
    """

    name: str
    goal: Goal
    tokens: list[int]
    num_prompt: int
    hasher: PrefixHasher
    remote: bool = False
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_names: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def num_wanted(self) -> int:
        """Tokens whose K and V must be computed before the sequence has what it needs next."""
        return len(self.tokens) - (self.goal is Goal.PREFILL)

    @property
    def num_remaining(self) -> int:
        return self.num_wanted - self.num_computed

    @property
    def has_prompt(self) -> bool:
        """Whether all prompt tokens but the last are in pages."""
        return self.num_computed >= self.num_prompt - 1

    @property
    def last_name(self) -> bytes:
        return self.page_names[-1] if self.page_names else ROOT

    def take(self, num_rows: int, token_ids: tuple[int, ...]) -> None:
        """So many of its tokens were computed and brought new ones. All but the last of these were
        drafted, their K and V stand in pages too; that of other drafts is overwritten later."""
        self.num_computed += num_rows + max(len(token_ids) - 1, 0)
        self.tokens += token_ids

    def shareable_names(self) -> list[bytes]:
        """Names of the full pages another sequence may have computed: all before the last token."""
        return self.hasher.full_pages(self.tokens[: len(self.tokens) - 1])

    def coming_pages(self, num_computed: int) -> list[tuple[int, int, bytes]]:
        """(index, number of tokens, name) of the pages that are finished, but not yet sealed, once
        ``num_computed`` tokens are: full ones, and the last one with the last token."""
        size = self.hasher.page_size
        tokens = self.tokens[:num_computed]
        names = self.hasher.full_pages(tokens, self.page_names)
        pages = [(index, size, names[index]) for index in range(len(self.page_names), len(names))]
        rest = tokens[len(names) * size :]
        if rest and num_computed == self.num_wanted:
            parent = names[-1] if names else ROOT
            pages.append((len(names), len(rest), self.hasher.extend(parent, rest)))
        return pages

    def name_next_page(self) -> bytes:
        """Names the first unsealed page from its tokens and counts it as sealed."""
        start = len(self.page_names) * self.hasher.page_size
        end = min(start + self.hasher.page_size, self.num_computed)
        self.page_names.append(self.hasher.extend(self.last_name, self.tokens[start:end]))
        return self.page_names[-1]

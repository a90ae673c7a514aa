"""What each tenant was answered lately: text that may come again. No tenant's drafts, whose time
could be told, come from another's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.speculation.suffix_automaton import Reader, SuffixAutomaton

END = -1
"""Stands behind every output; no token."""
MOST_TENANTS = 16
# Of a tenant twice as many at most: of two texts the older one is dropped when the newer is full.
# A token takes less than 250 bytes.
MOST_TOKENS = 8192


class PastOutputs:
    """Forgets the tenant that was not heard of for longest. Used by one thread."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, list[SuffixAutomaton]] = OrderedDict()

    def readers(self, tenant: str) -> list[Reader]:
        return [Reader(text) for text in self._texts.get(tenant, ())]

    def add(self, tenant: str, tokens: Sequence[int]) -> None:
        texts = self._texts.setdefault(tenant, [SuffixAutomaton()])
        self._texts.move_to_end(tenant)
        if len(self._texts) > MOST_TENANTS:
            self._texts.popitem(last=False)
        if len(texts[-1].tokens) >= MOST_TOKENS:
            texts[:] = [texts[-1], SuffixAutomaton()]
        _append(texts[-1], tokens[:MOST_TOKENS])


def _append(text: SuffixAutomaton, tokens: Iterable[int]) -> None:
    for token in tokens:
        text.append(token)
    text.append(END)

"""What each tenant was answered lately: text that may come again. No tenant's drafts, whose time
could be told, come from another's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kernels.suffix_automaton import SuffixAutomaton, suffix_automaton

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

    def texts(self, tenant: str) -> list[SuffixAutomaton]:
        return [*self._texts.get(tenant, ())]

    def add(self, tenant: str, tokens: Sequence[int]) -> None:
        texts = self._texts.setdefault(tenant, [suffix_automaton()])
        self._texts.move_to_end(tenant)
        if len(self._texts) > MOST_TENANTS:
            self._texts.popitem(last=False)
        if len(texts[-1]) >= MOST_TOKENS:
            texts[:] = [texts[-1], suffix_automaton()]
        texts[-1].append([*tokens[:MOST_TOKENS], END])

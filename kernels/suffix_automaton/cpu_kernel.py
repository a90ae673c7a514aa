from __future__ import annotations

from kernels import _native
from kernels.suffix_automaton import SuffixAutomaton


def suffix_automaton() -> SuffixAutomaton:
    return _native.SuffixAutomaton()

"""Which proposers draft for an engine, by the mode that was asked for."""

from __future__ import annotations

from engine.modes import SPECULATION_MODES
from engine.speculation.draft_head import DraftHead
from engine.speculation.draft_model import DraftModel
from engine.speculation.lengths import StepTimes
from engine.speculation.pair import SpeculatorPair
from engine.speculation.past_outputs import PastOutputs
from engine.speculation.prompt_lookup import PromptLookup
from engine.speculation.speculator import Speculator


def open_speculator(
    kind: str, vocab_size: int, times: StepTimes, draft: DraftModel | DraftHead | None = None
) -> Speculator | SpeculatorPair:
    """Of a kind in SPECULATION_MODES but off; "model" and "head" take ``draft``, "auto" may. Raises
    ValueError."""
    if kind in ("lookup", "auto"):
        lookup = Speculator(PromptLookup(), vocab_size, times)
        if kind == "lookup" or draft is None:
            return lookup
        return SpeculatorPair(lookup, Speculator(draft, vocab_size, times))
    if kind == "history":
        return Speculator(PromptLookup(PastOutputs()), vocab_size, times)
    if draft is not None and kind == draft.name:
        return Speculator(draft, vocab_size, times)
    names = ", ".join(SPECULATION_MODES[1:])
    raise ValueError(f"speculate must be one of {names}, model and head with a draft: {kind!r}")

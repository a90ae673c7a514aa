"""Speculation: guesses at the next tokens, verified in the step that computes the next one.

The token function decides what comes; a guess only saves a pass where it was right (accept while
the drafted token is the one that the function gives at its position). So the stream is the same
with any proposer, none, or a changing one, and only its speed differs. ``proposer`` is what a
proposer must do; ``lengths`` decides how many drafts of each sequence are worth their rows.
"""

from engine.speculation.draft_head import DraftHead, HeadWeights, SequencePages
from engine.speculation.draft_model import DraftModel
from engine.speculation.lengths import StepTimes
from engine.speculation.loading import Drafter, load_drafter
from engine.speculation.measure import measure_attention, measure_steps
from engine.speculation.opening import open_speculator
from engine.speculation.pair import SpeculatorPair
from engine.speculation.speculator import SpeculationStats, Speculator

__all__ = [
    "DraftHead",
    "DraftModel",
    "Drafter",
    "HeadWeights",
    "SequencePages",
    "SpeculationStats",
    "Speculator",
    "SpeculatorPair",
    "StepTimes",
    "load_drafter",
    "measure_attention",
    "measure_steps",
    "open_speculator",
]

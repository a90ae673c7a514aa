"""Whether a proposer gains more than it costs, all told."""

from __future__ import annotations

# By how much a step moves what is known: little, or a few unlucky drafts would look like loss.
_STEP = 0.03
# What may be lost of a step's time to see at once when drafts begin to pay.
_LITTLE = 0.01
# Steps without a look at a proposer that loses more.
_REST = 31


class Balance:
    """Seconds that a proposer's drafts saved and took lately, a step: bookkeeping of each sequence
    included, which in a large batch is more than a few drafts gain. What loses rests, looks again
    after a while, and stays awake as long as it gains."""

    def __init__(self) -> None:
        self._net_s = 0.0
        self._step_s = 0.0
        self._resting = 0

    def add(self, seconds: float) -> None:
        """Saved by drafts of this step, or less than 0: taken."""
        self._step_s += seconds

    @property
    def rests_on(self) -> bool:
        """Whether the step after the one last asked about will do without drafts, too."""
        return self._resting > 1

    def rests(self, step_s: float) -> bool:
        """Whether to do without drafts in the next step, which takes so long; asked once a step."""
        if self._resting:
            self._resting -= 1
            if not self._resting:  # it looks, and has a little time to show what it gains
                self._net_s, self._step_s = -_LITTLE * step_s / 2, 0.0
            return self._resting > 0
        self._net_s += _STEP * (self._step_s - self._net_s)
        self._step_s = 0.0
        if self._net_s < -_LITTLE * step_s:
            self._resting = _REST
        return self._resting > 0

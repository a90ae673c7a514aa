"""How a model trained on a short context rotates positions of a longer one.

A scaling changes the speed, in radians per token, at which each pair of a head turns, and the
amplitude of the tables. Speeds are fp64, one per pair, fastest first: ``theta^(-2i / head_dim)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023, arXiv:2306.15595): all pairs turn slower."""

    factor: float
    amplitude: ClassVar[float] = 1.0

    def speeds(self, speeds: torch.Tensor, theta: float) -> torch.Tensor:
        return speeds / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's rule (Grattafiori et al., 2024, arXiv:2407.21783, and its published model code).

    A pair that turns at least ``high_freq_factor`` times within ``original_context`` tokens keeps
    its speed, one that turns at most ``low_freq_factor`` times turns ``factor`` times slower, in
    between the two are mixed in proportion. ``low_freq_factor`` is below ``high_freq_factor``.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens
    amplitude: ClassVar[float] = 1.0

    def speeds(self, speeds: torch.Tensor, theta: float) -> torch.Tensor:
        turns = speeds * (self.original_context / (2 * math.pi))
        span = self.high_freq_factor - self.low_freq_factor
        return _mixed(speeds, self.factor, kept=(turns - self.low_freq_factor) / span)


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, arXiv:2309.00071), its attention factor in the tables' amplitude.

    Pairs up to the one that turns ``beta_fast`` times within ``original_context`` tokens keep their
    speed, those from the one that turns ``beta_slow`` times turn ``factor`` times slower; the share
    falls linearly with the pair's index in between. ``truncate`` widens that range to whole
    indices. ``theta`` must be above 1.
    """

    factor: float
    original_context: int  # tokens
    amplitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def speeds(self, speeds: torch.Tensor, theta: float) -> torch.Tensor:
        head_dim = 2 * len(speeds)
        first = self._pair_of(self.beta_fast, head_dim, theta)
        last = self._pair_of(self.beta_slow, head_dim, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        pairs = torch.arange(len(speeds), dtype=torch.float64)
        slowed = (pairs - first) / max(last - first, 0.001)
        return _mixed(speeds, self.factor, kept=1 - slowed)

    def _pair_of(self, turns: float, head_dim: int, theta: float) -> float:
        """The (fractional) index of the pair that turns so often in the original context."""
        wavelength = self.original_context / (2 * math.pi * turns)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))


@dataclass(frozen=True, slots=True)
class FrequencyFactors:
    """Pair i turns ``factors[i]`` times slower: scaling worked out by who wrote the file."""

    factors: tuple[float, ...]  # head_dim / 2 of them
    amplitude: ClassVar[float] = 1.0

    def speeds(self, speeds: torch.Tensor, theta: float) -> torch.Tensor:
        return speeds / torch.tensor(self.factors, dtype=torch.float64)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


def _mixed(speeds: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    """``kept`` (clamped to 0..1) of the speed as it is, the rest ``factor`` times slower."""
    kept = kept.clamp(0, 1)
    return speeds * (kept + (1 - kept) / factor)

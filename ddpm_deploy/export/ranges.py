"""How far the numbers of a tensor reach, and the range that int8 should cover of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import Array

BINS = 2048
"""Of a histogram: 16 for each of int8's 127 magnitudes."""

LEVELS = 127
"""Magnitudes of int8, without -128, so that both signs reach as far."""

_SHARES = np.linspace(0.1, 1.0, 46)
"""Of the largest magnitude: the ranges that are tried."""


_COUNTED = 2**18
"""Numbers of a tensor that are counted; of a larger one every third, fifth, and so on."""


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """How often the numbers of a tensor have which magnitude.

    Attributes:
        counts: float64, (BINS,): of magnitudes from 0 to `largest`.
        largest: The largest of all.
    """

    counts: NDArray[np.float64]
    largest: float

    @classmethod
    def of(cls, tensor: Array) -> Magnitudes:
        """Counts the numbers of a tensor of any shape."""
        magnitudes = np.abs(tensor).ravel()
        largest = float(magnitudes.max(initial=0.0))
        # An odd stride, which meets every column of a picture.
        counted = magnitudes[:: (magnitudes.size // _COUNTED) | 1]
        bins = np.minimum(counted * (BINS / (largest or 1.0)), BINS - 1).astype(np.int32)
        return cls(counts=np.bincount(bins, minlength=BINS).astype(np.float64), largest=largest)

    def error(self, most: float) -> float:
        """Returns the mean square error of int8 that reaches to `most`.

        What lies inside is rounded to steps of most / 127, at a cost of step² / 12; what lies
        outside is clipped to it.
        """
        centres = (np.arange(BINS) + 0.5) * (self.largest / BINS)
        beyond = np.maximum(centres - most, 0)
        square = beyond**2 + (most / LEVELS) ** 2 / 12
        return float(self.counts @ square / max(self.counts.sum(), 1))


def best_range(calls: Sequence[Magnitudes]) -> float:
    """Returns the range whose int8 has the least mean square error, over a tensor's calls.

    References:
        Nagel et al. 2021, "A white paper on neural network quantization",
        https://arxiv.org/abs/2106.08295, section 3.1, MSE.
    """
    largest = max(call.largest for call in calls)
    if not largest:
        return 1.0  # all is 0, on any scale
    tried = [float(share * largest) for share in _SHARES]
    return min(tried, key=lambda most: sum(call.error(most) for call in calls))

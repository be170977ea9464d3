"""How far one network is from another: the measure, what it may be, and what to feed both."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.precision import Precision
from ddpm_deploy.spec import ModelSpec

TOLERANCE = 2e-5
"""Largest `relative_error` that float32 rounding explains.

Runtimes differ from PyTorch, and PyTorch from itself with other threads, by up to 5e-6; the
smallest structural mistake known, GELU by tanh, moves the output by 7e-5.
"""

BUDGETS: Mapping[Precision, float] = {
    "fp32": TOLERANCE,
    "fp16": 5e-3,
    "bf16": 4e-2,
    "int8": 0.3,
}
"""Largest `relative_error` of a network's output that a precision is given.

For half precisions ten times the rounding of one number: 2⁻¹¹ for fp16, 2⁻⁸ for bf16. An int8
network is measured over whole loops when it is made; here only what is no longer the network shows.
"""


def relative_error(given: Samples, wanted: Samples) -> float:
    """Returns max |given - wanted| over max |wanted|, or the difference alone where that is 0."""
    peak = float(np.abs(wanted).max())
    return float(np.abs(given - wanted).max()) / (peak or 1.0)


def example_conditions(spec: ModelSpec, batch: int) -> dict[str, Array]:
    """Returns conditions to compare networks with: the null label, where there is one, and others.

    Args:
        spec: What the network is.
        batch: Samples, at least 1.

    Returns:
        For each of `spec.conditions` an array (batch, *shape) of its dtype.
    """
    values: dict[str, Array] = {}
    for c in spec.conditions:
        if c.classes is None:
            values[c.name] = SeededNoise(0, range(batch), c.shape)(0).astype(c.dtype)
        else:
            values[c.name] = np.arange(batch, dtype=c.dtype)[::-1] % c.classes
            values[c.name][0] = c.classes - 1 if c.null is None else c.null
    return values

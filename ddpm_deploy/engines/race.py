"""Which of several engines is the fastest here.

They take turns, so that a machine that grows warm or busy is so for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from ddpm_deploy.engines.base import Engine
from ddpm_deploy.noise import SeededNoise
from ddpm_deploy.parity import example_conditions

MARGIN = 0.02
"""How much faster something must be to be preferred to what is simpler: what turns differ by."""


def race(
    engines: Mapping[str, Engine], batches: Mapping[str, int], *, turns: int = 5
) -> dict[str, float]:
    """Times calls of engines, each at its own batch.

    Args:
        engines: By name; of one network.
        batches: Samples at once, by name.
        turns: Calls of each that are timed, after two that are not.

    Returns:
        Seconds an image, the median of a call's, by name.

    Raises:
        EngineError: One of them failed.
    """
    first = next(iter(engines.values()))
    spec = first.spec
    fed = {
        name: (
            SeededNoise(0, range(batch), spec.sample_shape)(0),
            np.full(batch, spec.schedule.T // 2, np.int64),
            example_conditions(spec, batch),
        )
        for name, batch in batches.items()
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(-2, turns):
        for name, engine in engines.items():
            x, t, conditions = fed[name]
            start = time.perf_counter()
            engine(x, t, **conditions)
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / len(x))
    return {name: float(np.median(taken)) for name, taken in times.items()}


def winner(seconds: Mapping[str, float]) -> str:
    """Returns the fastest; of those within `MARGIN` of it, the first."""
    least = min(seconds.values())
    return next(name for name, taken in seconds.items() if taken <= least * (1 + MARGIN))

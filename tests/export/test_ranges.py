from __future__ import annotations

import numpy as np
import pytest

from ddpm_deploy.arrays import Array
from ddpm_deploy.export.ranges import LEVELS, Magnitudes, best_range


def int8_error(x: Array, most: float) -> float:
    """Mean square error of rounding to int8, done and not estimated."""
    step = most / LEVELS
    return float(np.mean((np.clip(np.rint(x / step), -LEVELS, LEVELS) * step - x) ** 2))


def test_the_range_has_nearly_the_least_error_that_any_has() -> None:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    chosen = best_range([Magnitudes.of(x)])
    least = min(int8_error(x, most) for most in np.linspace(1, np.abs(x).max(), 100))
    assert int8_error(x, chosen) < 1.05 * least
    assert chosen < 0.95 * np.abs(x).max()  # the largest of a bell curve are clipped


def test_numbers_that_are_spread_evenly_are_not_clipped() -> None:
    x = np.linspace(-3, 3, 10_001, dtype=np.float32)
    assert best_range([Magnitudes.of(x)]) == pytest.approx(3)


def test_calls_of_a_tensor_count_together() -> None:
    rng = np.random.default_rng(0)
    near, far = (scale * rng.standard_normal((8, 500)) for scale in (1.0, 4.0))
    both = best_range([Magnitudes.of(near), Magnitudes.of(far)])
    together = best_range([Magnitudes.of(np.concatenate([near, far]))])
    assert both == pytest.approx(together, rel=0.05)


def test_of_a_large_tensor_a_part_is_counted_and_the_largest_of_all_is_known() -> None:
    x = np.zeros((4, 64, 80, 80), np.float32)
    x[3, 7, 40, 41] = -9
    magnitudes = Magnitudes.of(x)
    assert magnitudes.largest == 9
    assert 2**17 < magnitudes.counts.sum() < 2**19
    assert np.count_nonzero(np.diff(np.arange(x.size)[:: (x.size // 2**18) | 1] % 80)) > 0


def test_a_tensor_of_zeros_has_a_range() -> None:
    assert best_range([Magnitudes.of(np.zeros((2, 3), np.float32))]) == 1.0
